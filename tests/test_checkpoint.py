"""Checkpoints that are damaged, of wrong types or of absurd sizes: one line each; and what is sound loads."""

import math
from pathlib import Path

import pytest
import torch
from test_hostile_eval import save_model

from captioner.errors import InputError
from captioner.model.checkpoint import load_checkpoint, save_checkpoint


@pytest.fixture
def model(tmp_path: Path) -> Path:
    save_model(tmp_path / "model.pt")
    return tmp_path / "model.pt"


def test_flipped_bytes_of_weights_are_noticed(model: Path) -> None:
    data = bytearray(model.read_bytes())
    weights = load_checkpoint(model).state_dict["decoder.lstm.weight_ih_l0"].numpy().tobytes()
    place = data.index(weights)
    for offset in range(0, len(weights), 7):
        data[place + offset] ^= 1
    model.write_bytes(data)
    with pytest.raises(InputError, match="model.pt: its weights are not those that were saved"):
        load_checkpoint(model)


@pytest.mark.parametrize("dtype", ["float32", "float16", "int8"])
def test_what_is_saved_loads_and_older_files_without_a_digest_do_too(dtype: str, model: Path) -> None:
    save_checkpoint(model, load_checkpoint(model), dtype)
    load_checkpoint(model)
    content = torch.load(model, weights_only=True)
    del content["weights_digest"]
    torch.save(content, model)
    load_checkpoint(model)


def test_equal_models_are_equal_files(model: Path) -> None:
    """Whatever of them is one object by chance, as in a run that was not killed."""
    checkpoint = load_checkpoint(model)
    word = "".join(["do", "g"])
    rows = [{"caption": word, "words": [word, "".join(["do", "g"])]}] * 2
    checkpoint.history.val_predictions = rows
    save_checkpoint(model, checkpoint)
    before = model.read_bytes()
    save_checkpoint(model, load_checkpoint(model))
    assert model.read_bytes() == before


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_weights_that_are_not_finite_are_refused(bad: float, model: Path) -> None:
    checkpoint = load_checkpoint(model)
    checkpoint.state_dict["decoder.output.bias"][1] = bad
    save_checkpoint(model, checkpoint)
    with pytest.raises(InputError, match="decoder.output.bias: 1 of 4 weights are not finite"):
        load_checkpoint(model)


FIELDS = {
    ("config", "max_length"): [10**9, -1, 0, "16", None, 2.5, True],
    ("config", "rnn_size"): [10**9, "x"],
    ("config", "conv_widths"): [[10**9] * 13, 3, ["a"] * 13],
    ("config",): [None, 5, []],
    ("vocab",): [None, [], {"ix_to_word": 3}, {"ix_to_word": {"1": "a"}, "tokenizer": ["x"]}],
    ("state_dict",): [
        None,
        [1],
        {1: 2},
        {"a": "b"},
        {"a": {"values": 1, "scale": 2}},
        {"a": {"x": torch.ones(1), 5: torch.ones(1)}},
    ],
    ("opt",): [None, 7, {"batch_size": "many"}, {"input_h5": 3}, {"a": {1, 2}}],
    ("iteration",): ["7", -1, 1.5, None, 2**70],
    ("loss_history",): [None, {"a": 1}, {1: "b"}, [1]],
    ("val_lang_stats_history",): [{1: {2: 3}}, {1: 5}],
    ("val_predictions",): [{}, [1]],
    ("best_score",): ["best", []],
    ("decoding",): [None, [], {1: 2}],
    ("format_version",): [None, [], 10**9, torch.ones(2), 1.0, True],
}


@pytest.mark.parametrize(("keys", "value"), [(keys, value) for keys, values in FIELDS.items() for value in values])
def test_fields_of_a_wrong_kind_are_one_line(keys: tuple[str, ...], value: object, model: Path) -> None:
    content = torch.load(model, weights_only=True)
    owner = content
    for key in keys[:-1]:
        owner = owner[key]
    owner[keys[-1]] = value
    torch.save(content, model)
    with pytest.raises(InputError) as refused:
        load_checkpoint(model)
    assert str(refused.value).startswith(f"{model}: ") and len(str(refused.value)) < 500
