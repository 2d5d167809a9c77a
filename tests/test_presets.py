"""Presets: two stages with one command, every value shown and open to change, and killed anywhere."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from captioner.cli.train_options import build_parser, given_options
from captioner.model.checkpoint import load_checkpoint
from captioner.training.options import stages_of
from captioner.training.presets import PRESETS
from captioner.training.setup import best_of_stage_before

# A network small enough for a test; options given come before the recipe's.
TINY = ["--rnn_size", 24, "--input_encoding_size", 16, "--gpuid", -1, "--batch_size", 4, "--seq_per_img", 2]
TINY += ["--losses_log_every", 1, "--save_checkpoint_every", 4, "--num_workers", 1]


@pytest.fixture(scope="module")
def data(tiny_dataset, tiny_cnn, tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")  # of its own: features are cached beside the h5
    for path in tiny_dataset:
        shutil.copy(path, folder)
    return ["--input_h5", folder / "data.h5", "--input_json", folder / "data.json", "--cnn_model", tiny_cnn, *TINY]


# 8 iterations in each stage
BOTH = ["--preset", "flickr8k", "--stages", "1,2", "--epochs", 2, "--learning_rate", 0.01]
BOTH += ["--cnn_learning_rate", 0.001, "--warmup", 0, "--cache_type", "float32", "--language_eval", 0]


@pytest.fixture(scope="module")
def undisturbed(data, command, tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed")
    done = command("train", *data, *BOTH, "--checkpoint_path", folder)
    assert done.returncode == 0, done.stderr
    return folder, done.stderr


def report(folder: Path, stage: int) -> dict:
    return json.loads((folder / f"model_id_stage{stage}.json").read_text())


def assert_same_results(one: Path, other: Path) -> None:
    for stage in (1, 2):
        for kind in ("", "_last"):
            first, second = (load_checkpoint(folder / f"model_id_stage{stage}{kind}.pt") for folder in (one, other))
            assert first.history.iteration == second.history.iteration
            for name, tensor in first.state_dict.items():
                assert torch.equal(tensor, second.state_dict[name]), f"stage {stage}: {name}"
        for name in ("loss_history", "val_loss_history", "val_predictions"):
            assert report(one, stage)[name] == report(other, stage)[name]


def test_stage_one_is_frozen_and_stage_two_goes_on_from_its_best(undisturbed, tiny_cnn):
    folder, _ = undisturbed
    cnn = torch.load(tiny_cnn, weights_only=True)
    first, second = (load_checkpoint(folder / f"model_id_stage{k}_last.pt").state_dict for k in (1, 2))
    assert all(torch.equal(first[f"encoder.{name}"], tensor) for name, tensor in cnn.items())
    changed = {name for name, tensor in cnn.items() if not torch.equal(second[f"encoder.{name}"], tensor)}
    assert changed == {f"features.{i}.{kind}" for i in (24, 26, 28) for kind in ("weight", "bias")}
    reports = [report(folder, stage) for stage in (1, 2)]
    assert [r["iter"] for r in reports] == [8, 8]
    best = load_checkpoint(folder / "model_id_stage1.pt").history
    # Cached features may be computed in bfloat16.
    assert reports[1]["val_loss_history"]["0"] == pytest.approx(best.val_loss_history[best.iteration], abs=1e-4)
    others = [loss for iteration, loss in best.val_loss_history.items() if iteration != best.iteration]
    assert min(others) > best.val_loss_history[best.iteration] + 1e-3
    assert [r["opt"]["finetune_cnn_after"] for r in reports] == [-1, 0]


def test_the_log_shows_every_value_and_what_was_given_instead(undisturbed):
    _, log = undisturbed
    first, second = re.findall(r"^preset flickr8k, stage \d.*", log, re.MULTILINE)
    for shown in (
        "--finetune_cnn_after -1,", "--decoder attention,", "--cache_features 1,", "--epochs 2 (instead of 15)",
        "--batch_size 4 (instead of 32)", "--label_smoothing 0.1,", "--language_eval 0 (instead of 1)",
    ):  # fmt: skip
        assert shown in first
    for shown in ("--finetune_cnn_after 0", "--finetune_cnn_layers 5", "--cnn_learning_rate 0.001 (instead of 1e-05)"):
        assert shown in second


def start(argv: list) -> subprocess.Popen:
    """A process of its own, with as many threads as this one: sums depend on it in their last digits."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "captioner.cli.train", *map(str, argv)]
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)


def kill_at(argv: list, line: str) -> None:
    """kill -9 as soon as the log says `line`."""
    process = start(argv)
    seen = False
    for written in process.stderr:
        if seen := written.startswith(line):
            break
    process.kill()
    process.communicate()
    assert seen and process.returncode == -signal.SIGKILL, "the run was over before it was killed"


def test_killed_in_either_stage_and_between_it_ends_like_an_undisturbed_one(data, undisturbed, tmp_path):
    argv = [*data, *BOTH, "--checkpoint_path", tmp_path, "--resume", "auto"]
    kill_at(argv, "iter 6 ")  # in stage 1, which has a state of iteration 4
    kill_at(argv, "done: 8 iterations")  # between the stages: the first is done, the second has no state
    assert not (tmp_path / "model_id_stage2_resume.pt").exists()
    kill_at(argv, "preset flickr8k, stage 2")  # the same, found again
    process = start(argv)  # now into stage 2
    lines = []
    for line in process.stderr:
        lines.append(line)
        if line.startswith("iter 5 ") and any("stage 2" in earlier for earlier in lines):
            break
    process.kill()
    process.communicate()
    assert any(line.startswith("done already: 8 iterations") for line in lines)
    process = start(argv)
    _, log = process.communicate(timeout=200)
    assert process.returncode == 0, log
    assert log.startswith("stage 1 is done\n") and "resumed at iteration 4" in log and "stage 1:" not in log
    assert_same_results(undisturbed[0], tmp_path)


def test_a_stage_at_a_time_is_the_same(data, undisturbed, command, tmp_path):
    for stage in (1, 2):
        argv = [*data, *BOTH, "--stages", stage, "--checkpoint_path", tmp_path]
        done = command("train", *argv)
        assert done.returncode == 0, done.stderr
        assert (tmp_path / "model_id_stage2.pt").exists() == (stage == 2)
    assert_same_results(undisturbed[0], tmp_path)


def test_starting_afresh_sets_the_later_stage_aside_too(data, undisturbed, command, tmp_path):
    """Else --resume auto would go on with the second stage of the run before."""
    for path in undisturbed[0].iterdir():
        shutil.copy(path, tmp_path)
    done = command(
        "train", *data, "--preset", "flickr8k", "--stages", 1, "--max_iters", 0, "--checkpoint_path", tmp_path
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "model_id_stage2_resume.previous.pt").exists()
    assert not (tmp_path / "model_id_stage2_resume.pt").exists()


def test_a_signal_in_stage_one_does_not_begin_stage_two(data, tmp_path):
    process = start([*data, *BOTH, "--checkpoint_path", tmp_path])
    for line in process.stderr:
        if line.startswith("iter 2 "):
            break
    process.send_signal(signal.SIGTERM)
    _, rest = process.communicate(timeout=60)
    assert process.returncode == 143
    assert "--resume auto" in rest and "stage 2" not in rest


@pytest.mark.usefixtures("without_java")
def test_small_data_start_from_the_bundled_model(data, command, tmp_path):
    sizes = data.index("--rnn_size")  # the bundled model has its own, and is asked for no others
    data = data[:sizes] + data[sizes + 4 :]
    argv = [*data, "--preset", "small", "--stages", 1, "--cache_features", 1, "--checkpoint_path", tmp_path]
    done = command("train", *argv, "--max_iters", 1)
    assert done.returncode == 0, done.stderr
    assert "vocabulary: the model's 4347 words and 0 new" in done.stderr
    assert "--start_from bundled" in done.stderr
    model = load_checkpoint(tmp_path / "model_id_stage1.pt")
    assert model.config.rnn_size == 512 and model.vocab.size == 4347


BAD_INPUT = {
    "stages of nothing": (["--stages", "1"], "--stages needs a recipe; expected --preset coco|flickr8k|small"),
    "a stage it has not": (["--preset", "small", "--stages", "1,2"], "preset small has no stage 2; expected 1"),
    "stage 2 without 1": (["--preset", "flickr8k", "--stages", "2"], "no such file, and stage 2 starts from it"),
    "cached features to fine-tune": (
        ["--preset", "coco", "--stages", "2", "--cache_features", "1"],
        "--cache_features with --finetune_cnn_after",
    ),
    "one state for two stages": (["--preset", "flickr8k", "--resume", "x_resume.pt"], "is the state of one stage"),
    "no such state": (["--preset", "small", "--stages", "1", "--resume", "x_resume.pt"], "x_resume.pt: no such file"),
}


@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_input_is_one_line(case, data, command, tmp_path):
    arguments, message = BAD_INPUT[case]
    done = command("train", *data, "--checkpoint_path", tmp_path, *arguments)
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("caption-train: error: ") and message in last
    assert not list(tmp_path.iterdir())


def test_a_stage_starts_from_the_nearest_one_before_it_that_was_asked_for_or_is_there(tmp_path):
    def start(stages: str, stage: int) -> str:
        given = {"preset": "flickr8k", "stages": stages, "checkpoint_path": str(tmp_path)}
        (options,) = [options for options in stages_of(given) if options.stage == stage]
        return best_of_stage_before(options).name

    assert [start("1,2,3", 2), start("1,2,3", 3), start("1,3", 3)] == [f"model_id_stage{k}.pt" for k in (1, 2, 1)]
    assert start("3", 3) == "model_id_stage2.pt"  # which the message then names as missing
    (tmp_path / "model_id_stage1.pt").touch()
    assert start("3", 3) == "model_id_stage1.pt"


@pytest.mark.parametrize("preset", PRESETS)
def test_a_recipe_is_options_that_could_be_given(preset):
    argv = ["--preset", preset]
    stages = stages_of(given_options(build_parser(), argv))
    assert [opt.stage for opt in stages] == ([1] if preset == "small" else [1, 2, 3])
    for opt in stages:
        values = PRESETS[preset][opt.stage]
        given = [f"--{name}={int(value) if isinstance(value, bool) else value}" for name, value in values.items()]
        parsed = build_parser().parse_args(given)
        for name, value in values.items():
            assert getattr(parsed, name) == getattr(opt, name) == value
