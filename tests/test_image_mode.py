"""What becomes of pictures that are no squares goes from the dataset into the model, and on to what it captions."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import captioner
from captioner.data.images import read_image
from captioner.errors import InputError
from captioner.model.checkpoint import load_checkpoint


@pytest.fixture(scope="module")
def cropped(tiny_dataset, tmp_path_factory) -> list[str]:
    """Options of a dataset that says its pictures were cropped."""
    h5, described = tiny_dataset
    path = tmp_path_factory.mktemp("cropped") / "data.json"
    path.write_text(json.dumps({**json.loads(described.read_text()), "image_mode": "crop"}))
    return ["--input_h5", str(h5), "--input_json", str(path)]


@pytest.fixture(scope="module")
def model(cropped, tiny_model, command, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    start = ["--start_from", tiny_model, "--max_iters", 0, "--num_workers", 0, "--checkpoint_path", folder]
    done = command("train", *cropped, *start)
    assert done.returncode == 0, done.stderr
    return folder / "model_id.pt"


@pytest.fixture(scope="module")
def photo(tmp_path_factory) -> Path:
    """Its middle and its sides differ."""
    path = tmp_path_factory.mktemp("photo") / "wide.png"
    small = np.random.default_rng(3).integers(0, 256, (2, 6, 3), dtype=np.uint8)
    Image.fromarray(small).resize((600, 256), Image.Resampling.BICUBIC).save(path)
    return path


def logprobs(model: Path, picture: object) -> list[float]:
    return captioner.load_model(model, device="cpu", precision="fp32").logprob(picture, ["a red picture", "it is"])


def test_the_model_crops_what_it_captions(model, tiny_model, photo, command):
    assert load_checkpoint(model).config.image_mode == "crop"
    middle = read_image(photo, "crop").transpose(1, 2, 0)
    assert logprobs(model, photo) == pytest.approx(logprobs(tiny_model, middle), abs=1e-5)
    assert logprobs(model, photo) != pytest.approx(logprobs(tiny_model, photo), abs=1e-3)
    told = command("convert", "--inspect", model)
    assert "image mode" in told.stdout and "crop" in told.stdout
    folder = photo.parent / "squares"
    folder.mkdir()
    Image.fromarray(middle).save(folder / "wide.png")
    of_file, of_square = (
        command("eval", "--model", model, "--image_folder", path, "--dump_images", 0, "--gpuid", -1).stdout
        for path in (photo.parent, folder)
    )
    assert of_file == of_square != ""


def test_models_without_a_mode_squash_and_say_nothing_of_it(tiny_model):
    checkpoint = load_checkpoint(tiny_model)
    assert checkpoint.config.image_mode == "squash" and "image_mode" not in checkpoint.config.to_dict()


def test_models_and_data_of_two_modes(model, tiny_model, tiny_dataset, cropped, command, tmp_path):
    with pytest.raises(InputError, match="in the mode crop, .* on the mode squash"):
        captioner.load_model([tiny_model, model], device="cpu")
    squashed = ["--input_h5", tiny_dataset[0], "--input_json", tiny_dataset[1]]
    done = command("eval", "--model", model, *squashed, "--dump_images", 0, "--gpuid", -1, "--num_images", 2)
    assert done.returncode == 0 and "but the model was trained on the mode crop" in done.stderr
    shutil.copytree(model.parent, tmp_path / "run")
    done = command(
        "train", *squashed, "--start_from", tiny_model, "--max_iters", 1, "--resume", "auto",
        "--checkpoint_path", tmp_path / "run",
    )  # fmt: skip
    assert done.returncode == 1 and "prepare the data with --image_mode crop" in done.stderr
