"""Files that are nothing but files: no pipe that waits for a writer, no device that never ends."""

import errno
import math
import os
import stat
from pathlib import Path
from typing import IO


def open_regular(path: str | Path, most: float = math.inf) -> IO[bytes]:
    """Open a regular file to read. To open a pipe would wait for a writer, and some devices never end.

    Raises:
        OSError: it is none, holds more than `most` bytes, or cannot be opened.
    """
    # Looked at before it is opened: to open a device can do things. And then again: another may have come in its place.
    _require_regular(path, os.stat(path), most)
    stream = open(path, "rb", opener=_open_without_waiting)  # noqa: SIM115
    try:
        _require_regular(path, os.fstat(stream.fileno()), most)
    except OSError:
        stream.close()
        raise
    return stream


def _require_regular(path: str | Path, found: os.stat_result, most: float) -> None:
    if not stat.S_ISREG(found.st_mode):
        raise OSError(errno.EINVAL, "a folder, a pipe or a device", str(path))
    if found.st_size > most:
        raise OSError(errno.EFBIG, f"it holds {found.st_size:,} bytes, more than {most:,}", str(path))


def _open_without_waiting(path: str, flags: int) -> int:
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))
