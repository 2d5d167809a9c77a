"""Files are written whole or not at all: a temporary name in the same folder, sync, rename."""

import contextlib
import functools
import json
import os
import re
import shutil
import stat
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any

from captioner.errors import InputError
from captioner.runtime.regular_files import open_regular

LARGEST_SMALL = 2**30  # of a file that is read at once: far beyond any list or description

_PICTURES = re.compile(
    rb"\xff\xd8\xff|\x89PNG\r\n|GIF8[79]a|RIFF.{4}WEBP|BM.{4}\0\0\0\0|II\*\0|MM\0\*"
    rb"|.{4}ftyp(?:hei[cxms]|hev[cmx]|mif1|msf1|avi[fs]|crx )",  # other files of this make are films
    re.DOTALL,
)
_inputs: dict[tuple[int, int], str] = {}  # of the running command: device and number of the file, and its name
_TEMPORARY = re.compile(r"(\..+\.)[a-z0-9_]{8}\.tmp")  # as mkstemp makes them
_left_over: dict[Path, dict[str, list[Path]]] = {}  # by folder and beginning: temporary files found when we first came


@contextlib.contextmanager
def atomic_write(path: str | Path, mode: str = "wb", *, pictures: bool = False, **open_kwargs: Any) -> Iterator[IO]:
    """Open a temporary file beside `path`; on success sync it and rename it to `path`.

    If the block raises, `path` keeps its old content and the temporary file is removed. One that a killed process
    left is removed by the next write to the same path. A link is followed. Text is UTF-8; what it cannot hold, as bytes
    of file names that are no text, is escaped as JSON does.

    Args:
        pictures: whether a picture that is there may be replaced, for it is a copy of ours.

    Raises:
        InputError: the folder is missing, not writable or full, or `path` must not be replaced.
    """
    require_replaceable(path, pictures)
    path = Path(os.path.realpath(path))
    if "b" not in mode:
        open_kwargs = {"encoding": "utf-8", "errors": "backslashreplace", **open_kwargs}
    try:
        descriptor, temporary = locked_temporary(path)
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
    except RuntimeError as error:  # torch.save replaces the system's error by one of its own
        if isinstance(error.__context__, OSError):
            raise cannot_write(path, error.__context__) from error
        raise
    finally:
        with contextlib.suppress(FileNotFoundError):  # renamed: the usual case
            os.unlink(temporary)


@contextlib.contextmanager
def resumable_write(path: str | Path) -> Iterator[IO[bytes]]:
    """For hours of work: open `.NAME.partial` beside `path`; on success sync it and rename it to `path`.

    If the block raises, or the process is killed, what was written stays for the next attempt, which finds it in the
    stream. All writes go to its end: the caller cuts off what is not whole, and goes on from there.

    Raises:
        InputError: the folder is missing, not writable or full, another process is at it, or `path` must not be
            replaced.
    """
    require_replaceable(path)
    path = Path(os.path.realpath(path))
    partial = path.with_name(f".{path.name}.partial")
    try:
        with open(partial, "a+b") as stream:
            if _lock(stream.fileno()) is False:
                raise InputError(f"{path}: another process is writing it", remedy="wait for it, then run again")
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(partial, path)
    except OSError as error:
        raise cannot_write(path, error) from error


def rewrite(path: str | Path, change: Callable[[bytes], bytes | None]) -> bool:
    """Add something to a user's own file that leaves the rest of it alone, as metadata to a photo; only when asked.

    Unlike `atomic_write` this may be an input or a picture. Mode, owner, extended attributes and times stay as they
    are, that of the last change too, for what the file shows is the same. A link is followed.

    Args:
        change: the content → the new content; None: as it is. What it raises is passed on.

    Returns:
        Whether the file is another one now.

    Raises:
        InputError: it is no file, read-only, was changed by somebody else meanwhile, or cannot be written.
    """
    path = Path(os.path.realpath(path))
    try:
        with open_regular(path, LARGEST_SMALL) as stream:
            found = os.fstat(stream.fileno())
            content = stream.read()
        if not found.st_mode & 0o222:
            raise InputError(f"{path}: is read-only, and stays as it is")
        changed = change(content)
        if changed is None or changed == content:
            return False
        descriptor, temporary = locked_temporary(path)
        try:
            with os.fdopen(descriptor, "wb") as stream:
                stream.write(changed)
                stream.flush()
                os.fsync(stream.fileno())
            if hasattr(os, "chown"):
                with contextlib.suppress(PermissionError):  # only root may give files away
                    os.chown(temporary, found.st_uid, found.st_gid)
            shutil.copystat(path, temporary)
            now = os.stat(path)
            if (now.st_ino, now.st_size, now.st_mtime_ns) != (found.st_ino, found.st_size, found.st_mtime_ns):
                raise InputError(f"{path}: was changed meanwhile, and stays as it is")
            os.replace(temporary, path)
        finally:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(temporary)
    except OSError as error:
        raise cannot_write(path, error) from error
    return True


def locked_temporary(path: Path) -> tuple[int, str]:
    """A new file beside `path` and its name, in place of those that killed processes left there.

    As long as it is open `remove_left_over` leaves it alone.

    Raises:
        OSError: it cannot be made.
    """
    remove_left_over(path)
    while True:
        descriptor, temporary = tempfile.mkstemp(prefix=_prefix_of(path), suffix=".tmp", dir=path.parent)
        if _lock(descriptor) is not False and os.path.exists(temporary):
            return descriptor, temporary
        os.close(descriptor)  # another process took it for one that is left over, before it was locked


def _lock(descriptor: int) -> bool | None:
    """Hold a file as long as it is open; False: another process does; None: there are no locks here.

    The system frees what a dead process held.
    """
    try:
        import fcntl
    except ImportError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


def remove_left_over(path: Path) -> None:
    """Remove temporary files of killed processes that wrote the same path; a folder is looked through once.

    Raises:
        OSError: the folder cannot be read.
    """
    folder = path.parent.resolve()  # a relative one is another after os.chdir
    if folder not in _left_over:
        found = _left_over[folder] = {}
        with os.scandir(folder) as entries:
            for entry in entries:
                match = _TEMPORARY.fullmatch(entry.name)
                if match:
                    found.setdefault(match[1], []).append(Path(entry.path))
    for temporary in _left_over[folder].pop(_prefix_of(path), ()):
        with contextlib.suppress(OSError), temporary.open("rb") as stream:
            if _lock(stream.fileno()):
                temporary.unlink()


def _prefix_of(path: Path) -> str:
    """Of the names of temporary files beside it; names of files may have 255 bytes."""
    return f".{path.name[:100]}."


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


def read_small(path: str | Path) -> bytes:
    """The bytes of a regular file.

    Raises:
        OSError: it is none, holds more than LARGEST_SMALL bytes, or cannot be read.
    """
    with open_regular(path, LARGEST_SMALL) as stream:
        return stream.read()


def read_json(path: str | Path, what: str = "", remedy: str = "") -> Any:
    """What a JSON file holds.

    Args:
        what: such a file is, for messages.
        remedy: what to do about it.

    Raises:
        InputError: it cannot be read, or is damaged: no UTF-8, no JSON, or nested too deeply.
    """
    name = f"{path}: {what}" if what else str(path)
    try:
        return json.loads(read_small(path).decode("utf-8"))
    except OSError as error:
        raise InputError(f"{name} cannot be read ({error.strerror or error})", remedy=remedy) from error
    except ValueError as error:
        raise InputError(f"{name} is not JSON ({error})", remedy=remedy) from error
    except RecursionError:
        raise InputError(f"{name} is nested too deeply", remedy=remedy) from None


def identity_of(path: str | Path, size: bool = True) -> str:
    """The same for the same file with the same content, as far as its place, its size (if `size`) and time tell."""
    place = os.path.realpath(path)
    try:
        found = os.stat(place)
    except (OSError, ValueError):  # its reader will have something to say
        return place
    return f"{place}\0{found.st_size if size else ''}\0{found.st_mtime_ns}"


def shortest_names(paths: Sequence[str | Path]) -> list[str]:
    """What tells files apart: their names without ending, with as many of the folders above as that takes."""
    parts = [Path(os.path.abspath(path)).with_suffix("").parts for path in paths]
    for count in range(1, max(map(len, parts)) + 1):
        names = ["/".join(of_file[-count:]) for of_file in parts]
        if len(set(names)) == len(names):
            return names
    return list(map(str, paths))  # of one name, with different endings


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
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "captioner"
    except RuntimeError:  # a user without a home, as in a container
        return Path(tempfile.gettempdir()) / "captioner"


def protect(path: str | Path) -> None:
    """From now on no output of this process replaces that file."""
    try:
        found = os.stat(path)
    except (OSError, ValueError):  # its reader will have something to say
        return
    if stat.S_ISREG(found.st_mode):
        _inputs[found.st_dev, found.st_ino] = str(path)


def protect_stdin() -> None:
    """As `protect`, of the file that stdin comes from, if it is one."""
    with contextlib.suppress(OSError):  # closed
        found = os.fstat(0)
        if stat.S_ISREG(found.st_mode):
            _inputs[found.st_dev, found.st_ino] = "stdin"


def forget_inputs() -> None:
    """A command has ended: what it read may be replaced by what comes next in this process."""
    _inputs.clear()


def require_replaceable(path: str | Path, pictures: bool = False) -> None:
    """What holds for every file that is written, whatever the user says.

    Args:
        pictures: whether a picture may be replaced: the writer knows that it is a copy of its own.

    Raises:
        InputError: there is an input of this command, what it prints to, somebody's picture, a folder, or a device.
    """
    try:
        found = os.stat(path)
    except FileNotFoundError:
        return
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise InputError(f"{path}: cannot be written ({reason})", remedy="choose another name") from error
    if stat.S_ISDIR(found.st_mode):
        raise InputError(f"{path}: is a folder", expected="the name of a file")
    if not stat.S_ISREG(found.st_mode):
        raise InputError(f"{path}: is a device or a pipe", expected="the name of a file")
    known = _inputs.get((found.st_dev, found.st_ino))
    if known is not None:
        also = "" if known == str(path) else f" ({known})"
        raise InputError(f"{path}: is an input of this command{also}", remedy="choose another name for the output")
    if any(map(functools.partial(_goes_to, found), (1, 2))):
        raise InputError(f"{path}: is what this command prints to", remedy="choose another name for the output")
    if not pictures and _PICTURES.match(_first_bytes(path)):
        raise InputError(f"{path}: is a picture, which would be lost", remedy="choose another name")


def _goes_to(file: os.stat_result, descriptor: int) -> bool:
    """Whether a descriptor writes into a file."""
    with contextlib.suppress(OSError):  # closed
        return os.path.samestat(file, os.fstat(descriptor))
    return False


def _first_bytes(path: str | Path) -> bytes:
    try:
        with open(path, "rb") as stream:
            return stream.read(16)
    except OSError as error:
        raise InputError(f"{path}: exists, and cannot be read ({error.strerror or error})") from error
