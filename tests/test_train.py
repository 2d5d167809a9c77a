"""caption-train from outside: it learns, resumes exactly, and says what is wrong in one line."""

import dataclasses
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import h5py
import pytest
import torch

from captioner.model.caption_model import build_model
from captioner.model.checkpoint import TrainingHistory, load_checkpoint, save_checkpoint
from captioner.training.run_files import RunFiles

SMALL = ["--cnn_layer", "pool5", "--rnn_size", 24, "--input_encoding_size", 16, "--gpuid", -1, "--batch_size", 4]
SMALL += ["--seq_per_img", 2, "--losses_log_every", 1, "--val_images_use", -1, "--learning_rate", 0.01]
SMALL += ["--precision", "fp32"]  # what is equal is so within rounding


@pytest.fixture(scope="module")
def data(tiny_dataset, tiny_cnn):
    return ["--input_h5", tiny_dataset[0], "--input_json", tiny_dataset[1], "--cnn_model", tiny_cnn, *SMALL]


def start(argv: list) -> subprocess.Popen:
    """A process of its own, with as many threads as this one: sums depend on it in their last digits."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen([str(a) for a in argv], stderr=subprocess.PIPE, text=True, env=environment)


def weights(path: Path) -> dict[str, torch.Tensor]:
    return load_checkpoint(path).state_dict


def assert_same_weights(one: Path, other: Path, tolerance: float = 0.0) -> None:
    first, second = weights(one), weights(other)
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        torch.testing.assert_close(tensor, second[name], rtol=0, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}")


@pytest.fixture(scope="module")
def uninterrupted(data, command, tmp_path_factory):
    """A run of 24 iterations that nothing disturbs, with fine-tuning from iteration 12."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    done = command("train", *data, *WHOLE_RUN, "--checkpoint_path", folder)
    assert done.returncode == 0, done.stderr
    return folder


def without_cnn(data: list) -> list:
    """The options for a run that starts from a model, which brings its CNN."""
    place = data.index("--cnn_model")
    return data[:place] + data[place + 2 :]


WHOLE_RUN = ["--max_iters", 24, "--save_checkpoint_every", 8, "--finetune_cnn_after", 12, "--num_workers", 1]


def test_it_learns_to_name_colours(data, command, tmp_path):
    done = command(
        "train", *data, "--max_iters", 800, "--save_checkpoint_every", 400, "--cache_features", 1,
        "--losses_log_every", 10, "--drop_prob_lm", 0.1, "--checkpoint_path", tmp_path, "--id", "x",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "model_idx.json").read_text())
    first, last = report["val_loss_history"]["0"], report["val_loss_history"]["800"]
    assert first == pytest.approx(2.4, abs=0.3)  # ln(V+1)
    assert last < first / 2
    assert report["iter"] == 800
    assert list(report["loss_history"]) == [str(k) for k in range(0, 800, 10)]
    assert [p["image_id"] for p in report["val_predictions"]] == list(range(1016, 1023))
    evaluated = command(
        "eval", "--model", tmp_path / "model_idx.pt", "--num_images", -1, "--gpuid", -1, "--vis_dir", "",
        "--output", tmp_path / "out.json",
    )  # fmt: skip
    assert evaluated.returncode == 0, evaluated.stderr
    captions = {row["file_name"]: row["caption"] for row in json.loads((tmp_path / "out.json").read_text())}
    for index, colour in [(24, "red"), (25, "green"), (26, "blue"), (27, "grey")]:
        assert colour in captions[f"img{index}.png"]


def test_best_checkpoint_repeats_its_logged_loss(uninterrupted, tiny_dataset, command, tmp_path):
    best = load_checkpoint(uninterrupted / "model_id.pt")
    logged = best.history.val_loss_history[best.history.iteration]
    assert logged == min(best.history.val_loss_history.values())
    done = command(
        "eval", "--model", uninterrupted / "model_id.pt", "--split", "val", "--num_images", -1, "--gpuid", -1,
        "--precision", "fp32", "--vis_dir", tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert float(re.search(r"loss: ([\d.]+)", done.stdout)[1]) == pytest.approx(logged, abs=2e-6)


def test_killed_runs_end_like_an_undisturbed_one(uninterrupted, data, command, tmp_path):
    """kill -9 at random moments; the same command line again and again."""
    argv = [sys.executable, "-m", "captioner.cli.train", *data, *WHOLE_RUN, "--resume", "auto"]
    argv += ["--checkpoint_path", tmp_path]
    rng = random.Random(1)
    for iteration in (2, 7, 12, 17):  # before, around and after the saved states of iterations 0, 8 and 16
        process = start(argv)
        for line in process.stderr:
            if line.startswith(f"iter {iteration} "):
                break
        time.sleep(rng.uniform(0, 0.05))
        process.kill()
        process.communicate()
        assert process.returncode == -signal.SIGKILL, "the run was over before it was killed"
    process = start(argv)
    _, err = process.communicate(timeout=200)
    assert process.returncode == 0, err
    assert_same_weights(uninterrupted / "model_id_last.pt", tmp_path / "model_id_last.pt")
    assert_same_weights(uninterrupted / "model_id.pt", tmp_path / "model_id.pt")
    reports = [json.loads((folder / "model_id.json").read_text()) for folder in (uninterrupted, tmp_path)]
    for name in ("loss_history", "val_loss_history", "val_predictions"):
        assert reports[0][name] == reports[1][name]


def test_what_a_kill_left_of_the_last_file_goes_when_the_run_is_repeated(uninterrupted, data, command, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(uninterrupted, run)
    (run / ".model_id_pace.json.t1zh21s0.tmp").write_text("{")
    done = command("train", *data, *WHOLE_RUN, "--resume", "auto", "--checkpoint_path", run)
    assert done.returncode == 0, done.stderr
    assert sorted(os.listdir(run)) == sorted(os.listdir(uninterrupted))


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_polite_stop_saves_and_goes_on_exactly(number, code, uninterrupted, data, command, tmp_path):
    argv = [sys.executable, "-m", "captioner.cli.train", *data, *WHOLE_RUN, "--checkpoint_path", tmp_path]
    process = start(argv)
    for line in process.stderr:
        if line.startswith("iter 3"):
            break
    process.send_signal(number)
    _, rest = process.communicate(timeout=60)
    assert process.returncode == code
    assert "--resume auto" in rest
    done = command("train", *data, *WHOLE_RUN, "--resume", "auto", "--checkpoint_path", tmp_path)
    assert done.returncode == 0, done.stderr
    assert "resumed at iteration" in done.stderr
    assert_same_weights(uninterrupted / "model_id_last.pt", tmp_path / "model_id_last.pt")


def test_frozen_training_leaves_the_cnn_alone(data, tiny_cnn, command, tmp_path):
    done = command("train", *data, "--max_iters", 2, "--checkpoint_path", tmp_path)
    assert done.returncode == 0, done.stderr
    trained, original = weights(tmp_path / "model_id_last.pt"), torch.load(tiny_cnn, weights_only=True)
    for name, tensor in original.items():
        assert torch.equal(trained[f"encoder.{name}"], tensor)


def test_finetuning_from_a_block_leaves_the_blocks_before_alone(data, tiny_cnn, command, tmp_path):
    done = command(
        "train", *data, "--max_iters", 2, "--finetune_cnn_after", 0, "--finetune_cnn_layers", 4,
        "--cnn_learning_rate", 0.001, "--checkpoint_path", tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    trained, original = weights(tmp_path / "model_id_last.pt"), torch.load(tiny_cnn, weights_only=True)
    changed = {name for name, tensor in original.items() if not torch.equal(trained[f"encoder.{name}"], tensor)}
    fourth_block_on = {f"features.{i}.{kind}" for i in (17, 19, 21, 24, 26, 28) for kind in ("weight", "bias")}
    assert changed == fourth_block_on


def test_accumulation_changes_nothing_but_memory(data, command, tmp_path):
    for parts in (1, 3):
        done = command(
            "train", *data, "--max_iters", 3, "--drop_prob_lm", 0, "--accumulate", parts, "--id", parts,
            "--finetune_cnn_after", 1, "--checkpoint_path", tmp_path,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
    assert_same_weights(tmp_path / "model_id1_last.pt", tmp_path / "model_id3_last.pt", tolerance=2e-4)


def test_every_earlier_run_is_set_aside(tmp_path):
    for run in ("first", "second", "third"):
        files = RunFiles(tmp_path, "")
        files.keep_previous(repeating=False)
        files.best.write_text(run)
        files.report.write_text(run)
    found = {path.name: path.read_text() for path in tmp_path.iterdir()}
    for name in ("model_id{}.pt", "model_id{}.json"):
        kept = {"": "third", ".previous": "first", ".previous2": "second"}
        assert {word: found.pop(name.format(word)) for word in kept} == kept
    assert not found


@pytest.mark.parametrize("written", [["_losses.jsonl"], [".pt"], [".pt", "_last.pt", ".json", "_losses.jsonl"]])
def test_a_run_killed_before_its_first_state_leaves_nothing_when_it_is_repeated(
    written, uninterrupted, data, command, tmp_path
):
    argv = [*data, *WHOLE_RUN, "--max_iters", 0, "--checkpoint_path", tmp_path]
    assert command("train", *argv).returncode == 0
    losses = '{"iter": 0, "loss": 4.25}\n{"iter": 1, "lo'
    for path in list(tmp_path.iterdir()):
        if path.name not in [f"model_id{end}" for end in written]:
            path.unlink()
    if "_losses.jsonl" in written:
        (tmp_path / "model_id_losses.jsonl").write_text(losses)
    done = command("train", *data, *WHOLE_RUN, "--resume", "auto", "--checkpoint_path", tmp_path)
    assert done.returncode == 0, done.stderr
    assert sorted(os.listdir(tmp_path)) == sorted(os.listdir(uninterrupted))
    assert_same_weights(uninterrupted / "model_id_last.pt", tmp_path / "model_id_last.pt")


@pytest.mark.parametrize("name", ["model_id.pt", "model_id_losses.jsonl", "model_id.json"])
def test_somebodys_file_is_set_aside_even_when_a_run_is_repeated(name, data, command, tmp_path):
    (tmp_path / name).write_text("somebody's\n")
    argv = [*data, "--max_iters", 1, "--resume", "auto", "--checkpoint_path", tmp_path]
    done = command("train", *argv)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / name.replace(".", ".previous.")).read_text() == "somebody's\n"


def test_a_model_from_elsewhere_is_set_aside_though_it_has_had_no_iteration(uninterrupted, data, command, tmp_path):
    """As one that was converted: what it has learnt comes from no run of ours."""
    learnt = dataclasses.replace(load_checkpoint(uninterrupted / "model_id.pt"), history=TrainingHistory())
    save_checkpoint(tmp_path / "model_id.pt", learnt)
    before = (tmp_path / "model_id.pt").read_bytes()
    done = command("train", *data, "--max_iters", 1, "--resume", "auto", "--checkpoint_path", tmp_path)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "model_id.previous.pt").read_bytes() == before


def test_an_untrained_model_is_never_the_best(data, command, tmp_path):
    """Not even where the first step makes it worse."""
    argv = [*data, "--max_iters", 1, "--learning_rate", 1e3, "--optim", "sgd", "--grad_clip", 1]
    done = command("train", *argv, "--checkpoint_path", tmp_path)
    assert done.returncode == 0, done.stderr
    history = load_checkpoint(tmp_path / "model_id.pt").history
    assert history.iteration == 1
    assert history.val_loss_history[1] > history.val_loss_history[0]


def test_start_from_takes_the_weights_alone(data, uninterrupted, command, tmp_path):
    start = uninterrupted / "model_id.pt"
    argv = ["train", *without_cnn(data), "--start_from", start, "--max_iters", 0, "--checkpoint_path", tmp_path]
    done = command(*argv)
    assert done.returncode == 0, done.stderr
    assert_same_weights(start, tmp_path / "model_id.pt")
    assert load_checkpoint(tmp_path / "model_id.pt").history.iteration == 0


def test_start_from_refuses_what_it_would_ignore(data, uninterrupted, command, tmp_path):
    argv = [*without_cnn(data), "--start_from", uninterrupted / "model_id.pt", "--max_iters", 0]
    for option, value, told in (
        ("--rnn_size", 512, "--rnn_size 512: "),  # the default, but asked for
        ("--num_layers", 2, "has 1"),
        ("--input_encoding_size", 8, "has 16"),
        ("--cnn_layer", "fc7", "has pool5"),
        ("--cnn_pixels", "torchvision", "has caffe"),
    ):
        done = command("train", *argv, option, value, "--checkpoint_path", tmp_path)
        assert done.returncode == 1 and told in done.stderr.splitlines()[-1], done.stderr
        assert "leave" in done.stderr.splitlines()[-1]
    assert not list(tmp_path.iterdir())
    done = command(
        "train", *data, "--start_from", uninterrupted / "model_id.pt", "--max_iters", 0, "--checkpoint_path", tmp_path
    )
    assert done.returncode == 0 and "--cnn_model is not used" in done.stderr


def test_losses_are_on_disk_as_they_come(uninterrupted, data, command, tmp_path):
    argv = [sys.executable, "-m", "captioner.cli.train", *data, *WHOLE_RUN, "--resume", "auto"]
    process = start([*argv, "--checkpoint_path", tmp_path])
    for line in process.stderr:
        if line.startswith("iter 5 "):
            break
    process.kill()
    process.communicate()
    path = tmp_path / "model_id_losses.jsonl"
    losses = {entry["iter"]: entry["loss"] for entry in map(json.loads, path.read_text().splitlines())}
    report = json.loads((uninterrupted / "model_id.json").read_text())["loss_history"]
    assert len(losses) >= 6  # the last validation was at iteration 0
    assert losses == {int(k): loss for k, loss in report.items() if int(k) < len(losses)}
    done = command("train", *data, *WHOLE_RUN, "--resume", "auto", "--checkpoint_path", tmp_path)
    assert done.returncode == 0, done.stderr
    assert path.read_bytes() == (uninterrupted / "model_id_losses.jsonl").read_bytes()  # each of them once


def test_pixels_from_data(data, tiny_dataset, command, tmp_path):
    """A CNN of its own pixels: mean and deviation of the training pictures, and no others."""
    argv = [*data, "--cnn_pixels", "data", "--max_iters", 1, "--checkpoint_path", tmp_path]
    done = command("train", *argv)
    assert done.returncode == 0, done.stderr
    config = load_checkpoint(tmp_path / "model_id.pt").config
    with h5py.File(tiny_dataset[0]) as file:
        pixels = file["images"][:16].transpose(1, 0, 2, 3).reshape(3, -1).astype(float)
    assert config.pixel_mean == pytest.approx(pixels.mean(1), abs=1e-6)
    assert config.pixel_std == pytest.approx(pixels.std(1), abs=1e-6)
    model = build_model(load_checkpoint(tmp_path / "model_id.pt"))
    grey = torch.full((1, 3, 224, 224), 100, dtype=torch.uint8)
    wanted = (100 - pixels.mean(1)) / pixels.std(1)
    assert model.normalise(grey)[0, :, 7, 9].tolist() == pytest.approx(wanted, abs=1e-5)
    told = command("convert", tmp_path / "model_id.pt", "--inspect").stdout
    assert "pixels: data: mean (" in told
    again = command("eval", "--model", tmp_path / "model_id.pt", "--gpuid", -1, "--vis_dir", "", "--split", "val")
    assert again.returncode == 0, again.stderr


@pytest.mark.usefixtures("without_java")
def test_scores_that_cannot_be_computed_are_told_once(data, command, tmp_path):
    argv = [*data, "--max_iters", 2, "--save_checkpoint_every", 1, "--language_eval", "--checkpoint_path", tmp_path]
    done = command("train", *argv)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("METEOR skipped because there is no Java") == 1


@pytest.mark.usefixtures("java_says_one")
def test_meteor_is_among_the_scores_of_a_training(data, command, tmp_path):
    done = command("train", *data, "--max_iters", 1, "--language_eval", "--checkpoint_path", tmp_path)
    assert done.returncode == 0, done.stderr
    history = json.loads((tmp_path / "model_id.json").read_text())["val_lang_stats_history"]
    assert [scores["METEOR"] for scores in history.values()] == pytest.approx([1, 1])
    assert done.stderr.count("SPICE skipped because") == 1


def test_each_validation_tells_loss_and_accuracy(data, command, tmp_path):
    done = command("train", *data, "--max_iters", 2, "--save_checkpoint_every", 1, "--checkpoint_path", tmp_path)
    assert done.returncode == 0, done.stderr
    found = re.findall(
        r"validation at iteration (\d+): loss [\d.]+, top-1 accuracy ([\d.]+), top-5 ([\d.]+)", done.stderr
    )
    history = json.loads((tmp_path / "model_id.json").read_text())["val_accuracy_history"]
    assert {k: (float(top1), float(top5)) for k, top1, top5 in found} == {
        k: (round(shares["top1"], 3), round(shares["top5"], 3)) for k, shares in history.items()
    }


BAD_INPUT = {
    "missing h5": (["--input_h5", "nowhere.h5"], "nowhere.h5: no such file"),
    "missing cnn": (["--cnn_model", "nowhere.pth"], "nowhere.pth"),
    "conv weights for fc7": (["--cnn_layer", "fc7"], "--cnn_layer pool5"),
    "two lengths": (["--epochs", "1", "--max_iters", "5"], "--max_iters and --epochs"),
    "cache and fine-tuning": (["--cache_features", "1", "--finetune_cnn_after", "0"], "--cache_features"),
    "missing start": (["--start_from", "nowhere.pt"], "nowhere.pt: no such file"),
    "not a state": (["--resume", "pyproject.toml"], "pyproject.toml: not a PyTorch file"),
    "unwritable folder": (["--checkpoint_path", "/proc/nothing"], "cannot write checkpoints"),
}


@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_input_is_one_line(case, data, command, tmp_path):
    arguments, message = BAD_INPUT[case]
    done = command(
        "train",
        *data,
        "--checkpoint_path",
        tmp_path,
        "--max_iters",
        *(["-1"] if "epochs" in str(arguments) else ["1"]),
        *arguments,
    )
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("caption-train: error: ") and message in last
    assert "Traceback" not in done.stderr
    assert not list(tmp_path.iterdir())


def test_exploding_loss_stops_and_keeps_the_last_good_state(data, command, tmp_path):
    argv = [*data, "--learning_rate", "1e30", "--optim", "sgd", "--grad_clip", "1e30", "--checkpoint_path", tmp_path]
    done = command("train", *argv, "--max_iters", 50)
    assert done.returncode == 1
    assert re.search(r"iteration \d+: the loss (is nan|is inf|exploded)", done.stderr.splitlines()[-1])
    for tensor in weights(tmp_path / "model_id_last.pt").values():
        assert torch.isfinite(tensor).all()
