"""One run at a time in a folder or on a result: the second one says who is there, and leaves.

A lock is a file that names its holder: machine, process and since when. One of a dead process is taken over: on this
machine that is certain; of other machines, with which a disk may be shared, the holder is alive as long as it touches
the file, which it does every few seconds.
"""

import atexit
import contextlib
import functools
import json
import os
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from captioner.errors import InputError
from captioner.runtime.files import cannot_write, locked_temporary, read_small

TOUCH_EVERY_SECONDS = 10.0
DEAD_AFTER_SECONDS = 90.0
_MARK_START = b'{"host": '


@contextlib.contextmanager
def sole_run(path: Path, what: str) -> Iterator[None]:
    """Hold the lock file `path` while the block runs.

    Args:
        what: what is held, for the message of the second one, as "the folder runs/a".

    Raises:
        InputError: somebody alive holds it, or it cannot be written.
    """
    try:
        ours = _take(path, what)
    except OSError as error:
        raise cannot_write(path, error) from error
    give_back = functools.partial(_give_back, path, ours, os.getpid())
    atexit.register(give_back)  # an interruption may come in the midst of what is done in the end
    done = threading.Event()
    threading.Thread(target=_keep_touching, args=(path, done), daemon=True).start()
    try:
        yield
    finally:
        done.set()
        give_back()
        atexit.unregister(give_back)


def _give_back(path: Path, ours: tuple[int, int], process: int) -> None:
    with contextlib.suppress(OSError):
        if os.getpid() == process and _identity(path) == ours:
            path.unlink()


def _take(path: Path, what: str) -> tuple[int, int]:
    """Make the lock file; returns its `_identity`."""
    holder = {
        "host": socket.gethostname(),
        "machine": _machine(),
        "process": os.getpid(),
        "started": _started(os.getpid()),
        "since": time.strftime("%Y-%m-%d %H:%M:%S"),
    }
    mark = json.dumps(holder).encode() + b"\n"
    # Written beside it first: a lock is there with its whole content, or not at all.
    descriptor, temporary = locked_temporary(path)
    try:
        with os.fdopen(descriptor, "wb") as stream:
            stream.write(mark)
            stream.flush()
            while True:
                try:
                    os.link(temporary, path)
                    return _identity(temporary)
                except FileExistsError:
                    _remove_if_dead(path, temporary, what)
                except (OSError, NotImplementedError):  # a file system without links
                    with open(path, "xb") as plain:
                        plain.write(mark)
                    return _identity(path)
    finally:
        os.unlink(temporary)


def _identity(path: str | Path) -> tuple[int, int]:
    """Which file this is: unlike its content, known without reading, which may fail."""
    status = os.stat(path)
    return status.st_dev, status.st_ino


def _remove_if_dead(path: Path, temporary: str, what: str) -> None:
    """Remove the lock of a dead process.

    Raises:
        InputError: the holder is alive, or the file is no lock.
    """
    try:
        content, touched = read_small(path), path.stat().st_mtime
    except FileNotFoundError:
        return  # just given back
    if not _MARK_START.startswith(content.rstrip(b"\0")[: len(_MARK_START)]):
        raise InputError(f"{path}: is there, and is no lock of this program", remedy="move it away")
    os.utime(temporary)
    age = os.stat(temporary).st_mtime - touched  # both by the clock of the disk
    try:
        holder = json.loads(content)
        alive = _is_alive(holder, age)
        who = f"process {holder['process']} on {holder['host']}, since {holder['since']}"
    except (ValueError, KeyError, TypeError, RecursionError):  # one of a full disk, or of a machine that went down
        alive, who = age < DEAD_AFTER_SECONDS, "an unknown process"
    if alive:
        raise InputError(
            f"{what} is in use by {who}", remedy=f"wait for it, or choose another (if nobody is there, remove {path})"
        )
    # Renamed before it is removed: of two that find it dead only one removes it, and never the lock of the other.
    aside = f"{temporary}.dead"
    with contextlib.suppress(FileNotFoundError):
        os.rename(path, aside)
        if Path(aside).read_bytes() == content:
            os.unlink(aside)
        else:  # somebody was faster, and this is his
            os.rename(aside, path)


def _is_alive(holder: dict[str, Any], age: float) -> bool:
    if holder["machine"] != _machine():
        return age < DEAD_AFTER_SECONDS
    number = int(holder["process"])
    if number == os.getpid():
        return holder["started"] == _started(number)
    if os.name == "nt":  # os.kill would end it
        return age < DEAD_AFTER_SECONDS
    try:
        os.kill(number, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass  # another user's
    # The number may have gone to another process in the meantime.
    return _started(number) == holder["started"]


def _started(number: int) -> str:
    """When a process started, on machines that tell; "" elsewhere."""
    with contextlib.suppress(OSError, IndexError):
        return Path(f"/proc/{number}/stat").read_text().rpartition(")")[2].split()[19]
    return ""


def _machine() -> str:
    """Where process numbers mean the same: containers of one machine count their processes on their own."""
    with contextlib.suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{socket.gethostname()} {boot} {os.readlink('/proc/self/ns/pid')}"
    return socket.gethostname()


def _keep_touching(path: Path, done: threading.Event) -> None:
    while not done.wait(TOUCH_EVERY_SECONDS):
        with contextlib.suppress(OSError):
            os.utime(path)
