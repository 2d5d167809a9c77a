"""VGG16 from a .caffemodel, in Caffe's old (V1) and new layer format, read without Caffe.

A .caffemodel is a protobuf message, NetParameter of caffe.proto. Its wire format is a sequence of fields, each a varint
(number * 8 + wire type) and a value: 0 a varint, 1 eight bytes, 2 a length and so many bytes, 5 four bytes.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from captioner.convert.mapped_file import Mapping, copy_float32, map_file
from captioner.errors import InputError
from captioner.model.encoder import CONV_NAMES, CONVS_BEFORE_POOL, FC_NAMES, LAST_GRID

CAFFE_CONV_NAMES = tuple(
    f"conv{block}_{i}" for block, count in enumerate(CONVS_BEFORE_POOL, 1) for i in range(1, count + 1)
)
CAFFE_FC_NAMES = ("fc6", "fc7")
NAMES = dict(zip((*CAFFE_CONV_NAMES, *CAFFE_FC_NAMES), (*CONV_NAMES, *FC_NAMES), strict=True))

VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5
# Field numbers of caffe.proto.
NET_OLD_LAYER, NET_LAYER = 2, 100
LAYER_FIELDS = {NET_OLD_LAYER: {"name": 4, "blobs": 6}, NET_LAYER: {"name": 1, "blobs": 7}}
BLOB_OLD_DIMS = (1, 2, 3, 4)  # num, channels, height, width
BLOB_DATA, BLOB_SHAPE, BLOB_DOUBLE_DATA = 5, 7, 8
SHAPE_DIM = 1


@dataclass
class _Blob:
    offset: int
    shape: tuple[int, ...]
    values: np.ndarray  # float32 or float64, one dimension, backed by the file


@dataclass
class _Layer:
    offset: int
    name: str = ""
    blobs: list[_Blob] = field(default_factory=list)


def read_caffemodel(path: str | Path, wanted_fc: bool = True) -> dict[str, np.ndarray]:
    """The weights of a VGG16 by torchvision's names, float32; conv1_1 in RGB order (Caffe's files have BGR).

    Args:
        path: VGG_ILSVRC_16_layers.caffemodel or another of its layers' names; widths come from the file.
        wanted_fc: also read fc6 and fc7.

    Raises:
        InputError: no such file, not a whole .caffemodel, or not VGG16's layers; says at which byte.
    """
    path = Path(path)
    return parse_caffemodel(map_file(path), str(path), wanted_fc)


def parse_caffemodel(data: Mapping, source: str, wanted_fc: bool = True) -> dict[str, np.ndarray]:
    """`read_caffemodel` of a file's content; `source` names it in errors."""
    if not data:
        raise InputError(f"{source}: byte 0: the file is empty", expected="a .caffemodel")
    layers = _Reader(data, source).layers()
    state: dict[str, np.ndarray] = {}
    inputs = 3
    for name in (*CAFFE_CONV_NAMES, *(CAFFE_FC_NAMES if wanted_fc else ())):
        layer = layers.get(name)
        if layer is None:
            raise InputError(
                f"{source}: no layer {name} up to the end of the file at byte {len(data)}",
                expected="VGG16's layers (VGG_ILSVRC_16_layers.caffemodel)",
            )
        if len(layer.blobs) != 2:
            raise InputError(
                f"{source}: byte {layer.offset}: layer {name} holds {len(layer.blobs)} arrays",
                expected="its weights and its biases",
            )
        if name == "fc6":
            inputs *= LAST_GRID**2
        kernel = (inputs, 3, 3) if name in CAFFE_CONV_NAMES else (inputs,)
        outputs = layer.blobs[1].values.size
        weight = _shaped(layer.blobs[0], (outputs, *kernel), f"{source}: byte %d: {name}'s weights", data)
        bias = _shaped(layer.blobs[1], (outputs,), f"{source}: byte %d: {name}'s biases", data)
        state[f"{NAMES[name]}.weight"] = weight[:, ::-1].copy() if name == "conv1_1" else weight
        state[f"{NAMES[name]}.bias"] = bias
        inputs = outputs
    return state


def _shaped(blob: _Blob, shape: tuple[int, ...], where: str, data: Mapping) -> np.ndarray:
    where %= blob.offset
    found = blob.shape
    while len(found) > len(shape) and found[0] == 1:  # the old format pads all shapes to four dimensions
        found = found[1:]
    if found != shape:
        raise InputError(f"{where} have the shape {blob.shape}", expected=f"{shape}, as VGG16 and the biases say")
    elements = 1
    for size in shape:
        elements *= size
    if blob.values.size != elements or elements == 0:
        raise InputError(f"{where} hold {blob.values.size} numbers", expected=f"the {elements} that the shape says")
    values = copy_float32(blob.values, data).reshape(shape)
    if not (np.isfinite(values.min()) and np.isfinite(values.max())):
        raise InputError(f"{where} hold NaN or infinity", remedy="the file is damaged")
    return values


class _Reader:
    def __init__(self, data: Mapping, source: str) -> None:
        self.data, self.source = data, source

    def layers(self) -> dict[str, _Layer]:
        """VGG16's layers among those of the net, by name; everything else is passed over."""
        found: dict[str, _Layer] = {}
        for number, wire, start, end in self._fields(0, len(self.data)):
            if number not in LAYER_FIELDS or not self._is(BYTES, wire, start, "a layer"):
                continue
            layer = self._layer(start, end, **LAYER_FIELDS[number])
            if layer.name in found:
                raise self._error(start, f"a second layer {layer.name}", "each name once")
            if layer.name in NAMES:
                found[layer.name] = layer
        return found

    def _layer(self, start: int, end: int, name: int, blobs: int) -> _Layer:
        layer = _Layer(start)
        blob_ranges = []
        for number, wire, first, last in self._fields(start, end):
            if number == name and self._is(BYTES, wire, first, "a layer's name"):
                layer.name = self.data[first : min(last, first + 100)].decode("utf-8", "replace")
            elif number == blobs and self._is(BYTES, wire, first, "an array"):
                blob_ranges.append((first, last))
        if layer.name in NAMES:
            layer.blobs = [self._blob(*blob_range) for blob_range in blob_ranges]
        return layer

    def _blob(self, start: int, end: int) -> _Blob:
        old_dims = dict.fromkeys(BLOB_OLD_DIMS, 0)
        shape: tuple[int, ...] | None = None
        chunks: dict[int, list[np.ndarray]] = {BLOB_DATA: [], BLOB_DOUBLE_DATA: []}
        for number, wire, first, last in self._fields(start, end):
            if number in old_dims and self._is(VARINT, wire, first, "a size"):
                old_dims[number] = self._signed(first)
            elif number == BLOB_SHAPE and self._is(BYTES, wire, first, "a shape"):
                shape = self._shape(first, last)
            elif number in chunks and self._is(BYTES, wire, first, "an array's numbers"):
                dtype = np.dtype("<f4" if number == BLOB_DATA else "<f8")
                count, rest = divmod(last - first, dtype.itemsize)
                if rest:
                    raise self._error(first, f"{last - first} bytes of numbers", f"a multiple of {dtype.itemsize}")
                if count:
                    chunks[number].append(np.frombuffer(self.data, dtype, count, first))
        dims = shape if shape is not None else tuple(old_dims.values())
        if min(dims, default=0) < 0:
            raise self._error(start, f"an array of shape {dims}", "sizes of 0 or more")
        parts = chunks[BLOB_DATA] or chunks[BLOB_DOUBLE_DATA]
        if not parts:
            return _Blob(start, dims, np.empty(0, np.float32))
        return _Blob(start, dims, parts[0] if len(parts) == 1 else np.concatenate(parts))

    def _shape(self, start: int, end: int) -> tuple[int, ...]:
        dims: list[int] = []
        for number, wire, first, last in self._fields(start, end):
            if number == SHAPE_DIM and wire == VARINT:
                dims.append(self._signed(first))
            elif number == SHAPE_DIM and self._is(BYTES, wire, first, "the sizes of a shape"):
                while first < last and len(dims) <= 32:
                    dims.append(self._signed(first))
                    _, first = self._varint(first, last)
            if len(dims) > 32:
                raise self._error(start, "an array of more than 32 dimensions", "one to four")
        return tuple(dims)

    def _fields(self, start: int, end: int) -> Iterator[tuple[int, int, int, int]]:
        """The fields of the message between two bytes: number, wire type, and where the value starts and ends."""
        position = start
        while position < end:
            at = position
            key, position = self._varint(position, end)
            number, wire = key >> 3, key & 7
            if number == 0 or wire not in (VARINT, FIXED64, BYTES, FIXED32):
                raise self._error(at, f"a field of number {number} and wire type {wire}", "a field of a .caffemodel")
            if wire == VARINT:
                first = position
                _, position = self._varint(position, end)
            else:
                size = {FIXED64: 8, FIXED32: 4}.get(wire)
                if size is None:
                    size, position = self._varint(position, end)
                first = position
                position += size
                if position > end:
                    raise self._error(
                        at, f"field {number} claims {size} bytes", f"at most the {end - first} that follow"
                    )
            yield number, wire, first, position

    def _varint(self, position: int, end: int) -> tuple[int, int]:
        value = 0
        for i in range(10):  # 64 bits, seven in a byte
            if position + i >= end:
                raise self._error(position, "the file or message ends within a number", "a whole number")
            byte = self.data[position + i]
            value |= (byte & 0x7F) << (7 * i)
            if byte < 0x80:
                return value, position + i + 1
        raise self._error(position, "a number of more than ten bytes", "at most ten")

    def _signed(self, position: int) -> int:
        value, _ = self._varint(position, len(self.data))
        value &= 2**64 - 1
        return value - 2**64 if value >= 2**63 else value

    def _is(self, expected: int, wire: int, at: int, what: str) -> bool:
        if wire != expected:
            raise self._error(at, f"{what} of wire type {wire}", f"wire type {expected}")
        return True

    def _error(self, at: int, problem: str, expected: str) -> InputError:
        return InputError(
            f"{self.source}: byte {at}: {problem}",
            expected=expected,
            remedy="the file is damaged, incomplete or not a .caffemodel",
        )
