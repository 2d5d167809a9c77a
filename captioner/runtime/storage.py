"""Files on this machine, or at addresses as s3://bucket/name, which fsspec and its own packages read and write."""

import contextlib
import errno
import io
import logging
import os
import re
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, cast

from captioner.errors import InputError
from captioner.runtime.files import atomic_write, require_replaceable, require_writable_folder

_REMOTE = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+)://")  # two letters at least: Windows has drives
# What to install for an address, as extras of this package.
_EXTRAS = {"s3": "s3", "s3a": "s3", "gs": "gs", "gcs": "gs", "hf": "hf", "http": "shards", "https": "shards"}
# Where a written object appears whole or not at all; elsewhere it is written under another name, and renamed.
_PUT_IS_ATOMIC = frozenset("s3 s3a gs gcs hf abfs az memory".split())


def is_remote(name: str) -> bool:
    """Whether a name is an address."""
    return _REMOTE.match(name) is not None


def join(folder: str, name: str) -> str:
    """A file in a folder, on this machine or not."""
    return f"{folder.rstrip('/')}/{name}" if is_remote(folder) else os.path.join(folder, name)


def on_this_machine(name: str) -> Path | None:
    """The path of a file or folder here, whether it is called by its path or as file://..; None for all others.

    Raises:
        InputError: a package for this kind of address is missing.
    """
    if not is_remote(name):
        return Path(name)
    system, path = _system(name)
    return Path(path) if "file" in system.protocol else None


def open_bytes(name: str) -> IO[bytes]:
    """Open a file to read bytes from, anywhere in it.

    Raises:
        OSError: it cannot be opened, with the reason; remote systems' own kinds of errors become OSErrors, here and in
            what is returned.
        InputError: a package for this kind of address is missing.
    """
    if not is_remote(name):
        return open(name, "rb")
    system, path = _system(name)
    with _as_os_errors():
        return cast(IO[bytes], _RemoteFile(system.open(path, "rb")))


class _RemoteFile(io.RawIOBase):
    def __init__(self, stream: IO[bytes]) -> None:
        self._stream = stream

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        with _as_os_errors():
            data = self._stream.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        with _as_os_errors():
            return self._stream.seek(offset, whence)

    def tell(self) -> int:
        with _as_os_errors():
            return self._stream.tell()

    def close(self) -> None:
        if not self.closed:
            super().close()
            self._stream.close()


def find(pattern: str) -> list[str]:
    """The remote files that an address with * or ? stands for, sorted; without them the address itself.

    Raises:
        InputError: there is none, or the system cannot be asked.
    """
    if not any(mark in pattern for mark in "*?["):
        return [pattern]
    system, path = _system(pattern)
    with _as_input_errors(pattern):
        found = sorted(system.unstrip_protocol(one) for one in system.glob(path))
    if not found:
        raise InputError(f"{pattern}: no file matches this pattern")
    return found


def names_in(folder: str) -> set[str]:
    """The names of the files directly in a folder that may not be there yet.

    Raises:
        InputError: the system cannot be asked.
    """
    if not is_remote(folder):
        return {entry.name for entry in os.scandir(folder)} if os.path.isdir(folder) else set()
    system, path = _system(folder)
    with _as_input_errors(folder):
        system.invalidate_cache()
        if not system.isdir(path):
            return set()
        return {one.rstrip("/").rpartition("/")[2] for one in system.ls(path, detail=False)}


def make_folder(folder: str, purpose: str) -> None:
    """Create a folder if needed, and prove that it can be written to.

    Raises:
        InputError: it cannot.
    """
    if not is_remote(folder):
        require_writable_folder(folder, purpose)
        return
    system, path = _system(folder)
    with _as_input_errors(folder):
        system.makedirs(path, exist_ok=True)
    write_whole(join(folder, ".probe"), b"")
    remove(join(folder, ".probe"))


def write_whole(name: str, data: bytes) -> None:
    """Write a file that appears with all of its content, or not at all.

    Raises:
        InputError: it cannot be written, or is an input of this command.
    """
    if not is_remote(name):
        with atomic_write(Path(name)) as stream:
            stream.write(data)
        return
    _require_replaceable(name)
    system, path = _system(name)
    with _as_input_errors(name):
        if _protocol(name) in _PUT_IS_ATOMIC:
            system.pipe_file(path, data)
            return
        temporary = f"{path}.{uuid.uuid4().hex[:8]}.tmp"
        try:
            system.pipe_file(temporary, data)
            system.mv(temporary, path)
        except BaseException:
            with contextlib.suppress(Exception):  # the first error is the one to tell
                system.rm_file(temporary)
            raise


def read_whole(name: str) -> bytes | None:
    """A small file's content; None where it does not exist.

    Raises:
        InputError: it cannot be read.
    """
    try:
        with open_bytes(name) as stream:
            return stream.read()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise InputError(f"{name}: cannot be read ({error.strerror or error})") from error


def remove(name: str) -> None:
    """Remove a file that may not be there.

    Raises:
        InputError: it cannot be removed, or is an input of this command.
    """
    _require_replaceable(name)
    if is_remote(name):
        system, path = _system(name)
        with _as_input_errors(name), contextlib.suppress(FileNotFoundError):
            system.rm_file(path)
        return
    try:
        Path(name).unlink(missing_ok=True)
    except OSError as error:
        raise InputError(f"{name}: cannot be removed ({error.strerror or error})") from error


def _require_replaceable(name: str) -> None:
    here = on_this_machine(name)
    if here is not None:
        require_replaceable(here)


def _protocol(name: str) -> str:
    match = _REMOTE.match(name)
    assert match
    return match[1].lower()


def _system(name: str) -> tuple[Any, str]:
    """fsspec's file system of an address, and what the file is called there."""
    try:
        import fsspec

        logging.getLogger("httpx").setLevel(logging.WARNING)  # the hub's client tells every request
        with _as_input_errors(name):
            return fsspec.core.url_to_fs(name)
    except ImportError as error:
        extra = _EXTRAS.get(_protocol(name), "shards")
        raise InputError(
            f"{name}: a package to reach this address is missing ({error})",
            remedy=f'pip install "captioner[{extra}]", or the package of fsspec for {_protocol(name)}://',
        ) from error


@contextlib.contextmanager
def _as_os_errors() -> Iterator[None]:
    """Around calls of a remote system: it raises kinds of its own (botocore's, aiohttp's) that nobody can list."""
    try:
        yield
    except (OSError, ImportError, MemoryError):
        raise
    except Exception as error:
        raise OSError(errno.EIO, f"{type(error).__name__}: {error}") from error


@contextlib.contextmanager
def _as_input_errors(name: str) -> Iterator[None]:
    try:
        with _as_os_errors():
            yield
    except OSError as error:
        raise InputError(f"{name}: cannot be used ({error.strerror or error})") from error
