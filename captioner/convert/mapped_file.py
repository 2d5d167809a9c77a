"""Files of several hundred megabytes, read without holding them in memory twice."""

import mmap
from pathlib import Path

import numpy as np

from captioner.errors import InputError

Mapping = bytes | mmap.mmap

BLOCK = 2**24  # elements copied before the file's pages are let go


def map_file(path: Path) -> Mapping:
    """A file's bytes, backed by the file; b"" for an empty one, which cannot be mapped.

    Raises:
        InputError: it cannot be read.
    """
    try:
        with path.open("rb") as stream:
            return mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) if stream.seek(0, 2) else b""
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror or error})", remedy="check the path") from error


def copy_float32(values: np.ndarray, data: Mapping) -> np.ndarray:
    """A float32 copy of an array that `data` backs; the pages it was read from count as the process's no more."""
    copied = np.empty(values.shape, np.float32)
    rows = max(1, BLOCK * len(values) // max(values.size, 1))
    with np.errstate(over="ignore", invalid="ignore"):  # what does not fit becomes infinity, which callers refuse
        for start in range(0, len(values), rows):
            copied[start : start + rows] = values[start : start + rows]
            if isinstance(data, mmap.mmap) and hasattr(mmap, "MADV_DONTNEED"):
                data.madvise(mmap.MADV_DONTNEED)
    return copied
