"""--tensorboard: the event files as TensorBoard itself reads them."""

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

pytestmark = pytest.mark.usefixtures("without_java")

RUN = ["--cnn_layer", "pool5", "--rnn_size", 24, "--input_encoding_size", 16, "--gpuid", -1, "--batch_size", 4]
RUN += ["--seq_per_img", 2, "--losses_log_every", 2, "--val_images_use", -1, "--learning_rate", 0.01]
RUN += ["--max_iters", 20, "--save_checkpoint_every", 5, "--language_eval", 1, "--tensorboard", 1, "--id", "x"]


@pytest.fixture(scope="module")
def data(tiny_dataset, tiny_cnn):
    return ["--input_h5", tiny_dataset[0], "--input_json", tiny_dataset[1], "--cnn_model", tiny_cnn, *RUN]


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    shown = EventAccumulator(str(folder / "model_idx_tensorboard")).Reload()
    return {tag: [(e.step, e.value) for e in shown.Scalars(tag)] for tag in shown.Tags()["scalars"]}


def expected(folder: Path) -> dict[str, list[tuple[int, float]]]:
    report = json.loads((folder / "model_idx.json").read_text())
    curves = {"loss/training": report["loss_history"], "loss/validation": report["val_loss_history"]}
    for name in ("top1", "top5"):
        curves[f"accuracy/{name}"] = {step: shares[name] for step, shares in report["val_accuracy_history"].items()}
    for name in ("CIDEr", "Bleu_4"):
        curves[f"score/{name}"] = {step: scores[name] for step, scores in report["val_lang_stats_history"].items()}
    return {tag: [(int(k), pytest.approx(v, rel=1e-6)) for k, v in curve.items()] for tag, curve in curves.items()}


def test_the_curves_are_those_of_the_report(data, command, tmp_path):
    done = command("train", *data, "--checkpoint_path", tmp_path)
    assert done.returncode == 0, done.stderr
    found = scalars(tmp_path)
    for tag, curve in expected(tmp_path).items():
        assert found[tag] == curve
    assert [step for step, _ in found["loss/training"]] == list(range(0, 20, 2))
    assert [step for step, _ in found["loss/validation"]] == [0, 5, 10, 15, 20]
    shown = EventAccumulator(str(tmp_path / "model_idx_tensorboard")).Reload()
    last = shown.Tensors("captions/text_summary")[-1]
    assert last.step == 20 and b"1016: " in last.tensor_proto.string_val[0]


def test_a_killed_and_continued_run_shows_every_step_once(data, tmp_path):
    argv = [*data, "--resume", "auto", "--checkpoint_path", tmp_path]
    # Both from outside: TensorBoard orders event files by the second and the process they began in.
    words = [str(a) for a in [sys.executable, "-m", "captioner.cli.train", *argv]]
    process = subprocess.Popen(words, stderr=subprocess.PIPE, text=True)
    for line in process.stderr:
        if line.startswith("iter 14 "):
            break
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert scalars(tmp_path)["loss/training"][-1][0] == 14  # more than the state of iteration 10 knows
    done = subprocess.run(words, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 0 and "resumed at iteration 10" in done.stderr
    found = scalars(tmp_path)
    for tag, curve in expected(tmp_path).items():
        assert found[tag] == curve


def test_without_the_package_it_says_what_to_install(data, command, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    done = command("train", *data, "--checkpoint_path", tmp_path)
    assert done.returncode == 1
    assert 'pip install "captioner[tensorboard]"' in done.stderr.splitlines()[-1]
