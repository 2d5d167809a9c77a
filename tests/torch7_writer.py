"""Writes Torch7 files for tests and benchmarks: what torch.save writes, and what no Torch would."""

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

DTYPES = {
    "Byte": "u1", "Char": "i1", "Short": "<i2", "Int": "<i4", "Long": "<i8",
    "Half": "<f2", "Float": "<f4", "Double": "<f8",
    "Cuda": "<f4", "CudaDouble": "<f8", "CudaHalf": "<f2", "CudaLong": "<i8", "CudaByte": "u1",
}  # fmt: skip


@dataclass(eq=False)
class Storage:
    values: np.ndarray
    kind: str = "Float"


@dataclass(eq=False)
class Tensor:
    storage: Storage | None
    sizes: Sequence[int]
    strides: Sequence[int]
    offset: int = 0  # from 0; the file counts from 1
    kind: str = "Float"


@dataclass(eq=False)
class Instance:
    class_name: str
    fields: Any
    version: str = "V 1"  # "" for files from before versions


@dataclass(eq=False)
class Function:
    code: bytes
    upvalues: Any
    type: int = 8


def tensor(values: np.ndarray, kind: str = "Float") -> Tensor:
    """A tensor with a storage of its own."""
    flat = np.ascontiguousarray(values, DTYPES[kind])
    strides = [stride // flat.itemsize for stride in flat.strides]
    return Tensor(Storage(flat.ravel(), kind), values.shape, strides, 0, kind)


def dumps(value: Any, ascii: bool = False) -> bytes:
    """The bytes of a file."""
    writer = _Ascii() if ascii else _Binary()
    writer.object(value)
    return b"".join(writer.parts)


class _Binary:
    def __init__(self) -> None:
        self.parts: list[Any] = []
        self.indices: dict[int, int] = {}
        self.keep: list[Any] = []

    def int(self, value: int) -> None:
        self.parts.append(struct.pack("<i", value))

    def longs(self, values: Sequence[int]) -> None:
        self.parts.append(struct.pack(f"<{len(values)}q", *values))

    def double(self, value: float) -> None:
        self.parts.append(struct.pack("<d", value))

    def raw(self, value: bytes) -> None:
        self.parts.append(value)

    def array(self, values: np.ndarray) -> None:
        self.parts.append(values.tobytes())

    def string(self, value: str) -> None:
        encoded = value.encode()
        self.int(len(encoded))
        self.raw(encoded)

    def _is_new(self, kind: int, value: Any) -> bool:
        self.int(kind)
        known = id(value) in self.indices
        index = self.indices.setdefault(id(value), len(self.indices) + 1)
        self.keep.append(value)
        self.int(index)
        return not known

    def object(self, value: Any) -> None:
        if value is None:
            self.int(0)
        elif isinstance(value, bool):
            self.int(5)
            self.int(value)
        elif isinstance(value, (int, float)):
            self.int(1)
            self.double(float(value))
        elif isinstance(value, str):
            self.int(2)
            self.string(value)
        elif isinstance(value, dict):
            if self._is_new(3, value):
                self.int(len(value))
                for key, item in value.items():
                    self.object(key)
                    self.object(item)
        elif isinstance(value, Function):
            if value.type == 6:
                self.int(6)
            elif not self._is_new(value.type, value):
                return
            self.int(len(value.code))
            self.raw(value.code)
            self.object(value.upvalues)
        elif self._is_new(4, value):
            self._torch(value)

    def _torch(self, value: Any) -> None:
        name = {Storage: "torch.{}Storage", Tensor: "torch.{}Tensor"}.get(type(value))
        if isinstance(value, Instance):
            if value.version:
                self.string(value.version)
            self.string(value.class_name)
            self.object(value.fields)
            return
        self.string("V 1")
        assert name is not None
        self.string(name.format(value.kind))
        if isinstance(value, Storage):
            self.longs([len(value.values)])
            self.array(np.asarray(value.values, DTYPES[value.kind]))
        else:
            self.int(len(value.sizes))
            self.longs(value.sizes)
            self.longs(value.strides)
            self.longs([value.offset + 1])
            self.object(value.storage)


class _Ascii(_Binary):
    def int(self, value: int) -> None:
        self.parts.append(b"%d\n" % value)

    def longs(self, values: Sequence[int]) -> None:
        if values:
            self.parts.append(" ".join(map(str, values)).encode() + b"\n")

    def double(self, value: float) -> None:
        self.parts.append(b"%.17g\n" % value)

    def raw(self, value: bytes) -> None:
        if value:
            self.parts.append(value + b"\n")

    def array(self, values: np.ndarray) -> None:
        if values.itemsize == 1:
            self.raw(values.tobytes())
        elif len(values):
            form = "%d" if values.dtype.kind == "i" else "%.17g" if values.itemsize == 8 else "%.9g"
            self.parts.append(" ".join(form % x for x in values).encode() + b"\n")


def checkpoint(
    conv_widths: Sequence[int] = (1,) * 13,
    fc_width: int = 2,
    encoding_size: int = 3,
    rnn_size: int = 2,
    num_layers: int = 1,
    words: int = 3,
    kind: str = "Float",
    backend: str = "nn",
    convolution: str = "SpatialConvolution",
) -> tuple[dict, dict[str, np.ndarray]]:
    """What train.lua saves, with random weights in one flat storage per net; and its arrays by name."""
    random = np.random.default_rng(0)
    arrays: dict[str, np.ndarray] = {}

    def layer(class_name: str, name: str, weight: tuple[int, ...], **fields: Any) -> Instance:
        arrays[f"{name}.weight"] = random.standard_normal(weight, "f4") * np.float32(np.prod(weight[1:]) ** -0.5)
        arrays[f"{name}.bias"] = random.normal(size=weight[0]).astype("f4")
        stored = (weight[0], int(np.prod(weight[1:]))) if convolution.endswith("MM") and len(weight) == 4 else weight
        placed.append((f"{name}.weight", stored))
        placed.append((f"{name}.bias", weight[:1]))
        return Instance(class_name, {"name": name, "_names": (f"{name}.weight", f"{name}.bias"), **fields})

    def bind(layers: list[Instance]) -> None:
        storage = Storage(np.concatenate([arrays[name].ravel() for name, _ in placed]).astype(DTYPES[kind]), kind)
        views, at = {}, 0
        for name, shape in placed:
            strides = [int(np.prod(shape[i + 1 :])) for i in range(len(shape))]
            views[name] = Tensor(storage, shape, strides, at, kind)
            at += int(np.prod(shape))
        for one in layers:
            names = one.fields.pop("_names", None)
            if names:
                one.fields.update(weight=views[names[0]], bias=views[names[1]])

    placed: list[tuple[str, tuple[int, ...]]] = []
    modules, inputs = [], 3
    for index, width in enumerate(conv_widths, 1):
        geometry = {"kW": 3, "kH": 3, "dW": 1, "dH": 1, "padW": 1, "padH": 1}
        modules.append(
            layer(f"{backend}.{convolution}", f"cnn.{len(modules) + 1:02d}", (width, inputs, 3, 3), **geometry)
        )
        modules.append(Instance(f"{backend}.ReLU", {"inplace": True}))
        inputs = width
        if index in (2, 4, 7, 10, 13):
            modules.append(Instance(f"{backend}.SpatialMaxPooling", {"kW": 2, "kH": 2, "dW": 2, "dH": 2}))
    modules.append(Instance("nn.View", {"numElements": 1}))
    inputs *= 49
    for width in (fc_width, fc_width, encoding_size):
        modules.append(layer("nn.Linear", f"cnn.{len(modules) + 1:02d}", (width, inputs)))
        modules.append(Instance(f"{backend}.ReLU", {}))
        if len(modules) < 39:
            modules.append(Instance("nn.Dropout", {"p": 0.5}))
        inputs = width
    bind(modules)

    placed = []
    lookup = layer("nn.LookupTable", "lm.lookup_table", (words + 1, encoding_size))
    placed = placed[:1]  # an embedding has no bias
    arrays.pop("lm.lookup_table.bias")
    lookup.fields["_names"] = ("lm.lookup_table.weight", "lm.lookup_table.weight")
    nodes, linears, inputs = {}, [lookup], encoding_size
    for i in range(1, num_layers + 1):
        linears.append(layer("nn.Linear", f"lm.i2h_{i}", (4 * rnn_size, inputs)))
        linears.append(layer("nn.Linear", f"lm.h2h_{i}", (4 * rnn_size, rnn_size)))
        inputs = rnn_size
    linears.append(layer("nn.Linear", "lm.decoder", (words + 1, rnn_size)))
    bind(linears)
    for i, linear in enumerate(linears[1:], 1):
        notes = {"name": linear.fields["name"][3:]}
        nodes[i] = Instance("nngraph.Node", {"id": i, "data": {"annotations": notes, "module": linear}})
    for i in range(1, len(nodes)):
        nodes[i].fields["children"] = {1: nodes[i + 1], nodes[i + 1]: 1}
    core = Instance(
        "nn.gModule", {"fg": Instance("graph.Graph", {"nodes": nodes}), "modules": dict(enumerate(linears[1:], 1))}
    )
    lm = Instance(
        "nn.LanguageModel",
        {
            "vocab_size": words, "seq_length": 4, "rnn_size": rnn_size, "num_layers": num_layers,
            "input_encoding_size": encoding_size, "lookup_table": lookup, "core": core,
        },
    )  # fmt: skip
    table = {
        "opt": {"drop_prob_lm": 0.25, "id": "x", "learning_rate": 4e-4},
        "iter": 50,
        "loss_history": {0: 2.5, 25: 2},
        "val_loss_history": {50: 1.5},
        "val_predictions": {1: {"image_id": 7, "caption": "a cat"}},
        "val_lang_stats_history": {},
        "vocab": {str(i): f"w{i}" for i in range(1, words + 1)},
        "protos": {"lm": lm, "cnn": Instance("nn.Sequential", {"modules": dict(enumerate(modules, 1))})},
    }
    return table, arrays
