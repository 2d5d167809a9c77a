"""Torch7 serialisation, binary and ascii: bytes to plain Python and numpy. Nothing in a file is ever executed.

The format is that of torch7's File.lua, DiskFile.c, Tensor.c and Storage.c. An object is a type code and its content;
tables, Torch objects and recursive functions carry an index, and come once: a later object with the same index is a
reference. Binary files hold C's int (4 bytes), long (8) and double, little-endian; ascii files hold the same sequence
as decimal text, a newline after each group, but strings, bytes and chars raw.

| Torch7                  | here                                                                               |
|-------------------------|------------------------------------------------------------------------------------|
| nil, boolean, string    | None, bool, str (UTF-8, else Latin-1)                    |
| number                  | int where it is integral, else float                                               |
| table                   | dict; see `_key` for keys that Python would refuse or confuse                      |
| torch.*Tensor           | numpy array, a read-only view into its storage, sharing it as in Torch             |
| torch.*Storage          | numpy array of one dimension, backed by the file itself (binary)                   |
| any other class         | TorchObject: class name and fields                                                 |
| function                | None: skipped, with its upvalues                                                   |
"""

import math
import re
import struct
import warnings
from collections.abc import Generator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from captioner.convert.mapped_file import Mapping
from captioner.errors import InputError

NIL, NUMBER, STRING, TABLE, TORCH, BOOLEAN, FUNCTION, OLD_RECURSIVE_FUNCTION, RECURSIVE_FUNCTION = range(9)

ELEMENT_TYPES = {
    "Byte": "u1",
    "Char": "i1",
    "Short": "<i2",
    "Int": "<i4",
    "Long": "<i8",
    "Half": "<f2",
    "Float": "<f4",
    "Double": "<f8",
    "": "<f4",  # torch.CudaTensor
}
_ARRAY_CLASS = re.compile(r"torch\.(?:(?:Cuda)?(Byte|Char|Short|Int|Long|Half|Float|Double)|Cuda)(Tensor|Storage)")

MAX_DEPTH = 20_000  # a real checkpoint's graph of nodes reaches a few hundred
MAX_DIMENSIONS = 32  # numpy's own limit in its first versions
MAX_ELEMENTS = 2**48  # of a view; overlapping views cost no memory until somebody copies them

Task = Generator["Task", Any, Any]


@dataclass(eq=False, repr=False)
class TorchObject:
    """An object of a Lua class, for instance nn.Linear."""

    class_name: str
    fields: dict[Any, Any] = field(default_factory=dict)


def parse_torch7(data: Mapping, source: str) -> Any:
    """Read what torch.save wrote, as the table above says.

    Args:
        data: the file's content. The arrays of a binary file are views into it, so that of a mapped file only what is
            used is read.
        source: names the file in errors.

    Raises:
        InputError: not a whole Torch7 file; says at which byte, and what was expected there.
    """
    first = data[:1]
    if first and first[0] <= RECURSIVE_FUNCTION:
        return _Binary(data, source).read()
    if first.isdigit():
        return _Ascii(data, source).read()
    raise InputError(
        f"{source}: not a Torch7 file: byte 0 is {first!r}" if first else f"{source}: the file is empty",
        expected="a .t7 file of torch.save, binary or ascii",
    )


class _Reader:
    """Objects, given the means to read ints, longs, doubles, bytes and arrays, which the two formats spell apart."""

    smallest_object: int  # bytes

    def __init__(self, data: Mapping, source: str) -> None:
        self.data, self.source = data, source
        self.position = 0
        self.objects: dict[int, Any] = {}

    def read(self) -> Any:
        # Nesting is kept on a list of our own: Python's stack is too small for a chain of graph nodes.
        tasks = [self._object()]
        value = None
        while tasks:
            try:
                tasks.append(tasks[-1].send(value))
                value = None
            except StopIteration as finished:
                value = finished.value
                tasks.pop()
            if len(tasks) > MAX_DEPTH:
                raise self.error(f"objects nested deeper than {MAX_DEPTH}")
        return value

    def error(self, problem: str, expected: str = "", at: int | None = None) -> InputError:
        at = self.position if at is None else at
        return InputError(
            f"{self.source}: byte {at}: {problem}",
            expected=expected,
            remedy="the file is damaged, incomplete or not a Torch7 file",
        )

    def _object(self) -> Task:
        start = self.position
        kind = self.read_int()
        if kind == NIL:
            return None
        if kind == NUMBER:
            number = self.read_double()
            return int(number) if number.is_integer() else number
        if kind == STRING:
            return self.read_string()
        if kind == BOOLEAN:
            return self.read_int() != 0
        if kind == FUNCTION:
            self.read_bytes(self.read_count("function", 1))
            yield self._object()
            return None
        if kind not in (TABLE, TORCH, RECURSIVE_FUNCTION, OLD_RECURSIVE_FUNCTION):
            raise self.error(f"object type {kind}", "a type from 0 to 8", start)
        index = self.read_int()
        if index in self.objects:
            return self.objects[index]
        if kind == TABLE:
            table = self.objects[index] = {}
            yield self._table(table)
            return table
        if kind == TORCH:
            return (yield self._torch(index))
        self.objects[index] = None
        self.read_bytes(self.read_count("function", 1))
        yield self._object()
        return None

    def _table(self, table: dict) -> Task:
        for _ in range(self.read_count("table", 2 * self.smallest_object)):
            start = self.position
            key = yield self._object()
            if key is None or (isinstance(key, float) and math.isnan(key)):
                raise self.error("a table key is nil, NaN or a function", "a key", start)
            value = yield self._object()
            if value is not None:
                table[_key(key)] = value

    def _torch(self, index: int) -> Task:
        start = self.position
        class_name = self.read_string()
        if class_name.startswith("V "):  # files from before versions have the class name here
            class_name = self.read_string()
        array = _ARRAY_CLASS.fullmatch(class_name)
        if array:
            dtype = np.dtype(ELEMENT_TYPES[array[1] or ""])
            if array[2] == "Storage":
                self.objects[index] = self._storage(dtype)
            else:
                self.objects[index] = yield self._tensor(class_name, dtype)
            return self.objects[index]
        if not class_name or len(class_name) > 200 or not class_name.isprintable():
            raise self.error(f"class name {class_name[:40]!r}", "the name of a Lua class", start)
        instance = self.objects[index] = TorchObject(class_name)
        content_at = self.position
        content = yield self._object()
        if not isinstance(content, dict):
            raise self.error(f"the content of a {class_name} is no table", "a table of its fields", content_at)
        instance.fields = content
        return instance

    def _storage(self, dtype: np.dtype) -> np.ndarray:
        start = self.position
        size = self.read_long()
        if size < 0:
            raise self.error(f"a storage of {size} elements", "0 or more", start)
        return self.read_array(size, dtype)

    def _tensor(self, class_name: str, dtype: np.dtype) -> Task:
        start = self.position
        dimensions = self.read_int()
        if not 0 <= dimensions <= MAX_DIMENSIONS:
            raise self.error(f"a tensor of {dimensions} dimensions", f"0 to {MAX_DIMENSIONS}", start)
        sizes = [int(n) for n in self.read_array(dimensions, np.dtype("<i8"))]
        strides = [int(n) for n in self.read_array(dimensions, np.dtype("<i8"))]
        offset = self.read_long() - 1  # counted from 1 in the file
        storage = yield self._object()
        if storage is None:
            storage = np.empty(0, dtype)
        if not isinstance(storage, np.ndarray) or storage.ndim != 1 or storage.dtype != dtype:
            raise self.error(f"a {class_name} without a storage of its type", "a storage or nil", start)
        if dimensions == 0:
            return storage[:0]
        elements = 1
        for size in sizes:
            elements *= max(size, 1)
        if min(sizes) < 0 or min(strides) < 0 or elements > MAX_ELEMENTS:
            raise self.error(f"a tensor of sizes {sizes} and strides {strides}", "a view into its storage", start)
        if 0 in sizes:
            return np.empty(sizes, dtype)
        last = offset + sum((size - 1) * stride for size, stride in zip(sizes, strides, strict=True))
        if offset < 0 or last >= len(storage):
            raise self.error(
                f"a tensor of sizes {sizes} and strides {strides} from element {offset + 1} reaches element {last + 1}",
                f"all of it within the {len(storage)} elements of its storage",
                start,
            )
        steps = [stride * dtype.itemsize if size > 1 else 0 for size, stride in zip(sizes, strides, strict=True)]
        return np.lib.stride_tricks.as_strided(storage[offset:], sizes, steps, writeable=False)

    def read_string(self) -> str:
        raw = self.read_bytes(self.read_count("string", 1))
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError:
            return raw.decode("latin-1")

    def read_count(self, what: str, bytes_each: int) -> int:
        """A number of things that take at least so many bytes each."""
        start = self.position
        count = self.read_int()
        if not 0 <= count * bytes_each <= self.remaining:
            raise self.error(
                f"a {what} of length {count}", f"one that fits the remaining {self.remaining} bytes", start
            )
        return count

    @property
    def remaining(self) -> int:
        return len(self.data) - self.position

    def read_int(self) -> int:
        raise NotImplementedError

    def read_long(self) -> int:
        raise NotImplementedError

    def read_double(self) -> float:
        raise NotImplementedError

    def read_bytes(self, count: int) -> bytes:
        raise NotImplementedError

    def read_array(self, count: int, dtype: np.dtype) -> np.ndarray:
        raise NotImplementedError


class _Binary(_Reader):
    smallest_object = 4

    def read_int(self) -> int:
        return self._unpack("<i", 4, "an int")

    def read_long(self) -> int:
        return self._unpack("<q", 8, "a long")

    def read_double(self) -> float:
        return self._unpack("<d", 8, "a double")

    def read_bytes(self, count: int) -> bytes:
        start = self._advance(count, f"{count} bytes")
        return self.data[start : start + count]

    def read_array(self, count: int, dtype: np.dtype) -> np.ndarray:
        start = self._advance(count * dtype.itemsize, f"{count} elements of {dtype.itemsize} bytes")
        return np.frombuffer(self.data, dtype, count, start) if count else np.empty(0, dtype)

    def _unpack(self, form: str, size: int, what: str) -> Any:
        return struct.unpack_from(form, self.data, self._advance(size, what))[0]

    def _advance(self, size: int, what: str) -> int:
        if size > self.remaining:
            raise self.error(f"the file ends after {self.remaining} more bytes", what)
        start = self.position
        self.position += size
        return start


class _Ascii(_Reader):
    smallest_object = 2

    def read_int(self) -> int:
        match = _INTEGER.match(self.data, self.position)
        if not match:
            raise self._unlike("a whole number")
        self._pass(match.end())
        return int(match[1])

    read_long = read_int

    def read_double(self) -> float:
        match = _NUMBER.match(self.data, self.position)
        if not match:
            raise self._unlike("a number")
        self._pass(match.end())
        return float(match[1])

    def read_bytes(self, count: int) -> bytes:
        if count > self.remaining:
            raise self.error(f"the file ends after {self.remaining} more bytes", f"{count} bytes")
        start = self.position
        if count:
            self._pass(start + count)
        return self.data[start : start + count]

    def read_array(self, count: int, dtype: np.dtype) -> np.ndarray:
        if count == 0:
            return np.empty(0, dtype)
        if dtype.itemsize == 1:
            return np.frombuffer(self.read_bytes(count), dtype)
        if 2 * count - 1 > self.remaining:
            raise self.error(f"the file ends after {self.remaining} more bytes", f"{count} numbers")
        start = self.position
        end = self.data.find(b"\n", start)
        end = len(self.data) if end < 0 else end
        # numpy reads halves badly from text, but as floats well.
        parsed = np.dtype("<f4") if dtype == np.dtype("<f2") else dtype
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error")  # how numpy reports text it could not read to the end
                values = np.fromstring(self.data[start:end].decode("ascii"), parsed, sep=" ")
        except (ValueError, DeprecationWarning):
            values = np.empty(0, dtype)
        if len(values) != count:
            raise self.error("these are not the numbers of a storage", f"{count} numbers in one line", start)
        self._pass(end)
        return values.astype(dtype, copy=False)

    def _pass(self, end: int) -> None:
        # Torch writes a newline after each group and skips at most one when reading.
        self.position = end + (self.data[end : end + 1] == b"\n")

    def _unlike(self, expected: str) -> InputError:
        found = self.data[self.position : self.position + 20]
        return self.error(f"found {found!r}" if found else "the file ends here", expected)


_INTEGER = re.compile(rb"\s*([+-]?\d{1,20})(?=\s|$)")
_NUMBER = re.compile(rb"\s*([+-]?(?:\d{1,30}\.?\d{0,30}|\.\d{1,30})(?:[eE][+-]?\d{1,5})?|[+-]?(?:nan|inf))(?=\s|$)")


def _key(key: Any) -> Any:
    """A dict key for a table's key: Python takes True for 1 and cannot hash dicts and arrays."""
    if isinstance(key, bool):
        return ("boolean", key)
    if isinstance(key, (dict, np.ndarray)):
        return ("table" if isinstance(key, dict) else "array", id(key))
    return key
