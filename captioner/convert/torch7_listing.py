"""Whatever a .t7 file holds as a flat list of names and values, to be looked at or kept as .npz for NumPy.

A name is the way to a value: {data = tensor, net = nn.Sequential} becomes data, net, net.modules.1.weight and so on.
"""

import re
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from captioner.convert.torch7 import TorchObject
from captioner.errors import InputError, printable
from captioner.runtime.files import atomic_write
from captioner.runtime.outputs import ARRAYS_MARK

ROOT = "content"  # what a file is called that holds a tensor or a number alone
MAX_EXPANSION = 16  # times the file: more means views that overlap, and a small file could fill the disk
LONGEST_NAME = 200
_UNFIT = re.compile(r"[/\\]+")


class Note(str):
    """What the listing says of a table or an object, which itself is no value."""


def listing(content: Any) -> Iterator[tuple[str, Any]]:
    """Names and values in order: arrays, numbers, texts, booleans; of tables and objects a note.

    Tables that count from 1 and hold numbers alone, or texts alone, are arrays of one dimension. What a file refers to
    twice is listed at its first place.

    Args:
        content: of `parse_torch7`.
    """
    seen: set[int] = set()
    waiting: list[tuple[str, Any]] = [("", content)]
    while waiting:
        name, value = waiting.pop()
        if isinstance(value, dict) and (array := _as_array(value)) is not None:
            value = array
        if not isinstance(value, dict | TorchObject):
            yield name or ROOT, value
            continue
        if id(value) in seen:
            yield name, Note("as before")
            continue
        seen.add(id(value))
        fields = value.fields if isinstance(value, TorchObject) else value
        kind = value.class_name if isinstance(value, TorchObject) else "table"
        yield name or ROOT, Note(f"{kind} of {len(fields)}")
        inner = [(f"{name}.{_text(key)}" if name else _text(key), item) for key, item in fields.items()]
        waiting += reversed(inner)


def described(value: Any) -> str:
    """A value for people, in one line."""
    if isinstance(value, np.ndarray):
        kind = "text" if value.dtype.kind == "U" else str(value.dtype)
        return f"{'×'.join(map(str, value.shape))} {kind}"
    text = printable(value if isinstance(value, str) else repr(value))
    return text if len(text) <= 100 else text[:97] + "..."


def write_npz(path: Path, content: Any, file_size: int) -> int:
    """Write the arrays, numbers, texts and booleans of `listing` as .npz; returns how many there are.

    Args:
        file_size: bytes of the file that `content` was read from.

    Raises:
        InputError: the file cannot be written, or its arrays are views that hold far more than what was read.
    """
    arrays: dict[str, np.ndarray] = {}
    size = 0
    for name, value in listing(content):
        if value is None or isinstance(value, Note):
            continue
        size += value.nbytes if isinstance(value, np.ndarray) else 8
        if size > MAX_EXPANSION * file_size + 2**20:
            raise InputError(f"{path}: would have more than {size:,} bytes: tensors of the file overlap")
        arrays[_unused(_UNFIT.sub("_", printable(name))[:LONGEST_NAME], arrays)] = _array_of(value)
    with atomic_write(path) as stream, zipfile.ZipFile(stream, "w") as archive:
        archive.comment = ARRAYS_MARK
        for name, array in arrays.items():
            # A ZipInfo without a date: the same content is the same bytes.
            with archive.open(zipfile.ZipInfo(f"{name}.npy"), "w", force_zip64=True) as member:
                np.lib.format.write_array(member, array, allow_pickle=False)
    return len(arrays)


def _as_array(table: dict) -> np.ndarray | None:
    if not table or list(table) != list(range(1, len(table) + 1)):
        return None
    values = list(table.values())
    if all(type(value) is int and -(2**63) <= value < 2**63 for value in values):
        return np.array(values, np.int64)
    if all(type(value) in (int, float) for value in values):
        return np.array(values, np.float64)
    if all(isinstance(value, str) and "\0" not in value for value in values):
        lengths = [len(value) for value in values]
        if max(lengths) * len(lengths) <= 4 * sum(lengths) + 1000:  # NumPy gives all of them the longest one's space
            return np.array(values)
    return None


def _array_of(value: Any) -> np.ndarray:
    if isinstance(value, int) and not isinstance(value, bool) and not -(2**63) <= value < 2**63:
        value = float(value)
    return value if isinstance(value, np.ndarray) else np.array(value)


def _text(key: Any) -> str:
    return str(key[1]) if isinstance(key, tuple) else str(key)


def _unused(name: str, taken: dict[str, np.ndarray]) -> str:
    number, unused = 1, name
    while unused in taken:
        number += 1
        unused = f"{name}-{number}"
    return unused
