"""The Torch7 reader on files that a writer of ours spells as Torch would, or as it never would."""

import math
import time
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from torch7_writer import DTYPES, Function, Instance, Storage, Tensor, checkpoint, dumps, tensor

from captioner.convert.mapped_file import map_file
from captioner.convert.neuraltalk2 import GATES, load_neuraltalk2, parse_neuraltalk2, to_checkpoint
from captioner.convert.torch7 import TorchObject, parse_torch7
from captioner.errors import InputError

both = pytest.mark.parametrize("ascii", [False, True], ids=["binary", "ascii"])


def read_back(value: Any, ascii: bool = False) -> Any:
    return parse_torch7(dumps(value, ascii), "x.t7")


@both
def test_plain_values(ascii: bool) -> None:
    value = {1: "one", "two": 2.5, "big": 2**53, "yes": True, "no": False, "": "", "é\n x": -1, 3: {}, 1.5: 0}
    assert read_back(value, ascii) == value
    assert read_back({"a": math.inf, "b": -math.inf}, ascii) == {"a": math.inf, "b": -math.inf}
    assert math.isnan(read_back(math.nan, ascii))
    assert read_back(None, ascii) is None
    assert read_back({"gone": None}, ascii) == {}


@both
def test_keys_that_python_confuses_stay_apart(ascii: bool) -> None:
    assert list(read_back({True: "yes"}, ascii)) == [("boolean", True)]
    got = read_back({1: "one", Instance("graph.Node", {"id": 1}): "node", tensor(np.ones(3)): "array"}, ascii)
    assert got[1] == "one" and len(got) == 3
    assert [key.class_name for key in got if isinstance(key, TorchObject)] == ["graph.Node"]


@both
def test_references_are_shared_and_may_be_cyclic(ascii: bool) -> None:
    shared: dict = {"x": 1}
    table: dict = {"a": shared, "b": shared}
    table["self"] = table
    node = Instance("nngraph.Node", {})
    node.fields["me"] = node
    table["node"] = node
    got = read_back(table, ascii)
    assert got["a"] is got["b"] and got["self"] is got and got["node"].fields["me"] is got["node"]


@both
@pytest.mark.parametrize("kind", DTYPES)
def test_every_type_of_tensor(kind: str, ascii: bool) -> None:
    values = np.arange(6).reshape(2, 3).astype(DTYPES[kind])
    if values.dtype.kind == "f":
        values = values / np.array(7, values.dtype)
    got = read_back(tensor(values, kind), ascii)
    assert got.dtype == values.dtype and not got.flags.writeable
    np.testing.assert_array_equal(got, values)


@both
def test_views_share_their_storage(ascii: bool) -> None:
    storage = Storage(np.arange(12, dtype="f4"))
    got = read_back(
        {
            "transposed": Tensor(storage, (3, 2), (1, 3), 2),
            "expanded": Tensor(storage, (4, 2), (0, 1), 10),
            "whole": storage,
            "no storage": Tensor(None, (), ()),
            "no elements": Tensor(storage, (0, 5), (5, 1)),
            "one": Tensor(storage, (1, 1), (10**12, 7), 11),
        },
        ascii,
    )
    base = np.arange(12, dtype="f4")
    np.testing.assert_array_equal(got["transposed"], [[2, 5], [3, 6], [4, 7]])
    np.testing.assert_array_equal(got["expanded"], [[10, 11]] * 4)
    np.testing.assert_array_equal(got["whole"], base)
    assert got["no storage"].size == got["no elements"].size == 0 and got["one"].item() == 11
    assert np.shares_memory(got["transposed"], got["whole"])


@both
def test_unknown_classes_are_tables_and_functions_are_skipped(ascii: bool) -> None:
    function = Function(b"\x1bLJ code", {1: "upvalue"})
    value = {
        "old": Instance("my.Class", {"x": 1}, version=""),
        "f": function,
        "again": function,
        "plain": Function(b"code", {}, type=6),
        "older": Function(b"code", {}, type=7),
        "last": 1,
    }
    got = read_back(value, ascii)
    assert set(got) == {"old", "last"} and got["old"].class_name == "my.Class" and got["old"].fields == {"x": 1}


def test_bytes_that_are_not_utf8_are_latin1() -> None:
    raw = dumps("caf?").replace(b"?", b"\xe9")
    assert parse_torch7(raw, "x") == "café"


def test_a_chain_deeper_than_pythons_stack_is_read() -> None:
    count = 5000
    raw = b"".join(
        b"\x03\0\0\0" + i.to_bytes(4, "little") + b"\x01\0\0\0" + b"\x02\0\0\0\x01\0\0\0n" for i in range(1, count)
    )
    got = parse_torch7(raw + b"\x05\0\0\0\x01\0\0\0", "x")
    depth = 0
    while isinstance(got, dict):
        got, depth = got["n"], depth + 1
    assert depth == count - 1 and got is True


STORAGE = Storage(np.arange(4, dtype="f4"))
HOSTILE = {
    "view past its storage": (Tensor(STORAGE, (5,), (1,)), "reaches element 5"),
    "stride past its storage": (Tensor(STORAGE, (2,), (2**40,)), "within the 4 elements"),
    "offset before its storage": (Tensor(STORAGE, (2,), (1,), -1), "from element 0"),
    "negative size": (Tensor(STORAGE, (-2,), (1,)), r"sizes \[-2\]"),
    "negative stride": (Tensor(STORAGE, (2,), (-1,), 1), r"strides \[-1\]"),
    "huge sizes": (Tensor(STORAGE, (2**62, 2**62), (0, 0)), "sizes"),
    "huge sizes beside a 0": (Tensor(STORAGE, (2**62, 0, 2**62), (0, 0, 0)), "sizes"),
    "too many dimensions": (Tensor(STORAGE, (1,) * 33, (1,) * 33), "33 dimensions"),
    "view without storage": (Tensor(None, (2,), (1,)), "reaches element 2"),
    "storage of another type": (Tensor(STORAGE, (2,), (1,), 0, "Double"), "without a storage of its type"),
    "a table for a storage": (Tensor({}, (2,), (1,)), "without a storage"),  # type: ignore[arg-type]
    "class without fields": (Instance("nn.Linear", 3), "no table"),
    "class name of another kind": (Instance("nn\x01", {}), "class name"),
    "nil key": ({Function(b"", {}): 1}, "key"),
    "NaN key": ({math.nan: 1}, "key"),
}


@both
@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_values_are_refused(name: str, ascii: bool) -> None:
    value, message = HOSTILE[name]
    with pytest.raises(InputError, match=rf"x.t7: byte \d+: .*{message}"):
        read_back({"k": value}, ascii)


@pytest.mark.parametrize(
    "raw, message",
    [
        (b"", "empty"),
        (b"\x80\x02", "not a Torch7 file"),
        (b"<html>", "not a Torch7 file"),
        (b"PK\x03\x04", "not a Torch7 file"),
        (b"2016 was a good year", "byte 0: object type 2016"),
        (b"3\nx", "byte 2: found b'x'"),
        (b"\x07\0\0", "byte 0: the file ends after 3"),
        (b"\x02\0\0\0\xff\xff\xff\x7f", "byte 4: a string of length 2147483647"),
        (b"\x02\0\0\0\xff\xff\xff\xff", "byte 4: a string of length -1"),
        (b"\x03\0\0\0\x01\0\0\0\xff\xff\xff\x7f", "byte 8: a table of length 2147483647"),
        (b"\x09\0\0\0", "not a Torch7 file"),
    ],
)
def test_hostile_bytes_are_refused_with_their_offset(raw: bytes, message: str) -> None:
    with pytest.raises(InputError, match=message):
        parse_torch7(raw, "x.t7")


@both
def test_storages_claiming_more_than_the_file_reserve_nothing(ascii: bool) -> None:
    raw = dumps(Storage(np.arange(4, dtype="f8"), "Double"), ascii)
    claim = b"4\n0 1" if ascii else (4).to_bytes(8, "little")
    for count in (5, 2**40, 2**62, -1):
        bad = raw.replace(claim, b"%d\n0 1" % count if ascii else count.to_bytes(8, "little", signed=True), 1)
        assert bad != raw
        tracemalloc.start()
        with pytest.raises(InputError, match="byte"):
            parse_torch7(bad, "x")
        assert tracemalloc.get_traced_memory()[1] < 200_000
        tracemalloc.stop()


@both
def test_a_checkpoint_cut_at_any_byte_is_refused(ascii: bool) -> None:
    whole = dumps(checkpoint()[0], ascii)
    started = time.perf_counter()
    for length in [*range(150), *range(150, len(whole) - 1, 97)]:
        with pytest.raises(InputError):
            parse_neuraltalk2(whole[:length], "x")
    assert time.perf_counter() - started < 20


def test_endless_nesting_is_refused() -> None:
    level = b"\x03\0\0\0%s\x01\0\0\0\x02\0\0\0\x01\0\0\0n"
    with pytest.raises(InputError, match="nested deeper"):
        parse_torch7(b"".join(level % i.to_bytes(4, "little") for i in range(30_000)), "x")


VARIANTS: list[dict[str, Any]] = [
    {"backend": "cudnn", "kind": "Cuda"},
    {"convolution": "SpatialConvolutionMM"},
    {"convolution": "SpatialConvolutionMM", "kind": "CudaDouble", "num_layers": 3},
    {"kind": "Double", "num_layers": 2, "encoding_size": 5, "rnn_size": 7, "words": 6, "fc_width": 4},
    {"conv_widths": (2, 3, 2, 3, 2, 3, 2, 3, 2, 3, 2, 3, 2), "backend": "cudnn"},
]


@both
@pytest.mark.parametrize("variant", VARIANTS, ids=lambda v: "-".join(map(str, v.values())))
def test_checkpoints_of_every_make_convert(tmp_path: Path, variant: dict, ascii: bool) -> None:
    table, arrays = checkpoint(**variant)
    path = tmp_path / "x.t7"
    path.write_bytes(dumps(table, ascii))
    got = load_neuraltalk2(path)
    state = {name: value.numpy() for name, value in got.state_dict.items()}
    conv = [name for name in arrays if name.startswith("cnn.") and name.endswith(".weight")]
    ours = [name for name in state if name.startswith("encoder.") and name.endswith(".weight")]
    for theirs, name in zip(conv, ours, strict=True):
        np.testing.assert_array_equal(state[name], arrays[theirs])
    for layer in range(1, variant.get("num_layers", 1) + 1):
        for side in "ih":
            theirs = np.split(arrays[f"lm.{side}2h_{layer}.weight"], 4)
            want = np.concatenate([theirs[i] for i in GATES])
            np.testing.assert_array_equal(state[f"decoder.lstm.weight_{side}h_l{layer - 1}"], want)
    assert got.config.conv_widths == variant.get("conv_widths", (1,) * 13)
    assert got.config.num_layers == variant.get("num_layers", 1)
    history = got.history
    assert (history.iteration, history.best_score, history.opt["id"], got.config.drop_prob_lm) == (50, -1.5, "x", 0.25)
    assert history.loss_history == {0: 2.5, 25: 2.0} and history.val_predictions == [
        {"image_id": 7, "caption": "a cat"}
    ]


def damaged(change: Any) -> Any:
    table, _ = checkpoint()
    change(table, table["protos"]["lm"].fields, table["protos"]["cnn"].fields["modules"])
    return read_back(table)


def bushy() -> dict:
    """A table whose text would have 2^200 leaves."""
    table: dict = {}
    for _ in range(200):
        table = {1: table, 2: table}
    return table


def with_tensor(layer: Instance, values: np.ndarray) -> None:
    layer.fields["weight"] = tensor(values)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda t, lm, cnn: t.pop("protos"), "protos is missing"),
        (lambda t, lm, cnn: t["protos"].pop("cnn"), "cnn is missing"),
        (lambda t, lm, cnn: t.update(vocab={"1": "a"}), "1 words in vocab, 3 in the model"),
        (lambda t, lm, cnn: t["vocab"].pop("2"), "no word for id 2"),
        (lambda t, lm, cnn: lm.update(num_layers=2), "annotated i2h_2"),
        (lambda t, lm, cnn: lm.update(num_layers=10**9), "annotated i2h_2"),
        (lambda t, lm, cnn: lm.update(num_layers="1"), "num_layers is '1'"),
        (lambda t, lm, cnn: lm.update(seq_length=-1), "seq_length is -1"),
        (lambda t, lm, cnn: cnn.pop(40), "39 layers are not VGG16's 40"),
        (lambda t, lm, cnn: cnn.update({2: Instance("nn.Tanh", {})}), "layer 2 is a nn.Tanh"),
        (lambda t, lm, cnn: cnn[1].fields.update(kW=5), "kW 5"),
        (lambda t, lm, cnn: cnn[1].fields.update(kW=tensor(np.ones(3))), "kW a ndarray"),
        (lambda t, lm, cnn: cnn[1].fields.update(kW=bushy()), "kW a dict"),
        (lambda t, lm, cnn: lm.update(seq_length=bushy()), "seq_length is a dict"),
        (lambda t, lm, cnn: lm.update(num_layers=math.inf), "num_layers is a float"),
        (lambda t, lm, cnn: cnn[1].fields.pop("weight"), "weight is missing"),
        (lambda t, lm, cnn: with_tensor(cnn[1], np.ones((1, 4, 3, 3))), r"expected \(OUT, 3, 3, 3\)"),
        (lambda t, lm, cnn: with_tensor(cnn[1], np.full((1, 3, 3, 3), np.nan)), "NaN"),
        (lambda t, lm, cnn: with_tensor(cnn[1], np.ones((0, 3, 3, 3))), "empty"),
        (lambda t, lm, cnn: cnn[1].fields.update(weight=tensor(np.ones((1, 3, 3, 3)), "Int")), "int32 numbers"),
        (lambda t, lm, cnn: with_tensor(lm["lookup_table"], np.ones((4, 9))), "h_1.weight has sizes|encoding"),
    ],
)
def test_what_is_no_checkpoint_is_refused(change: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        to_checkpoint(damaged(change), "x.t7", bytes(10**6))


def test_overlapping_views_cannot_fill_the_memory() -> None:
    table, _ = checkpoint()
    cnn = table["protos"]["cnn"].fields["modules"]
    cnn[1].fields["weight"] = Tensor(Storage(np.zeros(100, "f4")), (2**40, 3, 3, 3), (0, 1, 1, 1))
    raw = dumps(table)
    with pytest.raises(InputError, match="larger than the file"):
        parse_neuraltalk2(raw, "x")


def test_binary_arrays_are_backed_by_the_file(tmp_path: Path) -> None:
    path = tmp_path / "big.t7"
    path.write_bytes(dumps(tensor(np.zeros(4_000_000, "f4"))))
    tracemalloc.start()
    got = parse_torch7(map_file(path), "x")
    assert tracemalloc.get_traced_memory()[1] < 100_000 and got.shape == (4_000_000,)
    tracemalloc.stop()
    with pytest.raises(InputError, match="cannot be read"):
        load_neuraltalk2(tmp_path / "missing.t7")
