"""Warnings in the log of a training run: each where it belongs, none where all is well."""

import json
import logging
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from captioner.convert.torchvision import read_cnn_weights
from captioner.model.caption_model import CaptionModel
from captioner.model.config import ModelConfig
from captioner.model.encoder import TORCHVISION_STD, Encoder
from captioner.training.health_checks import LossTrend, warn_of_captions, warn_of_pixels
from captioner.training.run_files import Pace, Progress


def warnings_of(losses: list[float], vocab_size: int, window: int, caplog: pytest.LogCaptureFixture) -> list[str]:
    caplog.clear()
    trend = LossTrend(vocab_size, window)
    for iteration, loss in enumerate(losses):
        trend.add(iteration, loss)
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


def test_real_training_runs_raise_no_alarm(reference, caplog):
    original = json.loads((reference / "train_run_log.json").read_text())["iter_loss"]
    ours = list(
        json.loads((Path(__file__).parent / "data/losses_of_a_run.json").read_text()).values()
    )  # 6,000 photos, 2,461 words
    assert len(original) == 201 and len(ours) > 50
    for window in (20, 100):
        assert not warnings_of(original, 41, window, caplog)
    for window in (4, 10):  # of every 25th iteration
        assert not warnings_of(ours, 2461, window, caplog)


def test_a_loss_like_guessing_is_named_once_after_two_windows(caplog):
    rng = np.random.default_rng(0)
    losses = list(math.log(42) * rng.normal(0.97, 0.05, size=60))
    assert not warnings_of(losses[:19], 41, 10, caplog)
    (warning,) = warnings_of(losses, 41, 10, caplog)
    assert "does not fall" in warning and "iterations 10-19" in warning and "gives 3.738" in warning
    assert "--learning_rate" in warning


def test_a_rising_loss_is_named_once(caplog):
    rng = np.random.default_rng(0)
    flat, rising = rng.normal(2.0, 0.1, 200), rng.normal(2.0, 0.1, 100) + np.linspace(0, 1, 100)
    assert not warnings_of(list(flat), 2000, 20, caplog)  # learnt all it can: no alarm
    (warning,) = warnings_of([*flat, *rising], 2000, 20, caplog)
    assert "the loss rises" in warning and "lower --learning_rate" in warning


TINY = ["--cnn_layer", "pool5", "--rnn_size", 24, "--input_encoding_size", 16, "--gpuid", -1, "--batch_size", 4]
TINY += ["--seq_per_img", 1, "--max_iters", 201, "--cache_features", 1, "--num_workers", 0]


@pytest.mark.parametrize(("rate", "fires"), [(0.01, False), (1e-6, True)])
def test_training_says_when_it_does_not_learn(rate, fires, tiny_dataset, tiny_cnn, command, tmp_path):
    data = ["--input_h5", tiny_dataset[0], "--input_json", tiny_dataset[1], "--cnn_model", tiny_cnn, *TINY]
    done = command("train", *data, "--learning_rate", rate, "--checkpoint_path", tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("warning: the loss does not fall") == fires
    assert done.stderr.count("warning:") == fires


@pytest.fixture(scope="module")
def cnn_with_biases(tmp_path_factory):
    """A narrow CNN for Caffe's pixels whose biases count as much as the real one's: a tenth of the signal."""
    torch.manual_seed(3)
    encoder = Encoder("pool5", (12,) * 13)
    state = {}
    for name, tensor in encoder.state_dict().items():
        if name.startswith("features."):
            scale = (2 / tensor[0].numel()) ** 0.5 if tensor.ndim > 1 else 4.0
            state[name] = torch.randn_like(tensor) * scale
    folder = tmp_path_factory.mktemp("biases")
    torch.save(state, folder / "caffe.pth")
    torch.save(for_torchvision_pixels(state), folder / "torchvision.pth")
    return folder


def for_torchvision_pixels(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Weights that compute from torchvision's pixels what `state` computes from Caffe's (the means agree to 0.1)."""
    scale = 255 * torch.tensor(TORCHVISION_STD).view(1, 3, 1, 1)
    return {**state, "features.0.weight": state["features.0.weight"] * scale}


@pytest.mark.parametrize("weights", ["caffe", "torchvision"])
@pytest.mark.parametrize("pixels", ["caffe", "torchvision"])
def test_training_says_when_the_pixels_do_not_suit(weights, pixels, cnn_with_biases, tiny_dataset, command, tmp_path):
    done = command(
        "train", "--input_h5", tiny_dataset[0], "--input_json", tiny_dataset[1], *TINY, "--max_iters", 0,
        "--cnn_model", cnn_with_biases / f"{weights}.pth", "--cnn_pixels", pixels, "--checkpoint_path", tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stderr.splitlines() if line.startswith("warning:")]
    if weights == pixels:
        assert not lines
    else:
        assert len(lines) == 1 and f"try --cnn_pixels {weights}" in lines[0]
        assert ("far out of range" if weights == "torchvision" else "hardly differ") in lines[0]


def test_the_real_weights_and_real_photos(shared, tmp_path, caplog):
    state = torch.load(shared / "models" / "vgg16_conv.pth", weights_only=True)
    torch.save(for_torchvision_pixels({k: v.float() for k, v in state.items()}), tmp_path / "scaled.pth")
    files = sorted((shared / "data" / "flickr8k").rglob("*.jpg"))[::1800]
    photos = [np.asarray(Image.open(file).convert("RGB").resize((256, 256))).transpose(2, 0, 1) for file in files]
    images = torch.from_numpy(np.stack(photos))
    for path, right in ((shared / "models" / "vgg16_conv.pth", "caffe"), (tmp_path / "scaled.pth", "torchvision")):
        for pixels in ("caffe", "torchvision"):
            config = ModelConfig(vocab_size=3, cnn_layer="pool5", cnn_pixels=pixels, encoding_size=4, rnn_size=4)
            model = CaptionModel(config)
            model.encoder.load_state_dict(read_cnn_weights(str(path), "pool5", pixels).state, strict=False)
            caplog.clear()
            warn_of_pixels(model, images)
            warned = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
            assert bool(warned) is (pixels != right), (right, pixels, warned)


@pytest.mark.parametrize("blind", [True, False])
def test_training_says_when_captions_are_alike(blind, tiny_dataset, tiny_cnn, command, tmp_path):
    """On the 16 training images, as enough to tell; a CNN whose weights are all zero sees nothing."""
    described = json.loads(Path(tiny_dataset[1]).read_text())
    for entry in described["images"]:
        entry["split"] = {"train": "val", "val": "train"}.get(entry["split"], "train")
    (tmp_path / "data.json").write_text(json.dumps(described))
    state = torch.load(tiny_cnn, weights_only=True)
    torch.save({name: 0 * tensor if blind else tensor for name, tensor in state.items()}, tmp_path / "cnn.pth")
    done = command(
        "train", "--input_h5", tiny_dataset[0], "--input_json", tmp_path / "data.json", *TINY, "--learning_rate", 0.01,
        "--cnn_model", tmp_path / "cnn.pth", "--checkpoint_path", tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("warning: 16 of 16 validation captions are alike ('") == blind
    assert done.stderr.count("warning:") == blind


def test_captions_are_alike_from_nine_of_ten_on(caplog):
    warn_of_captions(["a dog"] * 8 + ["a cat", "a man"])
    warn_of_captions(["a dog"] * 9)
    assert not caplog.records
    warn_of_captions(["a dog"] * 9 + ["a cat"])
    assert "9 of 10 validation captions are alike ('a dog')" in caplog.text


@pytest.mark.parametrize(("waits", "fires"), [(0.4, False), (0.6, True)])
def test_the_log_says_when_data_come_too_slowly(waits, fires, caplog, monkeypatch):
    """A clock that only goes on while a batch is awaited, and while it is worked on: a second each iteration."""
    now = [0.0]
    monkeypatch.setattr("captioner.training.run_files.time.monotonic", lambda: now[0])
    caplog.set_level(logging.INFO)

    def batches():
        while True:
            now[0] += waits
            yield None

    pace = Pace()
    progress, stream = Progress(100, 10, pace), batches()
    for iteration in range(3):
        progress.next(stream)
        now[0] += 1 - waits
        progress.report(iteration, "loss", 2.0, 0.5 / (1 + iteration))
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == 3 and lines[1].startswith("iter 1 (epoch 0.10): loss 2.0000, 1.00 it/s, 10 images/s")
    assert ["60 % of the time waiting for data" in line for line in lines] == [False, fires, fires]
    assert ("--num_workers" in lines[2]) is fires
    assert pace.learning_rate == {0: 0.5, 1: 0.25, 2: 0.5 / 3}
    assert pace.iterations_per_second == {0: 1.0, 1: 1.0, 2: 1.0}


def test_pictures_scaled_to_one_are_named(caplog):
    model = CaptionModel(ModelConfig(vocab_size=3, cnn_layer="pool5", conv_widths=(2,) * 13))
    warn_of_pixels(model, torch.randint(0, 2, (2, 3, 256, 256), dtype=torch.uint8))
    assert "no grey level above 1" in caplog.text
