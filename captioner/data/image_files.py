"""The bytes of a picture's file, wherever it lies, and of no other kind of file."""

import os
import stat
from pathlib import Path

from captioner.data.parquet_files import read_row
from captioner.data.tar_files import read_member
from captioner.errors import InputError
from captioner.runtime.quantities import bytes_text

MAX_FILE_BYTES = 512 * 2**20  # beyond it a file is no photo


def read_file(path: str | Path) -> bytes:
    """The bytes of a regular file of sensible size, also of one inside a tar archive or Parquet file (see `tar_files`,
    `parquet_files`); pipes, devices and folders are refused unopened.

    Raises:
        InputError: with the reason.
    """
    try:
        # Looked at before it is opened: to open a device can do things, to open a pipe waits for a writer.
        status = os.stat(path)
        if not stat.S_ISREG(status.st_mode):
            raise InputError(f"{path}: is {_kind_of_file(status.st_mode)}, not a picture")
        if status.st_size > MAX_FILE_BYTES:
            raise InputError(
                f"{path}: holds {bytes_text(status.st_size)}", expected=f"at most {bytes_text(MAX_FILE_BYTES)}"
            )
        with open(path, "rb") as stream:
            data = stream.read(status.st_size)  # no more, even if it grows
    except (FileNotFoundError, NotADirectoryError):
        data = _read_from_archive(path)
    except (OSError, ValueError) as error:  # ValueError: a null character in the name
        reason = getattr(error, "strerror", None) or str(error)
        raise InputError(f"{path}: cannot be read ({reason})") from error
    if not data:
        raise InputError(f"{path}: is empty")
    return data


def _read_from_archive(path: str | Path) -> bytes:
    """A file that is none by itself: inside a shard, or missing."""
    try:
        data = read_member(str(path), MAX_FILE_BYTES)
        if data is None:
            data = read_row(str(path), MAX_FILE_BYTES)
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror or error})") from error
    if data is None:
        reason = "is a link to a file that does not exist" if os.path.islink(path) else "no such file"
        raise InputError(f"{path}: {reason}") from None
    return data


def _kind_of_file(mode: int) -> str:
    for is_kind, name in (
        (stat.S_ISDIR, "a folder"),
        (stat.S_ISFIFO, "a named pipe"),
        (stat.S_ISSOCK, "a socket"),
        (stat.S_ISCHR, "a device"),
        (stat.S_ISBLK, "a device"),
    ):
        if is_kind(mode):
            return name
    return "no regular file"
