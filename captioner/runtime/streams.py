"""stdout, stderr and the log of a command: whatever they are connected to, and whatever is written to them."""

import contextlib
import logging
import os
import sys
from collections.abc import Iterator
from pathlib import PurePath
from typing import IO, Any

from captioner.errors import InputError, printable, shortened


class LogFormatter(logging.Formatter):
    """One line for each record: what was filled into it, as names of files, is printable."""

    def format(self, record: logging.LogRecord) -> str:
        if isinstance(record.args, tuple):
            record.args = tuple(map(_printable, record.args))
        return super().format(record)


def _printable(value: object) -> object:
    return printable(shortened(str(value))) if isinstance(value, str | PurePath | Exception) else value


class _Results:
    """stdout for results: control characters but tabs and line ends are escaped, failures are an InputError."""

    def __init__(self, stream: IO[str]) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        try:
            self._stream.write(printable(text, keep="\n\t"))
        except BrokenPipeError:
            raise
        except OSError as error:
            raise _cannot_print(error) from error
        return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except BrokenPipeError:
            raise
        except OSError as error:
            raise _cannot_print(error) from error

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def _cannot_print(error: OSError) -> InputError:
    return InputError(
        f"the output stream cannot be written ({error.strerror or error})", remedy="check where the output goes"
    )


@contextlib.contextmanager
def guarded_streams() -> Iterator[None]:
    """Make sys.stdout and sys.stderr safe to write to while a command runs.

    Closed ones swallow what they get; characters that the stream's encoding lacks are escaped.
    """
    _fill_closed_descriptors()
    before = sys.stdout, sys.stderr
    for stream in before:
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    nowhere = None
    if None in before:
        nowhere = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
    sys.stdout = _Results(before[0] or nowhere)  # type: ignore[arg-type]
    sys.stderr = before[1] or nowhere
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before
        if nowhere:
            nowhere.close()


def _fill_closed_descriptors() -> None:
    """A closed 0, 1 or 2 would be the number of the next file, and what C code prints would go into it."""
    while True:
        descriptor = os.open(os.devnull, os.O_RDWR)
        if descriptor > 2:
            os.close(descriptor)
            return
