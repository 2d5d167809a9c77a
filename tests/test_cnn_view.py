"""How much of a picture the CNN sees: its centre, or all of it; the model says which, and everything goes by that."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import captioner
from captioner.data.crops import whole
from captioner.model.caption_model import CaptionModel
from captioner.model.checkpoint import load_checkpoint, save_checkpoint


@pytest.fixture(scope="module")
def seeing_all(tiny_model, tmp_path_factory) -> Path:
    """The tiny model, as if it had learned from whole pictures."""
    path = tmp_path_factory.mktemp("whole") / "model.pt"
    checkpoint = load_checkpoint(tiny_model)
    save_checkpoint(
        path, dataclasses.replace(checkpoint, config=dataclasses.replace(checkpoint.config, cnn_view="whole"))
    )
    return path


def test_the_whole_picture_is_made_smaller_as_another_program_does():
    pixels = np.random.default_rng(0).integers(0, 256, (2, 256, 256, 3), dtype=np.uint8)
    smaller = whole(torch.from_numpy(pixels).permute(0, 3, 1, 2))
    assert smaller.shape == (2, 3, 224, 224) and smaller.dtype == torch.uint8
    for image, expected in zip(smaller, pixels, strict=True):
        resized = np.asarray(Image.fromarray(expected).resize((224, 224), Image.Resampling.BILINEAR)).astype(int)
        assert np.abs(image.permute(1, 2, 0).numpy() - resized).max() <= 1


def test_what_lies_at_the_border_is_seen_by_a_model_of_the_whole_picture_only(tiny_model, seeing_all):
    plain, framed = np.full((256, 256, 3), 120, np.uint8), np.full((256, 256, 3), 120, np.uint8)
    framed[:10] = framed[-10:] = (250, 20, 20)
    texts = ["a red picture", "it is"]
    for model, differs in ((tiny_model, False), (seeing_all, True)):
        judge = captioner.load_model(model, device="cpu", precision="fp32")
        same = judge.logprob(plain, texts) == pytest.approx(judge.logprob(framed, texts), abs=1e-6)
        assert same is not differs


def test_it_ignores_offsets_and_is_what_the_features_are_of(tiny_model, seeing_all):
    centre, model = (
        CaptionModel(load_checkpoint(path).config).eval() for path in (tiny_model, seeing_all)
    )  # fmt: skip
    centre.load_state_dict(model.state_dict())
    images = torch.randint(0, 256, (2, 3, 256, 256), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    framed = torch.zeros_like(images)
    framed[:, :, 15:239, 15:239] = whole(images)  # what the centre of these is
    with torch.no_grad():
        features = model.cnn_features(images, torch.tensor([[0, 0], [31, 3]]))
        torch.testing.assert_close(features, centre.cnn_features(framed))
        torch.testing.assert_close(model.last_block_inputs(images), centre.last_block_inputs(framed))
        torch.testing.assert_close(model.last_block(images), centre.last_block(framed))


def test_files_say_it_only_where_it_is_not_the_original_s(tiny_model, seeing_all, command):
    assert "cnn_view" not in load_checkpoint(tiny_model).config.to_dict()
    assert load_checkpoint(seeing_all).config.cnn_view == "whole"
    told = command("convert", "--inspect", seeing_all)
    assert "sees of a picture" in told.stdout and "whole" in told.stdout


def test_training_with_it(tiny_dataset, tiny_cnn, seeing_all, command, tmp_path):
    data = ["--input_h5", tiny_dataset[0], "--input_json", tiny_dataset[1], "--num_workers", 0, "--gpuid", -1]
    new = [*data, "--cnn_model", tiny_cnn, "--cnn_pixels", "caffe", "--rnn_size", 8, "--input_encoding_size", 8]
    new += [
        "--cnn_layer",
        "pool5",
        "--max_iters",
        2,
        "--val_images_use",
        2,
        "--losses_log_every",
        1,
        "--cnn_view",
        "whole",
    ]
    done = command("train", *new, "--checkpoint_path", tmp_path / "looked", "--shuffle", 0)
    assert done.returncode == 0, done.stderr
    cached = command("train", *new, "--checkpoint_path", tmp_path / "cached", "--shuffle", 0, "--cache_features", 1)
    assert cached.returncode == 0, cached.stderr
    looked, remembered = (load_checkpoint(tmp_path / name / "model_id.pt") for name in ("looked", "cached"))
    assert looked.config.cnn_view == "whole" and len(looked.history.loss_history) == 2
    assert looked.history.loss_history == pytest.approx(remembered.history.loss_history, rel=1e-4)
    crops = command("train", *new, "--checkpoint_path", tmp_path / "crops", "--shuffle", 0, "--cache_features", 3)
    assert crops.returncode == 0 and "features: using" in crops.stderr + crops.stdout  # one view is all there is
    start = ["--start_from", seeing_all, "--max_iters", 1, "--checkpoint_path", tmp_path / "again"]
    refused = command("train", *data, *start, "--cnn_view", "centre")
    assert refused.returncode == 1 and f"--cnn_view centre: {seeing_all} has whole" in refused.stderr


def test_rows_say_what_their_heat_is_over(seeing_all, tiny_model, command, tmp_path):
    folder = tmp_path / "photos"
    folder.mkdir()
    Image.new("RGB", (30, 20), (200, 30, 30)).save(folder / "red.png")
    for model, view in ((seeing_all, "whole"), (tiny_model, "centre")):
        argv = ["--model", model, "--image_folder", folder, "--dump_images", 0, "--gpuid", -1, "--max_words", 2]
        output = tmp_path / f"{view}.json"
        done = command("eval", *argv, "--explain", 1, "--output", output)
        assert done.returncode == 0, done.stderr
        (row,) = json.loads(output.read_text())
        assert row["cnn_view"] == view
        done = command("eval", *argv, "--output", tmp_path / f"{view}-plain.json")
        assert "cnn_view" not in json.loads((tmp_path / f"{view}-plain.json").read_text())[0]
