"""8-bit convolutions: the very integer arithmetic meant, near the float ones, and where they are refused."""

import json
import struct
import zlib

import numpy as np
import pytest
import torch
from conftest import TINY_WORDS
from PIL import Image
from torch.nn.functional import conv2d, max_pool2d

from captioner.data.vocabulary import Vocab
from captioner.errors import InputError
from captioner.inference.load import _store_ranges, _stored_ranges, make_captioner, require_int8
from captioner.kernels.int8 import Int8Convolutions, measure_ranges
from captioner.model.caption_model import CaptionModel, build_model
from captioner.model.checkpoint import (
    ASSETS,
    Checkpoint,
    bundled_model_path,
    load_checkpoint,
    save_checkpoint,
)
from captioner.model.config import ModelConfig
from captioner.model.encoder import Encoder, Normalise
from captioner.runtime.hardware import multiplies_int8

WIDTHS = (8, 8, 16, 16, 16, 24, 24, 24, 24, 32, 32, 32, 32)

needs_vnni = pytest.mark.skipif(not multiplies_int8(torch.device("cpu")), reason="this CPU has no AVX-512 VNNI")


@pytest.fixture(scope="module")
def features():
    torch.manual_seed(0)
    encoder = Encoder("pool5", WIDTHS, 1, 16)
    with torch.no_grad():
        for layer in encoder.features:
            if isinstance(layer, torch.nn.Conv2d):
                torch.nn.init.kaiming_normal_(layer.weight)
                layer.bias.uniform_(-5, 5)
    return encoder.features.eval()


@pytest.fixture(scope="module")
def images():
    torch.manual_seed(1)
    coarse = torch.randint(0, 256, (5, 3, 14, 14)).float()
    smooth = torch.nn.functional.interpolate(coarse, size=(224, 224), mode="bilinear")
    return Normalise("caffe")(smooth.to(torch.uint8))


@pytest.fixture
def photos(tmp_path):
    folder = tmp_path / "photos"
    folder.mkdir()
    rng = np.random.default_rng(5)
    for number in range(7):
        small = Image.fromarray(rng.integers(0, 256, size=(3, 4, 3), dtype=np.uint8))
        small.resize((240, 200), Image.Resampling.BICUBIC).save(folder / f"{number}.png")
    return folder


def emulated(features, images, ranges):
    """The same arithmetic in float64, where sums of products of bytes are exact."""
    low, high = -123.68, 255 - 103.939
    scale, zero = (high - low) / 255, round(-low * 255 / (high - low))
    levels = (images.double() / scale).round().add(zero).clamp(0, 255)
    remaining = [*ranges, None]
    for layer in features:
        if isinstance(layer, torch.nn.Conv2d):
            weight_scale = layer.weight.double().abs().amax(dim=(1, 2, 3)) / 127
            weights = (layer.weight.double() / weight_scale.view(-1, 1, 1, 1)).round()
            sums = conv2d(levels - zero, weights, padding=1)
            values = (sums * (scale * weight_scale).view(-1, 1, 1) + layer.bias.double().view(-1, 1, 1)).relu()
            largest = remaining.pop(0)
            if largest is None:
                levels = values
            else:
                scale, zero = largest / 255, 0
                levels = (values / scale).round().clamp(0, 255)
        elif isinstance(layer, torch.nn.MaxPool2d):
            levels = max_pool2d(levels, 2)
    return levels


@needs_vnni
@torch.inference_mode()
def test_equals_the_arithmetic_spelled_out(features, images):
    ranges = measure_ranges(features, images.split(2))
    found = Int8Convolutions(features, Normalise("caffe").limits(), ranges)(images)
    wanted = emulated(features, images, ranges)
    # Float32 and float64 round a few activations that lie between two levels differently; a wrong scale, zero or
    # border is off by far more.
    assert (found - wanted).abs().max() < 0.02 * wanted.abs().max()
    assert (found - wanted).abs().mean() < 0.005 * wanted.abs().mean()


@needs_vnni
@torch.inference_mode()
def test_is_near_the_float_convolutions_and_does_not_depend_on_the_batch(features, images):
    quantised = Int8Convolutions(features, Normalise("caffe").limits(), measure_ranges(features, [images]))
    found, wanted = quantised(images).mean(dim=(2, 3)), features(images).mean(dim=(2, 3))
    assert torch.nn.functional.cosine_similarity(found, wanted).min() > 0.99
    assert torch.equal(found, torch.cat([quantised(one) for one in images.split(1)]).mean(dim=(2, 3)))


@torch.inference_mode()
def test_ranges_hold_nearly_every_photos_largest_activation(features, images):
    values, largest = images, []
    for layer in features:
        values = layer(values.clone())
        if isinstance(layer, torch.nn.ReLU):
            largest.append(float(values.flatten(1).max(dim=1).values.quantile(0.95)))
    assert measure_ranges(features, images.split(2)) == pytest.approx(largest[:-1], rel=1e-5)


def test_scales_that_changed_on_the_disk_are_not_used(tmp_path):
    model = CaptionModel(ModelConfig(len(TINY_WORDS), cnn_layer="pool5", conv_widths=WIDTHS, rnn_size=24))
    ranges = [round(1.5 * k, 3) for k in range(12)]
    _store_ranges(ranges, tmp_path / "scales.json")
    assert _stored_ranges(tmp_path / "scales.json", model) == ranges
    text = (tmp_path / "scales.json").read_text()
    for changed in (
        text.replace("16.5", "19.5"),
        text.replace("[0.0, 1.5", "[1.5, 0.0"),
        text.partition(', "sum"')[0] + "}",
    ):
        assert changed != text
        (tmp_path / "scales.json").write_text(changed)
        assert _stored_ranges(tmp_path / "scales.json", model) is None


def test_the_shipped_scales_are_whole():
    (shipped,) = ASSETS.glob("int8-*.json")
    content = json.loads(shipped.read_text())
    assert content["sum"] == zlib.crc32(struct.pack("<12d", *content["ranges"]))


@needs_vnni
@pytest.mark.parametrize("cnn_layer", ["pool5", "fc7"])
def test_scales_are_measured_once_per_model_and_kept(cnn_layer, command, tmp_path, monkeypatch, photos):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    torch.manual_seed(3)
    config = ModelConfig(len(TINY_WORDS), cnn_layer=cnn_layer, conv_widths=WIDTHS, fc_width=20, rnn_size=24)
    save_checkpoint(tmp_path / "m.pt", Checkpoint(config, Vocab(TINY_WORDS), CaptionModel(config).state_dict()))
    arguments = ["--model", tmp_path / "m.pt", "--image_folder", photos, "--gpuid", -1, "--vis_dir", ""]
    first = command("eval", *arguments, "--precision", "int8")
    assert first.returncode == 0, first.stderr
    assert "measuring" in first.stderr
    (kept,) = (tmp_path / "cache/captioner").iterdir()
    assert len(json.loads(kept.read_text())["ranges"]) == 12
    again = command("eval", *arguments, "--precision", "int8", "--batch_size", 3)
    assert "measuring" not in again.stderr
    assert again.stdout == first.stdout
    kept.write_text("{")  # damaged: measured anew, not refused
    assert command("eval", *arguments, "--precision", "int8").stdout == first.stdout
    assert len(json.loads(kept.read_text())["ranges"]) == 12


@needs_vnni
def test_the_bundled_model_brings_its_scales(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))

    def no_photos(_count):
        raise AssertionError("photos were asked for")

    checkpoint = load_checkpoint(bundled_model_path())
    for precision in ("int8", "auto"):  # with known scales, 8 bits are the default
        captioner = make_captioner([checkpoint], torch.device("cpu"), precision, no_photos)
        assert isinstance(captioner.models[0].encoder.features, Int8Convolutions)
    checkpoint.decoding["precision"] = "fp32"  # as of imported models
    captioner = make_captioner([checkpoint], torch.device("cpu"), "auto", no_photos)
    assert next(captioner.models[0].encoder.features.parameters()).dtype == torch.float32
    assert not list(tmp_path.iterdir())
    assert len(list(ASSETS.glob("int8-*.json"))) == 1


@needs_vnni
@torch.inference_mode()
def test_real_photos_keep_their_features(shared, tmp_path, monkeypatch):
    from captioner.data.images import read_image
    from captioner.data.listing import list_images

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    paths = list_images(shared / "data/flickr8k_originals/images")[:6]
    pixels = torch.stack([torch.from_numpy(read_image(path)) for path in paths])
    checkpoint = load_checkpoint(bundled_model_path())
    wanted = build_model(checkpoint).cnn_features(pixels)
    captioner = make_captioner([checkpoint], torch.device("cpu"), "int8", lambda _count: [])
    found = captioner.models[0].cnn_features(pixels)
    assert torch.nn.functional.cosine_similarity(found.float(), wanted).min() > 0.998


def test_refused_where_it_would_be_slow_or_wrong(monkeypatch):
    with pytest.raises(InputError, match="for CPUs"):
        require_int8(torch.device("cuda"))
    monkeypatch.setattr(torch.cpu, "_is_vnni_supported", lambda: False)
    with pytest.raises(InputError, match="VNNI"):
        require_int8(torch.device("cpu"))
