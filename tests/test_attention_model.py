"""A whole attending model: its grid, its config, its file, and its captions."""

import dataclasses

import pytest
import torch

from captioner.data.batch import PixelInputs
from captioner.data.vocabulary import Vocab
from captioner.errors import InputError
from captioner.inference.explain import heat_maps
from captioner.model.caption_model import CaptionModel, build_model
from captioner.model.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from captioner.model.config import ModelConfig
from captioner.model.encoder import GridEmbedding

WORDS = ["a", "dog", "cat", "runs", "UNK"]
CONFIG = ModelConfig(
    len(WORDS), 6, encoding_size=6, rnn_size=8, cnn_layer="pool5", conv_widths=(3,) * 13,
    decoder="attention", attention_heads=2, drop_prob_words=0.1, drop_prob_features=0.0,
)  # fmt: skip


@pytest.fixture
def checkpoint() -> Checkpoint:
    torch.manual_seed(5)
    return Checkpoint(CONFIG, Vocab(WORDS), CaptionModel(CONFIG).state_dict())


def test_the_grid_is_that_whose_average_is_pool5(checkpoint):
    attending = build_model(checkpoint)
    averaging = CaptionModel(dataclasses.replace(CONFIG, decoder="lstm"))
    cnn = {name: value for name, value in attending.encoder.state_dict().items() if name.startswith("features.")}
    averaging.encoder.load_state_dict(cnn, strict=False)
    images = torch.randint(0, 256, (2, 3, 256, 256), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    grid = attending.cnn_features(images)
    assert grid.shape == (2, 49, 3)
    torch.testing.assert_close(grid.mean(1), averaging.cnn_features(images))
    # Row by row: cell 7·y + x of the grid is row y, column x of the last block.
    last = attending.encoder.features(attending.normalise(images[:, :, 15:239, 15:239]))
    torch.testing.assert_close(grid[:, 7 * 2 + 5], last[:, :, 2, 5])
    assert attending.encode(PixelInputs(images)).shape == (2, 49, 6)


def test_conv5_3_is_the_grid_before_the_last_pooling(checkpoint, tmp_path):
    pooled = build_model(checkpoint)
    config = dataclasses.replace(CONFIG, cnn_layer="conv5_3")
    finer = CaptionModel(config).eval()
    finer.encoder.features.load_state_dict(pooled.encoder.features.state_dict())
    images = torch.randint(0, 256, (2, 3, 256, 256), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        grid = finer.cnn_features(images)
        # Row by row: cell 14·y + x is row y, column x.
        cells = torch.nn.functional.max_pool2d(grid.transpose(1, 2).unflatten(2, (14, 14)), 2)
        torch.testing.assert_close(cells.flatten(2).transpose(1, 2), pooled.cnn_features(images))
        torch.testing.assert_close(finer.encode_features(finer.last_block_inputs(images)), finer.encode_features(grid))
        heat = heat_maps(finer, finer.last_block(images), [[1, 2], [3]])
    assert [[len(of_word) for of_word in of_image] for of_image in heat] == [[196, 196], [196]]
    save_checkpoint(tmp_path / "model.pt", Checkpoint(config, Vocab(WORDS), finer.state_dict()))
    again = build_model(load_checkpoint(tmp_path / "model.pt"))
    torch.testing.assert_close(again.encode_features(grid), finer.encode_features(grid))


def test_the_embedding_of_a_grid_is_its_formula_and_has_finite_gradients():
    torch.manual_seed(0)
    embedding = GridEmbedding(49, 4, 6, 0.5).double().eval()
    with torch.no_grad():
        embedding.scale.copy_(torch.tensor([0.5, 1.0, 2.0, 0.1]))
        embedding.norm.weight.normal_()
        embedding.norm.bias.normal_()
    grids = 10 * torch.rand(2, 49, 4).double()
    grids[0] = 0
    grids.requires_grad_()
    found = embedding(grids)
    roots = grids.detach().numpy() ** 0.5 * embedding.scale.numpy()
    sums = torch.from_numpy(roots) @ embedding.project.weight.T + embedding.project.bias + embedding.position
    centred = sums - sums.mean(2, keepdim=True)
    expected = centred / (centred.square().mean(2, keepdim=True) + 1e-5).sqrt()
    torch.testing.assert_close(found, expected * embedding.norm.weight + embedding.norm.bias)
    found.square().sum().backward()
    assert grids.grad is not None and bool(grids.grad.isfinite().all()) and bool(grids.grad[1].abs().sum() > 0)
    assert bool((grids.grad[0] == 0).all())
    assert torch.equal(embedding(grids), embedding(grids))
    assert not torch.equal(embedding.train()(grids), embedding(grids))


@pytest.mark.parametrize("dtype", ["float32", "float16", "int8"])
def test_a_file_brings_it_back(checkpoint, dtype, tmp_path):
    save_checkpoint(tmp_path / "model.pt", checkpoint, dtype)
    assert torch.load(tmp_path / "model.pt", weights_only=True)["format_version"] == 2
    loaded = load_checkpoint(tmp_path / "model.pt")
    assert loaded.config == CONFIG
    for name, tensor in build_model(loaded).state_dict().items():
        tolerance = {"float32": 0.0, "float16": 1e-3, "int8": 0.5 / 127 + 1e-6}[dtype]
        error = (tensor - checkpoint.state_dict[name]).abs().max()
        assert error <= tolerance * checkpoint.state_dict[name].abs().max()


def test_files_of_plain_models_stay_as_older_versions_read_them(tmp_path):
    config = dataclasses.replace(CONFIG, decoder="lstm", attention_heads=8, drop_prob_words=0.3, drop_prob_features=0.2)
    save_checkpoint(tmp_path / "model.pt", Checkpoint(config, Vocab(WORDS), CaptionModel(config).state_dict()))
    content = torch.load(tmp_path / "model.pt", weights_only=True)
    assert content["format_version"] == 1
    fields = "cnn_layer cnn_pixels conv_widths drop_prob_lm encoding_size fc_width max_length num_layers rnn_size"
    assert sorted(content["config"]) == [*fields.split(), "vocab_size"]
    assert load_checkpoint(tmp_path / "model.pt").config == config


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        ({"decoder": "transformer"}, "decoder is 'transformer'"),
        ({"cnn_layer": "fc7"}, "looks at a grid, not at fc7"),
        ({"decoder": "lstm", "cnn_layer": "conv5_3"}, "sees one vector, conv5_3 is a grid"),
        ({"num_layers": 2}, "two LSTMs of one layer"),
        ({"attention_heads": 3}, "rnn_size 8 is no multiple of the 3 attention heads"),
        ({"attention_heads": 0}, "attention_heads is 0"),
        ({"drop_prob_words": 1.0}, "drop_prob_words is 1.0"),
        ({"drop_prob_features": "x"}, "drop_prob_features is 'x'"),
    ],
)
def test_configs_that_no_model_can_have_are_refused(wrong, named):
    with pytest.raises(InputError, match=f"^F.pt: .*{named}"):
        ModelConfig.from_dict({**CONFIG.to_dict(), **wrong}, "F.pt")
