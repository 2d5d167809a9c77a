"""caption-train --plan 1: what it says is what a real run then takes."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from captioner.model.checkpoint import load_checkpoint

SMALL = ["--cnn_layer", "pool5", "--rnn_size", 300, "--input_encoding_size", 200, "--gpuid", -1, "--batch_size", 4]
SMALL += ["--seq_per_img", 2, "--num_workers", 0, "--cnn_pixels", "caffe"]
FINETUNED = ["--finetune_cnn_after", 0, "--finetune_cnn_layers", 3]
UNITS = {"kB": 1e3, "MB": 1e6, "GB": 1e9, "ms": 1e-3, "s": 1, "min": 60, "h": 3600}


@pytest.fixture(scope="module")
def data(tiny_dataset, tiny_cnn, tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    for path in tiny_dataset:
        shutil.copy(path, folder)
    return ["--input_h5", folder / "data.h5", "--input_json", folder / "data.json", "--cnn_model", tiny_cnn, *SMALL]


@pytest.fixture(scope="module")
def plan_of(data, command):
    def plan(*arguments: object) -> str:
        done = command("train", *data, *arguments, "--plan", 1)
        assert done.returncode == 0, done.stderr
        return done.stdout

    return plan


def quantity(pattern: str, text: str) -> float:
    """The first number with a unit where `pattern` says, in bytes or seconds."""
    match = re.search(pattern.replace("#", r"([\d,.]+) (kB|MB|GB|ms|s|min|h)\b"), text)
    assert match, f"no {pattern!r} in {text}"
    return float(match[1].replace(",", "")) * UNITS[match[2]]


def files_below(*folders: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for folder in folders for path in folder.rglob("*")}


@pytest.mark.parametrize("kind", ["frozen", "fine-tuning"])
def test_parameters_and_files_are_those_of_a_real_run(kind, data, plan_of, command, tmp_path):
    options = ["--cache_features", 2] if kind == "frozen" else FINETUNED
    text = plan_of(*options, "--max_iters", 3)
    done = command("train", *data, *options, "--max_iters", 3, "--checkpoint_path", tmp_path)
    assert done.returncode == 0, done.stderr

    sizes = {name: tensor.numel() for name, tensor in load_checkpoint(tmp_path / "model_id.pt").state_dict.items()}
    language = sum(size for name, size in sizes.items() if name.startswith(("decoder.", "encoder.embed.")))
    cnn = sum(sizes.values()) - language
    blocks = [(0, 2), (5, 7), (10, 12, 14), (17, 19, 21), (24, 26, 28)]
    from_third = {f"encoder.features.{i}.{part}" for block in blocks[2:] for i in block for part in ("weight", "bias")}
    trained = language + (sum(sizes[name] for name in from_third) if kind == "fine-tuning" else 0)
    assert f"parameters   {cnn + language:,}: CNN {cnn:,}, language model {language:,}; trained: {trained:,}" in text
    assert "iterations   4.0 an epoch, 3 in all" in text
    assert "16 training and 7 validation images, 10 words" in text

    def written(name: str) -> int:
        return (tmp_path / name).stat().st_size

    assert quantity("best and last model #", text) == pytest.approx(written("model_id.pt"), rel=0.1)
    assert written("model_id_last.pt") == pytest.approx(written("model_id.pt"), rel=0.05)
    assert quantity("resume state #", text) == pytest.approx(written("model_id_resume.pt"), rel=0.1)
    total = sum(written(f"model_id{part}.pt") for part in ("", "_last", "_resume"))
    assert quantity("disk +#", text) == pytest.approx(total, rel=0.1)
    caches = list(Path(data[1]).parent.glob("features-*.npy"))
    if kind == "frozen":
        assert caches[0].stat().st_size == pytest.approx(28 * 2 * (12 * 4 + 4), abs=300)
        assert "2.9 kB of cached features" in text  # 28 images × 2 crops × 12 channels and a sum
        caches[0].unlink()
    else:
        assert not caches and "cached features" not in text


def peak_rss(argv: list) -> int:
    """Bytes of memory that the process has had at most."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    # Started by a small process: Linux counts what the process that forks has, and that is pytest with torch.
    launch = (
        "import resource, subprocess, sys; subprocess.run(sys.argv[1:], check=True, stderr=subprocess.DEVNULL);"
        " print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)"
    )
    command = [sys.executable, "-c", launch, sys.executable, "-m", "captioner.cli.train", *map(str, argv)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return int(done.stdout) * (1 if sys.platform == "darwin" else 1024)


@pytest.mark.parametrize("options", [[], ["--finetune_cnn_after", 0]], ids=["frozen", "fine-tuning"])
def test_memory_grows_with_the_batch_as_planned(options, data, plan_of, tmp_path):
    """Against what the system counts: between 2 and 24 images, so that Python and the libraries cancel out."""
    name = "fine-tuning" if options else "frozen"
    planned, measured = [], []
    for size in (2, 24):
        argv = [*options, "--batch_size", size, "--val_images_use", 1]
        planned.append(quantity(rf"{name}: .* activations #", plan_of(*argv)))
        measured.append(peak_rss([*data, *argv, "--max_iters", 1, "--checkpoint_path", tmp_path]))
    growth = measured[1] - measured[0]
    assert growth > 5e7
    assert 0.5 < (planned[1] - planned[0]) / growth < 2


def test_nothing_is_written_or_fetched(plan_of, data, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    before = files_below(tmp_path, Path(data[1]).parent)
    text = plan_of("--cnn_model", "imagenet", "--max_iters", 1, "--cache_features", 1, "--checkpoint_path", "runs/a")
    assert "CNN 14,714,688" in text  # VGG16's convolutions, as torchvision and Keras count them
    assert files_below(tmp_path, Path(data[1]).parent) == before


def test_time_is_of_the_right_order(plan_of, data, command, tmp_path):
    planned = quantity("fine-tuning: # an iteration", plan_of(*FINETUNED))
    done = command(
        "train", *data, *FINETUNED, "--max_iters", 41, "--losses_log_every", 40, "--checkpoint_path", tmp_path
    )
    assert done.returncode == 0, done.stderr
    rate = float(re.search(r"iter 40 .* ([\d.]+) it/s", done.stderr)[1])
    assert 0.1 < planned * rate < 10
    assert quantity("iteration, # an epoch", plan_of(*FINETUNED)) == pytest.approx(4 * planned, rel=9)


def test_stages_are_planned_one_by_one_without_a_model_of_the_first(plan_of, tmp_path):
    text = plan_of("--preset", "flickr8k", "--attention_heads", 4, "--checkpoint_path", tmp_path)
    first, second, third = re.split("preset flickr8k, stage [23]", text)
    assert "stage 1" in first and "--epochs 15" in first and "60 in all" in first
    assert re.search("^time +frozen", first, re.MULTILINE) and re.search("^time +fine-tuning", second, re.MULTILINE)
    assert "12 in all" in second and "20 in all" in third
    for part in (first, second, third):  # memory of both, whichever it is
        assert "frozen: " in part and "fine-tuning: " in part
    assert not list(tmp_path.iterdir())


def test_the_second_stage_alone_is_planned_for_the_model_it_starts_from(plan_of, data, command, tmp_path):
    preset = ["--preset", "flickr8k", "--attention_heads", 4, "--checkpoint_path", tmp_path]
    second = [*preset, "--stages", 2]
    done = command("train", *data, *second, "--plan", 1)
    assert done.returncode == 1 and "no such file, and stage 2 starts from it" in done.stderr
    first = [*preset, "--stages", 1, "--max_iters", 0, "--rnn_size", 40]
    assert command("train", *data, *first).returncode == 0
    state = load_checkpoint(tmp_path / "model_id_stage1.pt").state_dict
    parameters = sum(tensor.numel() for name, tensor in state.items() if name != "encoder.embed.scale")
    assert f"parameters   {parameters:,}:" in plan_of(*second)


def test_training_that_changes_its_kind_shows_both_times(plan_of):
    text = plan_of("--finetune_cnn_after", 100)
    assert re.search("frozen: .* an iteration", text) and re.search("fine-tuning: .* an iteration", text)
    assert "without end" in text


def test_what_does_not_fit_the_disk_is_said(plan_of, monkeypatch):
    usage = shutil.disk_usage("/")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1_000_000))
    assert re.search("warning: .* will not fit", plan_of())


def test_mistakes_are_found_before_the_run(data, command):
    done = command("train", *data, "--plan", 1, "--cnn_layer", "fc7")
    assert done.returncode == 1 and "--cnn_layer pool5" in done.stderr


def test_the_peak_of_memory_is_that_of_the_work_alone():
    code = """
import torch
from captioner.runtime.peak_memory import peak_bytes
def work():
    first = torch.ones(20_000_000)  # 80 MB
    del first
    torch.ones(10_000_000)
kept = torch.ones(30_000_000)
for _ in range(2):  # what earlier work has freed counts anew
    print(peak_bytes(work, kept.device))
"""  # in a process of its own: the commands tell the allocator to keep what is freed, for good
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    for peak in map(int, done.stdout.split()):
        assert peak == pytest.approx(80e6, abs=4e6)
