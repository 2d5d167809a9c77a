"""Where the model looked: against finite differences, and on photos whose halves are known."""

import base64
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import captioner
from captioner.data.batch import PixelInputs
from captioner.inference.explain import heat_maps, word_heat
from captioner.model.caption_model import CaptionModel
from captioner.model.config import ModelConfig

EXAMPLES = Path(__file__).parents[1] / "examples"


def _model(cnn_layer: str) -> CaptionModel:
    torch.manual_seed(3)
    config = ModelConfig(
        vocab_size=9, encoding_size=10, rnn_size=12, cnn_layer=cnn_layer, conv_widths=(6,) * 13, fc_width=14
    )
    return CaptionModel(config).double().eval()


@pytest.mark.parametrize("cnn_layer", ["pool5", "fc7"])
def test_heat_is_how_a_words_log_probability_changes_with_a_cell(cnn_layer):
    model = _model(cnn_layer)
    grid = torch.rand(2, 6, 7, 7, dtype=torch.float64)
    labels = torch.tensor([[4, 2, 9], [1, 5, 0]])
    heat = word_heat(model, grid, labels)
    assert heat.shape == (2, 3, 49)
    step = 1e-5
    for image, word, row, column in ((0, 0, 0, 0), (0, 2, 3, 6), (1, 1, 6, 2)):

        def logprob(scale: float, image=image, word=word, row=row, column=column) -> float:
            changed = grid.clone()
            changed[image, :, row, column] *= scale
            logprobs = model.decoder(model.encode_features(model.encoder.head(changed)), labels)
            return float(logprobs.detach()[image, word + 1, labels[image, word] - 1])

        slope = (logprob(1 + step) - logprob(1 - step)) / (2 * step)
        assert float(heat[image, word, 7 * row + column]) == pytest.approx(slope, rel=1e-4, abs=1e-9)


def test_where_a_model_attends_its_attention_is_the_map():
    torch.manual_seed(4)
    config = ModelConfig(
        vocab_size=9, encoding_size=10, rnn_size=12, cnn_layer="pool5", conv_widths=(6,) * 13, fc_width=1,
        decoder="attention", attention_heads=2,
    )  # fmt: skip
    model = CaptionModel(config).eval()
    images = torch.randint(0, 256, (2, 3, 256, 256), dtype=torch.uint8)
    with torch.no_grad():
        weights = model.decoder.attention(model.encode(PixelInputs(images)), torch.tensor([[1, 2], [7, 0]]))
    maps = heat_maps(model, model.last_block(images), [[1, 2], [7]])
    for found, wanted in ((maps[0][0], weights[0, 0]), (maps[0][1], weights[0, 1]), (maps[1][0], weights[1, 0])):
        assert np.frombuffer(found, np.uint8) == pytest.approx((255 * wanted / wanted.max()).numpy(), abs=1)


def test_captions_of_different_lengths_get_as_many_maps_as_words():
    images = torch.randint(0, 256, (3, 3, 256, 256), dtype=torch.uint8)
    model = _model("pool5").float()
    grid = model.last_block(images)
    maps = heat_maps(model, grid, [[1, 2, 3], [], [4]])
    assert [[len(heat) for heat in found] for found in maps] == [[49] * 3, [], [49]]
    assert heat_maps(model, grid[:1], [[]]) == [[]]
    alone = heat_maps(model, grid[2:], [[4]])  # batching does not matter
    assert np.frombuffer(alone[0][0], np.uint8) == pytest.approx(np.frombuffer(maps[2][0], np.uint8), abs=1)


def test_explaining_computes_the_cnn_once(tiny_model):
    model = captioner.load_model(tiny_model, device="cpu", precision="fp32")
    batches = []
    model.captioner.models[0].encoder.features.register_forward_hook(lambda *_: batches.append(1))
    explained = model.caption(EXAMPLES / "cat.jpg", explain=True)
    assert explained.heat and len(batches) == 1
    assert explained.text == model.caption(EXAMPLES / "cat.jpg").text


@pytest.fixture(scope="module")
def bundled():
    return captioner.load_model(device="cpu", precision="fp32")


@pytest.mark.parametrize(
    ("animal", "other"),
    [("cat", None), ("raccoon", None), ("cat", "rocket"), ("raccoon", "bridge"), ("raccoon", "flower")],
)
def test_what_is_named_is_seen_in_the_half_where_it_is(bundled, animal, other):
    """The model names the animal first; the other half is grey, or a photo of something that it looks at less."""

    def half(name: str | None) -> np.ndarray:
        if name is None:
            return np.full((256, 128, 3), 128, np.uint8)
        with Image.open(EXAMPLES / f"{name}.jpg") as photo:
            return np.asarray(photo.convert("RGB").resize((128, 256)))

    model = bundled.captioner.models[0]
    pictures = [np.concatenate(halves, 1) for halves in ((half(animal), half(other)), (half(other), half(animal)))]
    images = torch.tensor(np.stack(pictures)).permute(0, 3, 1, 2)
    with torch.no_grad():
        grid = model.last_block(images)
    a_cat = torch.tensor([[bundled.vocab.words.index(word) + 1 for word in ("a", "cat")]] * 2)
    left, right = word_heat(model, grid, a_cat)[:, 1].clamp(min=0).view(2, 14, 14)
    assert left[:, :6].sum() > 1.5 * left[:, 8:].sum()
    assert right[:, 8:].sum() > 1.5 * right[:, :6].sum()


def test_caption_eval_writes_the_maps_for_the_page(tiny_model, command, tmp_path):
    shutil.copy(EXAMPLES / "cat.jpg", tmp_path)
    argv = ["--model", tiny_model, "--image_folder", tmp_path, "--gpuid", -1, "--precision", "fp32", "--n_best", 2]
    assert command("eval", *argv, "--vis_dir", tmp_path / "vis", "--explain", 1).returncode == 0
    (row,) = json.loads((tmp_path / "vis" / "vis.json").read_text())
    (caption,) = captioner.load_model(tiny_model, device="cpu", precision="fp32").caption(
        [tmp_path / "cat.jpg"], n_best=2, explain=True
    )
    assert row["words"] and [base64.b64decode(word["heat"]) for word in row["words"]] == list(caption.heat)
    assert all(len(heat) == 49 for heat in caption.heat)

    assert command("eval", *argv, "--vis_dir", tmp_path / "plain").returncode == 0
    (plain,) = json.loads((tmp_path / "plain" / "vis.json").read_text())
    assert plain["caption"] == row["caption"] and not any("heat" in word for word in plain["words"])
