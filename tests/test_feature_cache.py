"""Cached features: number formats, mirrored photos, and what the last block sees, from which it is fine-tuned."""

import os
import re
import shutil
import signal

import numpy as np
import pytest
import torch
from test_train import assert_same_weights

from captioner.data.batch import FeatureInputs, KnownCaptions, PixelInputs
from captioner.data.dataset import Dataset
from captioner.errors import InputError
from captioner.model.caption_model import CaptionModel
from captioner.model.checkpoint import load_checkpoint
from captioner.model.config import ModelConfig
from captioner.runtime.processes import Processes
from captioner.training import feature_cache
from captioner.training.feature_cache import CacheForm, cached_features

CPU = torch.device("cpu")


def make_model(tiny_cnn, decoder="attention") -> CaptionModel:
    torch.manual_seed(0)
    config = ModelConfig(
        vocab_size=10, encoding_size=16, rnn_size=24, cnn_layer="pool5", conv_widths=(12,) * 13, decoder=decoder
    )
    model = CaptionModel(config)
    model.encoder.load_state_dict(torch.load(tiny_cnn, weights_only=True), strict=False)
    return model.eval()


@pytest.fixture
def cache(tiny_dataset, tiny_cnn, tmp_path):
    dataset, model = Dataset.open(*tiny_dataset), make_model(tiny_cnn)

    def make(form: CacheForm):
        return cached_features(
            model,
            dataset,
            tmp_path,
            form,
            device=CPU,
            dtype=torch.float32,
            num_workers=0,
            processes=Processes(),
            stop_signal=lambda: 0,
        )

    return make


FEW = np.array([3, 20])


@pytest.fixture
def images(tiny_dataset) -> torch.Tensor:
    return torch.from_numpy(Dataset.open(*tiny_dataset).images[FEW])


@pytest.mark.parametrize("last_block", [False, True])
def test_what_is_read_is_what_the_cnn_makes_of_photos_and_of_mirrored_ones(last_block, cache, tiny_cnn, images):
    model = make_model(tiny_cnn)
    compute = model.last_block_inputs if last_block else model.cnn_features
    corner = torch.zeros(2, 2, dtype=torch.int64)
    with torch.no_grad():
        expected = {
            (0, False): compute(images),
            (1, False): compute(images, corner),
            (0, True): compute(images.flip(3)),
            (1, True): compute(images.flip(3), corner),
        }
    features = cache(CacheForm(2, mirrored=True, last_block=last_block, kind="float32"))
    for (crop, mirrored), values in expected.items():
        found = features.read(FEW, np.array([crop, crop]), np.array([mirrored, mirrored]))
        assert torch.allclose(found, values, rtol=1e-4, atol=1e-3)
    mixed = features.read(FEW, np.array([1, 0]), np.array([False, True]))
    assert torch.equal(mixed[0], features.read(FEW[:1], 1)[0])
    assert torch.allclose(mixed[1], expected[0, True][1], rtol=1e-4, atol=1e-3)


def test_without_mirrored_photos_their_grids_are_mirrored(cache):
    features = cache(CacheForm(1))
    found = features.read(FEW, 0, np.array([True, False])).unflatten(1, (7, 7))
    plain = features.read(FEW).unflatten(1, (7, 7))
    assert torch.equal(found[0], plain[0].flip(1)) and torch.equal(found[1], plain[1])


@pytest.mark.parametrize("last_block", [False, True])
def test_eight_bits_are_off_by_half_a_step_of_the_root_at_most(last_block, cache):
    exact = cache(CacheForm(1, last_block=last_block, kind="float32")).read(np.arange(28)).sqrt()
    features = cache(CacheForm(1, last_block=last_block, kind="uint8"))
    assert features.values.dtype == np.uint8 and features.scale is not None
    assert features.values.max() <= 255 / 1.2 + 1  # all 28 photos are among those whose values set the scale
    wrong = (features.read(np.arange(28)).sqrt() - exact).abs()
    assert bool((wrong <= torch.from_numpy(features.scale) * 0.501 + 1e-5).all())


def test_the_last_block_learns_from_its_inputs_as_from_pixels(tiny_cnn, images):
    captions = KnownCaptions(torch.tensor([[1, 2, 0], [3, 4, 5]]), torch.tensor([0, 1]))
    found = {}
    for kind in ("pixels", "cached"):
        model = make_model(tiny_cnn)
        with torch.no_grad():
            inputs = PixelInputs(images) if kind == "pixels" else FeatureInputs(model.last_block_inputs(images))
        loss, _ = model(inputs, captions)
        loss.backward()
        parameters = model.cnn_parameters(from_block=5)
        assert len(parameters) == 6 and all(p.grad is not None and p.grad.abs().max() > 0 for p in parameters)
        found[kind] = (loss.detach(), [p.grad for p in parameters])
    assert torch.allclose(found["pixels"][0], found["cached"][0], rtol=1e-6)
    for one, other in zip(found["pixels"][1], found["cached"][1], strict=True):
        assert torch.allclose(one, other, rtol=1e-4, atol=1e-7)


SMALL = ["--attention_heads", 2, "--rnn_size", 24, "--input_encoding_size", 16, "--gpuid", -1, "--batch_size", 4]
SMALL += ["--seq_per_img", 2, "--precision", "fp32", "--num_workers", 0, "--save_checkpoint_every", 4]
FINETUNE = ["--decoder", "attention", "--finetune_cnn_after", 2, "--finetune_cnn_layers", 5, "--cache_features", 1]
FINETUNE += ["--cache_type", "uint8", "--augment_flip", 0.5, "--flip_features", "grid", "--cnn_learning_rate", 1e-3]


@pytest.fixture
def data(tiny_dataset, tiny_cnn, tmp_path):
    for path in tiny_dataset:
        shutil.copy(path, tmp_path)
    return ["--input_h5", tmp_path / "data.h5", "--input_json", tmp_path / "data.json", "--cnn_model", tiny_cnn, *SMALL]


def test_fine_tuning_from_the_cache_changes_the_last_block_and_resumes_exactly(data, tiny_cnn, command, tmp_path):
    logs = []
    for folder, lasts in (("once", [6]), ("twice", [3, 6])):
        for last in lasts:
            argv = [*data, *FINETUNE, "--max_iters", last, "--resume", "auto", "--checkpoint_path", tmp_path / folder]
            done = command("train", *argv)
            assert done.returncode == 0, done.stderr
            logs.append(done.stderr)
    assert_same_weights(tmp_path / "once" / "model_id_last.pt", tmp_path / "twice" / "model_id_last.pt")
    assert "features: computing 28 images × 1 view(s) into" in logs[0]
    # The trained block is no part of the file's name: a run that goes on finds it again.
    assert all(re.search(r"features: using \S+/features-block5-\S+\.npy", log) for log in logs[1:])
    assert len(list(tmp_path.glob("features-*"))) == 1
    before = torch.load(tiny_cnn, weights_only=True)
    after = load_checkpoint(tmp_path / "once" / "model_id_last.pt").state_dict
    moved = {name for name, weights in before.items() if not torch.equal(after[f"encoder.{name}"], weights)}
    assert moved == {f"features.{i}.{kind}" for i in (24, 26, 28) for kind in ("weight", "bias")}
    planned = command("train", *data, *FINETUNE, "--max_iters", 6, "--plan", 1)
    assert f"{28 * (14 * 14 * 12 + 4) / 1e3:.1f} kB of cached features" in planned.stdout, planned.stdout


WRONG = {
    "lower blocks": (
        ["--finetune_cnn_after", 0, "--cache_features", 1],
        "what is cached would change from block 1 on; expected --finetune_cnn_layers 5",
    ),
    "pixels": (
        ["--augment_rotation", 5, "--cache_features", 1],
        "change pixels, which --cache_features does not look at",
    ),
    "vectors": (
        ["--cnn_layer", "pool5", "--augment_flip", 0.5, "--cache_features", 1, "--flip_features", "grid"],
        "vectors, which have no left and right",
    ),
    "weights": (["--source_weights", "coco"], "'coco' is no weight; expected NAME=WEIGHT"),
}


@pytest.mark.parametrize("case", WRONG)
def test_contradictions_are_one_line(case, data, command, tmp_path):
    options, message = WRONG[case]
    done = command("train", *data, *options, "--max_iters", 1, "--checkpoint_path", tmp_path / "run")
    assert done.returncode == 1
    assert message in done.stderr.splitlines()[-1]


def test_a_killed_computation_goes_on_after_its_last_whole_batch(cache, tmp_path):
    form = CacheForm(1, kind="uint8")
    whole = cache(form)
    (path,) = tmp_path.glob("features-*.npy")
    written = path.read_bytes()
    start, size = np.load(path, mmap_mode="r").offset, whole.values[0].nbytes + 4
    marked = bytearray(written[: start + 20 * size])  # 20 of 28 images; batches have 16
    marked[start + 3 * size : start + 4 * size] = bytes([7]) * size
    path.unlink()
    partial = tmp_path / f".{path.name}.partial"
    partial.write_bytes(marked)
    cache(form)
    expected = bytearray(written)
    expected[start + 3 * size : start + 4 * size] = bytes([7]) * size  # was not computed again
    assert path.read_bytes() == bytes(expected) and list(tmp_path.iterdir()) == [path]
    path.unlink()
    partial.write_bytes(b"something else")
    cache(form)
    assert path.read_bytes() == written


def test_a_run_that_is_asked_to_stop_while_features_are_computed_stops_soon_and_goes_on(data, command, tmp_path):
    whole, calls = CaptionModel.cnn_features, []

    def cnn_features(self, images, offsets=None):
        calls.append(len(images))
        if len(calls) == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return whole(self, images, offsets)

    argv = [*data, "--cnn_layer", "pool5", "--cache_features", 1, "--max_iters", 2, "--checkpoint_path", tmp_path]
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(feature_cache, "BATCH_SIZE", 2)
        patched.setattr(CaptionModel, "cnn_features", cnn_features)
        stopped = command("train", *argv)
        assert stopped.returncode == 128 + signal.SIGTERM and calls == [2, 2, 2]
        assert "stopped before the first iteration; repeat the command to go on" in stopped.stderr
        done = command("train", *argv)
        assert done.returncode == 0, done.stderr
    assert calls[:14] == [2] * 14  # 28 images, each of them once
    (path,) = tmp_path.glob("features-*.npy")
    features = np.load(path)
    path.unlink()
    assert command("train", *argv).returncode == 0
    assert np.allclose(features["values"], np.load(path)["values"], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("kind", "last_block"), [("float32", False), ("float16", False), ("uint8", False), ("uint8", True)]
)
def test_a_flipped_bit_is_one_line_when_its_image_is_read(kind, last_block, cache, tmp_path):
    """In a file that stands, and in what a killed run left of one."""
    form = CacheForm(2, last_block=last_block, kind=kind)
    whole = cache(form)
    (path,) = tmp_path.glob("features-*.npy")
    written, size = path.read_bytes(), whole.values[0, 0].nbytes + 4
    place = np.load(path, mmap_mode="r").offset + (3 * 2 + 1) * size + 4 + 17  # the second crop of image 3
    damaged = bytearray(written)
    damaged[place] ^= 1
    path.write_bytes(damaged)
    features = cache(form)
    assert torch.equal(features.read(np.array([2, 3, 4])), whole.read(np.array([2, 3, 4])))  # the first crops
    with pytest.raises(InputError, match=rf"{path}: the features of image 3 are damaged .*; delete it and run again"):
        features.read(np.array([2, 3, 4]), np.array([0, 1, 1]))
    path.unlink()
    (tmp_path / f".{path.name}.partial").write_bytes(damaged[:-1])
    with pytest.raises(InputError, match="image 3 are damaged"):
        cache(form).read(FEW, 1)
    if kind == "uint8":
        damaged = bytearray(written)
        damaged[-2] ^= 1  # a scale
        path.write_bytes(damaged)
        with pytest.raises(InputError, match="not a feature cache, or a damaged one"):
            cache(form)


def test_rows_that_changed_places_are_not_taken_for_each_other(cache, tmp_path):
    cache(CacheForm(2, kind="uint8"))
    (path,) = tmp_path.glob("features-*.npy")
    rows = np.lib.format.open_memmap(path)
    rows[5, 0], rows[6, 0] = rows[6, 0].copy(), rows[5, 0].copy()
    rows.flush()
    features = cache(CacheForm(2, kind="uint8"))
    for image in (5, 6):
        features.read(np.array([image]), 1)
        with pytest.raises(InputError, match=f"image {image} are damaged"):
            features.read(np.array([image]))
