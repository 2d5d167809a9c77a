"""Files are written whole or not at all: a temporary name in the same folder, sync, rename."""

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from captioner.errors import InputError


@contextlib.contextmanager
def atomic_write(path: str | Path, mode: str = "wb", **open_kwargs: Any) -> Iterator[IO]:
    """Open a temporary file beside `path`; on success sync it and rename it to `path`.

    If the block raises, `path` keeps its old content and the temporary file is removed.

    Raises:
        InputError: the folder is missing, not writable or full.
    """
    path = Path(path)
    try:
        descriptor, temporary = tempfile.mkstemp(prefix=f".{path.name[:100]}.", suffix=".tmp", dir=path.parent)
    except OSError as error:
        raise cannot_write(path, error) from error
    try:
        with os.fdopen(descriptor, mode, **open_kwargs) as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, path)
    except OSError as error:
        raise cannot_write(path, error) from error
    finally:
        with contextlib.suppress(FileNotFoundError):  # renamed: the usual case
            os.unlink(temporary)


def require_writable_folder(folder: str | Path, purpose: str) -> Path:
    """Create `folder` if needed and prove that it can be written to, before hours of work depend on it.

    Raises:
        InputError: it cannot be created or written.
    """
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise InputError(
            f"{folder}: cannot write {purpose} here ({error.strerror or error})", remedy="choose another folder"
        ) from error
    return folder


def cannot_write(path: str | Path, error: OSError) -> InputError:
    """The line for a failed write: the file, the system's reason, and what helps."""
    return InputError(
        f"{path}: cannot be written ({error.strerror or error})",
        remedy="check the folder, its permissions and the free disk space",
    )


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def cache_folder() -> Path:
    """Where things are kept that can be made again (XDG base directories); it need not exist yet."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "captioner"
