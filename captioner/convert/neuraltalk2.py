"""A train.lua checkpoint of the original neuraltalk2, as torch7.py read it, renamed to our Checkpoint.

Sources for the layout: train.lua, misc/LanguageModel.lua, misc/LSTM.lua and misc/net_utils.lua of neuraltalk2.
"""

import itertools
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch

from captioner.convert.mapped_file import Mapping, copy_float32, map_file
from captioner.convert.torch7 import TorchObject, parse_torch7
from captioner.data.vocabulary import Vocab
from captioner.errors import InputError
from captioner.model.checkpoint import Checkpoint, TrainingHistory
from captioner.model.config import ModelConfig
from captioner.model.encoder import CONV_NAMES, FC_NAMES, LAST_GRID

T = TypeVar("T")

# misc/net_utils.lua's CNN: the layers' kinds in order, and where their weights go. conv1_1 is in RGB order already.
CNN_KINDS = "CRCRP" * 2 + "CRCRCRP" * 3 + "V" + "LRD" * 2 + "LR"
CNN_WEIGHTS = (*CONV_NAMES, *FC_NAMES, "embed")
KIND_OF_CLASS = {
    "SpatialConvolution": "C",
    "SpatialConvolutionMM": "C",
    "ReLU": "R",
    "SpatialMaxPooling": "P",
    "View": "V",
    "Reshape": "V",
    "Linear": "L",
    "Dropout": "D",
}
CNN_BACKENDS = ("nn", "cudnn")
# What VGG16's layers of each kind have in common; older files lack some of these fields.
GEOMETRY = {
    "C": {"kW": 3, "kH": 3, "dW": 1, "dH": 1, "padW": 1, "padH": 1, "groups": 1},
    "P": {"kW": 2, "kH": 2, "dW": 2, "dH": 2, "padW": 0, "padH": 0},
}

# misc/LSTM.lua's annotations of the graph's nodes, per layer (counted from 1).
LSTM_WEIGHTS = {
    "i2h_{}.weight": "weight_ih_l{}",
    "h2h_{}.weight": "weight_hh_l{}",
    "i2h_{}.bias": "bias_ih_l{}",
    "h2h_{}.bias": "bias_hh_l{}",
}
GATES = [0, 1, 3, 2]  # there: input, forget, output, candidate; nn.LSTM: input, forget, candidate, output

# One number takes at least a quarter of its size in either format; more means views that overlap.
MAX_EXPANSION = 4


def load_neuraltalk2(path: str | Path) -> Checkpoint:
    """Read a .t7 checkpoint, binary or ascii, of one or more LSTM layers, with nn or cudnn layers, thin or not.

    Widths come from the file. Only the weights in use are read; clones, gradients and activations are left alone.

    Raises:
        InputError: not a whole Torch7 file, or not a checkpoint of train.lua.
    """
    return parse_neuraltalk2(map_file(Path(path)), str(path))


def parse_neuraltalk2(data: Mapping, source: str) -> Checkpoint:
    """`load_neuraltalk2` of a file's content; `source` names it in errors."""
    return to_checkpoint(parse_torch7(data, source), source, data)


def to_checkpoint(content: Any, source: str, data: Mapping) -> Checkpoint:
    """Rename what `parse_torch7` returned.

    Args:
        content: the table train.lua saved.
        source: names the file in errors.
        data: the file, which backs the arrays. Its size bounds that of all weights together, so that overlapping views
            of a small file cannot fill the memory.

    Raises:
        InputError: something is missing, of another kind or shape, or not finite.
    """
    table = _expect(content, dict, f"{source}: the file", "the table train.lua saves")
    protos = _get(table, "protos", dict, source)
    lm = _get(protos, "lm", TorchObject, f"{source}: protos")
    cnn = _get(protos, "cnn", TorchObject, f"{source}: protos")
    copy = _Copy(source, data)
    encoder, conv_widths = _encoder(cnn, copy)
    decoder = _decoder(lm, copy)
    embedding, encoding = decoder["embedding.weight"], encoder["embed.weight"]
    if embedding.shape[1] != encoding.shape[0]:
        raise InputError(
            f"{source}: the CNN's encoding has {encoding.shape[0]} values, the words' {embedding.shape[1]}"
        )
    vocab = Vocab.from_ix_to_word(
        {str(index): word for index, word in _get(table, "vocab", dict, source).items()}, source=f"{source}: vocab"
    )
    if vocab.size != len(embedding) - 1:
        raise InputError(f"{source}: {vocab.size} words in vocab, {len(embedding) - 1} in the model")
    opt = {str(key): value for key, value in _optional_table(table, "opt").items() if _is_plain(value)}
    config = ModelConfig(
        vocab_size=vocab.size,
        max_length=_positive(lm.fields, "seq_length", f"{source}: protos.lm"),
        encoding_size=embedding.shape[1],
        rnn_size=decoder["output.weight"].shape[1],
        num_layers=_positive(lm.fields, "num_layers", f"{source}: protos.lm"),
        drop_prob_lm=_probability(opt.get("drop_prob_lm")),
        cnn_layer="fc7",
        cnn_pixels="caffe",
        conv_widths=conv_widths,
        fc_width=len(encoder[f"{FC_NAMES[1]}.bias"]),
    )
    losses = _history(table, "val_loss_history")
    scores = {
        iteration: {str(name): float(value) for name, value in stats.items() if _is_number(value)}
        for iteration, stats in _iterations(table, "val_lang_stats_history")
        if isinstance(stats, dict)
    }
    iteration = table.get("iter")
    iteration = iteration if isinstance(iteration, int) else 0
    history = TrainingHistory(
        opt=opt,
        iteration=iteration,
        loss_history=_history(table, "loss_history"),
        val_loss_history=losses,
        val_lang_stats_history=scores,
        val_predictions=[
            {str(key): value for key, value in row.items() if _is_plain(value)}
            for _, row in _iterations(table, "val_predictions")
            if isinstance(row, dict)
        ],
        # train.lua's measure of the best: CIDEr where it was computed, else the negative loss.
        best_score=scores.get(iteration, {}).get("CIDEr", -losses[iteration] if iteration in losses else None),
    )
    weights = {
        **{f"encoder.{name}": torch.from_numpy(value) for name, value in encoder.items()},
        **{f"decoder.{name}": torch.from_numpy(value) for name, value in decoder.items()},
    }
    # So that captions and losses are the original's to the last digits that float32 gives.
    return Checkpoint(config, vocab, weights, history, decoding={"suppress_unk": 0, "precision": "fp32"})


class _Copy:
    """Checked float32 copies of the file's arrays, within a limit on all of them together."""

    def __init__(self, source: str, data: Mapping) -> None:
        self.source, self.data, self.bytes_left = source, data, MAX_EXPANSION * len(data)

    def __call__(self, owner: TorchObject, field: str, where: str, shape: tuple[int | None, ...]) -> np.ndarray:
        """The array `field` of a layer; a None in `shape` fits any size. (OUT, IN*9) is taken for (OUT, IN, 3, 3)."""
        where = f"{self.source}: {where}.{field}"
        values = _expect(owner.fields.get(field), np.ndarray, where, "a tensor")
        if values.dtype.kind != "f":
            raise InputError(f"{where} holds {values.dtype} numbers", expected="float or double")
        self.bytes_left -= 4 * values.size
        if self.bytes_left < 0:
            raise InputError(f"{where}: the weights up to here are larger than the file", remedy="it is damaged")
        if len(shape) == 4 and values.ndim == 2 and values.shape[1] % 9 == 0:  # SpatialConvolutionMM
            found: tuple[int, ...] = (values.shape[0], values.shape[1] // 9, 3, 3)
        else:
            found = values.shape
        if len(found) != len(shape) or any(want not in (None, have) for have, want in zip(found, shape, strict=True)):
            expected = ", ".join("OUT" if want is None else str(want) for want in shape)
            raise InputError(f"{where} has sizes {values.shape}", expected=f"({expected})")
        if 0 in found:
            raise InputError(f"{where} is empty", remedy="the checkpoint was saved without its weights")
        copied = copy_float32(values, self.data).reshape(found)
        if not (math.isfinite(copied.min()) and math.isfinite(copied.max())):
            raise InputError(f"{where} holds NaN or infinity", remedy="training diverged, or the file is damaged")
        return copied


def _encoder(cnn: TorchObject, copy: _Copy) -> tuple[dict[str, np.ndarray], tuple[int, ...]]:
    where = f"{copy.source}: protos.cnn"
    layers = list(_array_part(_get(cnn.fields, "modules", dict, where)))
    kinds = "".join(_kind(layer, f"{where} layer {i}") for i, layer in enumerate(layers, 1))
    if kinds != CNN_KINDS:
        differs = next((i for i, pair in enumerate(zip(kinds, CNN_KINDS), 1) if pair[0] != pair[1]), len(kinds))  # noqa: B905
        raise InputError(
            f"{where}: its {len(kinds)} layers are not VGG16's {len(CNN_KINDS)}; the first difference is at {differs}"
        )
    state: dict[str, np.ndarray] = {}
    widths: list[int] = []
    inputs = 3
    weighted = [
        (i, layer) for i, layer in enumerate(layers, 1) if KIND_OF_CLASS[layer.class_name.split(".")[1]] in "CL"
    ]
    for (i, layer), name in zip(weighted, CNN_WEIGHTS, strict=True):
        label = f"protos.cnn layer {i} ({layer.class_name})"
        if name in CONV_NAMES:
            shape: tuple[int | None, ...] = (None, inputs, 3, 3)
        else:
            shape = (None, inputs * LAST_GRID**2 if name == FC_NAMES[0] else inputs)
        if name == FC_NAMES[1]:
            shape = (inputs, inputs)
        state[f"{name}.weight"] = copy(layer, "weight", label, shape)
        inputs = len(state[f"{name}.weight"])
        state[f"{name}.bias"] = copy(layer, "bias", label, (inputs,))
        widths.append(inputs)
    return state, tuple(widths[: len(CONV_NAMES)])


def _kind(layer: Any, where: str) -> str:
    _expect(layer, TorchObject, where, "a layer")
    backend, _, class_name = layer.class_name.partition(".")
    kind = KIND_OF_CLASS.get(class_name)
    if kind is None or backend not in CNN_BACKENDS:
        raise InputError(f"{where} is a {layer.class_name}", expected="the layers of net_utils.build_cnn's VGG16")
    for field, expected in GEOMETRY.get(kind, {}).items():
        found = layer.fields.get(field, expected)
        if not _is_number(found) or found != expected:
            raise InputError(f"{where} has {field} {_shown(found)}", expected=f"{expected}, as in VGG16")
    return kind


def _decoder(lm: TorchObject, copy: _Copy) -> dict[str, np.ndarray]:
    where = f"{copy.source}: protos.lm"
    lookup_table = _get(lm.fields, "lookup_table", TorchObject, where)
    state = {"embedding.weight": copy(lookup_table, "weight", "protos.lm.lookup_table", (None, None))}
    ids, inputs = state["embedding.weight"].shape
    num_layers = _positive(lm.fields, "num_layers", where)
    named = dict(_annotated(_get(lm.fields, "core", TorchObject, where), where))
    names = itertools.chain(["decoder"], (f"{side}2h_{i}" for i in range(1, num_layers + 1) for side in "ih"))
    missing = next((name for name in names if name not in named), None)
    if missing:
        raise InputError(f"{where}.core has no layer annotated {missing}", expected="the graph of misc/LSTM.lua")
    state["output.weight"] = copy(named["decoder"], "weight", "protos.lm decoder", (ids, None))
    state["output.bias"] = copy(named["decoder"], "bias", "protos.lm decoder", (ids,))
    hidden = state["output.weight"].shape[1]
    for layer in range(1, num_layers + 1):
        for theirs, ours in LSTM_WEIGHTS.items():
            name, _, field = theirs.format(layer).partition(".")
            shape = {"bias": (4 * hidden,), "weight": (4 * hidden, inputs if name.startswith("i2h") else hidden)}[field]
            values = copy(named[name], field, f"protos.lm {name}", shape)
            values = values.reshape(4, hidden, *values.shape[1:])[GATES].reshape(values.shape)
            state[f"lstm.{ours.format(layer - 1)}"] = values
        inputs = hidden
    return state


def _annotated(core: TorchObject, where: str) -> Iterator[tuple[str, TorchObject]]:
    """The layers of an nngraph module by the name they were annotated with."""
    graph = _get(core.fields, "fg", TorchObject, f"{where}.core")
    for node in _get(graph.fields, "nodes", dict, f"{where}.core.fg").values():
        data = node.fields.get("data") if isinstance(node, TorchObject) else None
        notes = data.get("annotations") if isinstance(data, dict) else None
        if isinstance(data, dict) and isinstance(notes, dict) and isinstance(data.get("module"), TorchObject):
            name = notes.get("name")
            if isinstance(name, str):
                yield name, data["module"]


def _expect(value: Any, kind: type[T], where: str, expected: str) -> T:
    if not isinstance(value, kind):
        found = value.class_name if isinstance(value, TorchObject) else type(value).__name__
        raise InputError(
            f"{where} is {'missing' if value is None else f'a {found}'}",
            expected=expected,
            remedy="is this a checkpoint of neuraltalk2's train.lua?",
        )
    return value


def _get(table: dict, key: str, kind: type[T], where: str) -> T:
    expected = {dict: "a table", TorchObject: "an object"}.get(kind, kind.__name__)
    return _expect(table.get(key), kind, f"{where}: {key}", expected)


def _positive(table: dict, key: str, where: str) -> int:
    value = table.get(key)
    if type(value) is not int or not 1 <= value < 2**31:
        raise InputError(f"{where}: {key} is {_shown(value)}", expected="a positive whole number")
    return value


def _shown(value: Any) -> str:
    # Tables that share tables can have a repr exponentially longer than their file.
    return repr(value)[:100] if _is_plain(value) else f"a {type(value).__name__}"


def _array_part(table: dict) -> Iterator[Any]:
    for i in range(1, len(table) + 1):
        if i not in table:
            return
        yield table[i]


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 1e300


def _is_plain(value: Any) -> bool:
    return isinstance(value, (str, bool)) or _is_number(value)


def _probability(value: Any) -> float:
    return float(value) if _is_number(value) and 0 <= value < 1 else 0.5


def _optional_table(table: dict, key: str) -> dict:
    value = table.get(key)
    return value if isinstance(value, dict) else {}


def _iterations(table: dict, key: str) -> list[tuple[int, Any]]:
    """The entries of a table with whole numbers for keys, in their order."""
    found = _optional_table(table, key)
    return [(i, found[i]) for i in sorted(key for key in found if type(key) is int)]


def _history(table: dict, key: str) -> dict[int, float]:
    return {i: float(value) for i, value in _iterations(table, key) if _is_number(value)}
