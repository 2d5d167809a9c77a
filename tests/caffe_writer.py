"""Writes .caffemodel files for tests: fields in the order and spelling that a test wants."""

from collections.abc import Sequence

import numpy as np

NAMES = [f"conv{block}_{i}" for block, n in enumerate((2, 2, 3, 3, 3), 1) for i in range(1, n + 1)] + ["fc6", "fc7"]

Net = dict[str, list[tuple[tuple[int, ...], np.ndarray]]]


def narrow_net() -> Net:
    """A VGG16 of one channel per layer."""
    return net((1,) * 13, 1)


def net(conv_widths: Sequence[int], fc_width: int) -> Net:
    """A VGG16 of random numbers: name → shapes and values of weights and biases."""
    random = np.random.default_rng(0)
    layers: Net = {}
    inputs = 3
    for name, width in zip(NAMES, (*conv_widths, fc_width, fc_width), strict=True):
        shape = (width, inputs, 3, 3) if name.startswith("conv") else (width, inputs * 49 if name == "fc6" else inputs)
        values = random.standard_normal(shape, np.float32)
        layers[name] = [(shape, values), ((width,), random.standard_normal(width, np.float32))]
        inputs = width
    return layers


def written(net: Net, *, old: bool = False, dims_packed: bool = True, in_pieces: bool = False) -> bytes:
    """The file's bytes: the old V1 format or the new one, sizes packed or one by one, data whole or in two pieces."""
    out = b""
    for name, blobs in net.items():
        layer = message(4 if old else 1, name.encode())
        for shape, values in blobs:
            data = values.astype("<f4").tobytes()
            content = b"".join(message(5, piece) for piece in ([data[:4], data[4:]] if in_pieces else [data]))
            if old:
                dims = (1,) * (4 - len(shape)) + shape
                content = b"".join(varint(8 * i) + varint(n) for i, n in enumerate(dims, 1)) + content
            elif dims_packed:
                content = message(7, message(1, b"".join(varint(n) for n in shape))) + content
            else:
                content = message(7, b"".join(b"\x08" + varint(n) for n in shape)) + content
            layer += message(6 if old else 7, content)
        out += message(2 if old else 100, layer)
    return out


def message(number: int, content: bytes) -> bytes:
    """A length-delimited field."""
    return varint(number * 8 + 2) + varint(len(content)) + content


def varint(value: int) -> bytes:
    """Seven bits a byte, lowest first."""
    out = b""
    while value > 0x7F:
        out += bytes([value & 0x7F | 0x80])
        value >>= 7
    return out + bytes([value])
