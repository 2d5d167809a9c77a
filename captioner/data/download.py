"""Download lists of pictures: many connections, resumed, retried, checked.

A line of a list is a URL, or URL<tab>path, or URL<tab>path<tab>checksum ("sha256:..", "md5:.."). A file is there
under its name only when it is complete and, if it is called like a picture, can be decoded as one; until then it is
NAME.part. What failed is listed in FOLDER/failed.tsv, with the reason, in the form of the list itself.
"""

import contextlib
import email.utils
import hashlib
import http.client
import json
import logging
import math
import os
import queue
import random
import threading
import time
import urllib.error
import urllib.request
from collections import Counter, deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from tqdm import tqdm

from captioner.data.address_lists import NOTE, PART, REPORT, Item, read_lists
from captioner.data.image_formats import usual_formats
from captioner.data.images import read_image
from captioner.errors import InputError
from captioner.runtime.files import atomic_write, read_small, require_writable_folder
from captioner.runtime.locks import sole_run

log = logging.getLogger(__name__)

_CHUNK = 2**16
_MIN_BYTES_PER_SECOND = 1024  # slower than this on average is as good as dead
_LONGEST_PAUSE = 60.0
_LEAVING_SECONDS = 1.0  # that an interruption waits for files under way to be closed
_WORTH_RETRYING = {408, 425, 429, 500, 502, 503, 504}


class Failure(Exception):
    """One attempt failed; `again` says whether another may succeed, `pause` what the server asked for in seconds."""

    def __init__(self, reason: str, again: bool, pause: float = 0.0) -> None:
        super().__init__(reason)
        self.again = again
        self.pause = pause


@dataclass(frozen=True)
class Limits:
    """How long and how much: retries, seconds of silence, seconds before the first retry, bytes of one file, seconds
    of one attempt."""

    retries: int = 5
    timeout: float = 30.0
    pause: float = 1.0
    max_bytes: int = 2**29
    max_seconds: float = math.inf


_USUAL = Limits()


def download_lists(
    lists: Sequence[Path],
    folder: Path,
    *,
    connections: int = 16,
    limits: Limits = _USUAL,
    per_folder: int | None = None,
    only: Sequence[str] = (),
    numbered: bool = False,
) -> int:
    """Fetch all files of some lists; those that are there already are left out.

    Args:
        lists: text files. Of several, the pictures without a path of their own go into a folder named as their list.
        folder: where the files go.
        connections: downloads at a time.
        per_folder: files wanted in each folder; addresses that fail are replaced by later ones. None: all of them.
        only: the folders to fetch; empty: all of them.
        numbered: name files 000001.jpg and so on in each folder, not by their addresses, where a list names none.

    Returns:
        How many files of the lists are there now.

    Raises:
        InputError: a list or the folder is at fault, or files are missing.
    """
    items = read_lists(lists, numbered)
    folders = {_folder_of(item) for item in items}
    unknown = sorted(set(only) - folders)
    if unknown:
        raise InputError(f"--only {unknown[0]}: no such folder in the lists", expected=_some(sorted(folders)))
    items = [item for item in items if not only or _folder_of(item) in only]
    require_writable_folder(folder, "the files")
    with sole_run(folder / ".caption-download.lock", f"the folder {folder}"):
        return _fetch_into(folder, lists, items, connections, limits, per_folder)


def _fetch_into(
    folder: Path,
    lists: Sequence[Path],
    items: Sequence[Item],
    connections: int,
    limits: Limits,
    per_folder: int | None,
) -> int:
    """Fetch what is missing, and write the report; returns how many files are there."""
    report = folder / REPORT
    _require_ours(report)
    if report.exists() and any(report.samefile(path) for path in lists):
        raise InputError(f"{report}: would be replaced while it is the list", remedy="give a copy of it another name")
    failed = _fetch_enough(items, folder, connections, limits, per_folder)
    there = Counter(_folder_of(item) for item in items if os.path.exists(folder / item.path))
    if failed:
        with atomic_write(report, "w", encoding="utf-8") as stream:
            for item, reason in failed:
                stream.write(
                    f"# {' '.join(reason.split())}\n"
                    + "\t".join(filter(None, (item.url, item.path, item.checksum)))
                    + "\n"
                )
    else:
        report.unlink(missing_ok=True)
    wanted = Counter(_folder_of(item) for item in items)
    short = [name for name, count in wanted.items() if there[name] < min(count, per_folder or count)]
    if short:
        first, reason = next(one for one in failed if _folder_of(one[0]) in short)
        raise InputError(
            f"{len(failed):,} of {len(items):,} files could not be fetched, the first is {first.url} ({reason})",
            remedy=f"see {report}, and run the same command again",
        )
    return there.total()


def _require_ours(report: Path) -> None:
    """Refuse to replace a file that is no report of ours.

    Raises:
        InputError: it is somebody else's, or no file.
    """
    if not os.path.lexists(report):
        return
    try:
        lines = read_small(report).splitlines()
    except OSError as error:
        raise InputError(f"{report}: cannot be replaced ({error.strerror or error})", remedy="move it away") from error
    reasons, addresses = lines[::2], lines[1::2]
    is_ours = len(reasons) == len(addresses) and all(one.startswith(b"# ") for one in reasons)
    if not (is_ours and all(one.lower().startswith((b"http://", b"https://")) for one in addresses)):
        raise InputError(f"{report}: is there already, but not from caption-download", remedy="move it away")


def _folder_of(item: Item) -> str:
    return PurePosixPath(item.path).parent.as_posix()


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (", .." if len(names) > 5 else "")


def _fetch_enough(
    items: Sequence[Item], folder: Path, connections: int, limits: Limits, per_folder: int | None
) -> list[tuple[Item, str]]:
    """In rounds: each replaces what failed in the one before."""
    failed: list[tuple[Item, str]] = []
    if per_folder is None:
        return download(items, folder, connections, limits)
    waiting: dict[str, deque[Item]] = {}
    missing: dict[str, int] = {}
    for item in items:
        name = _folder_of(item)
        missing.setdefault(name, per_folder)
        if os.path.exists(folder / item.path):
            missing[name] -= 1
        else:
            waiting.setdefault(name, deque()).append(item)
    while True:
        batch = [
            queue.popleft() for name, queue in waiting.items() for _ in range(max(0, min(missing[name], len(queue))))
        ]
        if not batch:
            return failed
        lost = download(batch, folder, connections, limits)
        for name in waiting:
            asked = sum(_folder_of(item) == name for item in batch)
            missing[name] -= asked - sum(_folder_of(item) == name for item, _ in lost)
        failed += lost


def download(items: Sequence[Item], folder: Path, connections: int, limits: Limits) -> list[tuple[Item, str]]:
    """Fetch files in parallel, leaving out those that are there; returns what failed, with the reasons."""
    stop = threading.Event()
    failed: dict[Item, str] = {}
    todo = []
    for item in items:
        if os.path.exists(folder / item.path):
            _drop_note(folder / item.path)
        else:
            todo.append(item)
    waiting: queue.SimpleQueue[Item] = queue.SimpleQueue()
    for item in todo:
        waiting.put(item)
    done: queue.SimpleQueue[tuple[Item, str | BaseException]] = queue.SimpleQueue()

    def work() -> None:
        with contextlib.suppress(queue.Empty):
            while not stop.is_set():
                item = waiting.get_nowait()
                try:
                    done.put((item, _fetch_with_retries(item, folder, limits, stop)))
                except BaseException as error:  # raised below, where somebody waits for it
                    done.put((item, error))

    # Daemons: an executor's threads are waited for when the process ends, however long a server is silent.
    threads = [threading.Thread(target=work, daemon=True) for _ in range(min(connections, len(todo)))]
    for thread in threads:
        thread.start()
    try:
        with tqdm(total=len(items), initial=len(items) - len(todo), unit=" files", disable=None) as bar:
            for _ in todo:
                item, outcome = done.get()
                if isinstance(outcome, BaseException):
                    raise outcome
                bar.update()
                if outcome:
                    failed[item] = outcome
                    log.warning("%s: %s", item.url, outcome)
    finally:
        stop.set()
        deadline = time.monotonic() + _LEAVING_SECONDS
        for thread in threads:
            thread.join(max(0.0, deadline - time.monotonic()))
    return [(item, failed[item]) for item in items if item in failed]


def _fetch_with_retries(item: Item, folder: Path, limits: Limits, stop: threading.Event) -> str:
    """Returns "" or the reason of the last failure."""
    for attempt in range(limits.retries + 1):
        if stop.is_set():
            return "interrupted"
        try:
            fetch(item, folder / item.path, limits, stop)
            return ""
        except Failure as failure:
            reason = str(failure)
            if not failure.again or attempt == limits.retries:
                break
            # Twice as long each time, and not all connections at the same moment.
            pause = max(failure.pause, limits.pause * 2**attempt * random.uniform(0.5, 1.5))
            stop.wait(min(pause, _LONGEST_PAUSE))
    return reason if attempt == 0 else f"{reason}, after {attempt + 1} attempts"


def fetch(item: Item, target: Path, limits: Limits, stop: threading.Event) -> None:
    """One attempt to get one file, going on from what an earlier attempt has left.

    Raises:
        Failure: with the reason; also when `stop` is set, at the next piece of the file.
    """
    part = target.with_name(target.name + PART)
    note = target.with_name(target.name + NOTE)  # which version of the file the part is of
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        for path in (part, note):
            if os.path.lexists(path) and (path.is_symlink() or not path.is_file() or not os.path.lexists(note)):
                raise Failure(f"{path} is there already, but not from here", again=False)
        start, validator = _left_over(part, note)
        request = urllib.request.Request(item.url, headers={"User-Agent": "captioner-download"})
        if start:
            request.add_header("Range", f"bytes={start}-")
            request.add_header("If-Range", validator)
        with urllib.request.urlopen(request, timeout=limits.timeout) as response:
            if stop.is_set():  # the folder may be somebody else's by now
                raise Failure("interrupted", again=False)
            if response.status != 206:
                start = 0
            elif not str(response.headers.get("Content-Range", "")).startswith(f"bytes {start}-"):
                part.unlink()
                raise Failure("the server continued at the wrong place", again=True)
            validator = response.headers.get("ETag") or response.headers.get("Last-Modified") or ""
            note.write_text(json.dumps("" if validator.startswith("W/") else validator), encoding="utf-8")
            _save(response, part, start, limits, stop)
        _check(item, part, target.suffix)
        part.replace(target)
        note.unlink(missing_ok=True)
    except urllib.error.HTTPError as error:
        with error:
            if error.code == 416:  # the part is longer than the file: it was another one
                part.unlink(missing_ok=True)
                raise Failure("the server has less than was fetched before", again=True) from None
            pause = _retry_after(error.headers.get("Retry-After", ""))
            raise Failure(f"HTTP {error.code} {error.reason}", error.code in _WORTH_RETRYING, pause) from None
    except (urllib.error.URLError, http.client.HTTPException, TimeoutError, ConnectionError) as error:
        reason = getattr(error, "reason", None) or error
        raise Failure(f"no answer ({reason})" if str(reason) else f"no answer ({type(error).__name__})", True) from None
    except OSError as error:
        raise Failure(f"{part}: cannot be written ({error.strerror or error})", again=False) from None


def _drop_note(target: Path) -> None:
    """Remove the note of a file that was complete when the process was killed."""
    note = target.with_name(target.name + NOTE)
    if os.path.lexists(note) and not os.path.lexists(target.with_name(target.name + PART)):
        with contextlib.suppress(OSError, ValueError, RecursionError):
            if isinstance(json.loads(read_small(note)), str):
                note.unlink()


def _left_over(part: Path, note: Path) -> tuple[int, str]:
    """How much of the file is there, and of which version; without a version there is nothing to build on."""
    try:
        validator = json.loads(note.read_text(encoding="utf-8"))
        size = part.stat().st_size
    except (OSError, ValueError, RecursionError):
        return 0, ""
    return (size, validator) if validator and isinstance(validator, str) else (0, "")


def _save(response: http.client.HTTPResponse, part: Path, start: int, limits: Limits, stop: threading.Event) -> None:
    announced = response.headers.get("Content-Length", "")
    expected = start + int(announced) if announced.isdecimal() and len(announced) < 20 else None
    if expected is not None and expected > limits.max_bytes:
        raise Failure(f"it holds {expected:,} bytes, more than allowed", again=False)
    began, received = time.monotonic(), 0
    with part.open("r+b" if start else "wb") as stream:
        stream.seek(start)
        stream.truncate()
        # read1 returns what has come: a slow server must not keep us from looking at the clock.
        while chunk := response.read1(_CHUNK):
            stream.write(chunk)
            received += len(chunk)
            if stop.is_set():
                raise Failure("interrupted", again=False)
            if start + received > limits.max_bytes:
                raise Failure(f"it goes on after {limits.max_bytes:,} bytes", again=False)
            seconds = time.monotonic() - began
            if seconds > limits.timeout and received < seconds * _MIN_BYTES_PER_SECOND:
                raise Failure(f"too slow: {received:,} bytes in {seconds:.0f} s", again=True)
            if seconds > limits.max_seconds:
                raise Failure(f"not complete after {seconds:.0f} s", again=False)
    if expected is not None and start + received < expected:
        raise Failure(f"cut off after {start + received:,} of {expected:,} bytes", again=True)


def _check(item: Item, part: Path, suffix: str) -> None:
    """Compare the checksum, and decode what is called like a picture."""
    checks: list[Callable[[], str]] = []
    if item.checksum:
        checks.append(lambda: _checksum_mismatch(item.checksum, part))
    if usual_formats(suffix):
        checks.append(lambda: _no_picture(part))
    for check in checks:
        reason = check()
        if reason:
            part.unlink()  # nothing to go on from
            raise Failure(reason, again=True)


def _checksum_mismatch(checksum: str, part: Path) -> str:
    name, _, expected = checksum.partition(":")
    digest = hashlib.new(name)
    with part.open("rb") as stream:
        for chunk in _chunks(stream.read):
            digest.update(chunk)
    return "" if digest.hexdigest() == expected else f"its {name} is {digest.hexdigest()}, not {expected}"


def _chunks(read: Callable[[int], bytes]) -> Iterable[bytes]:
    return iter(lambda: read(2**20), b"")


def _no_picture(part: Path) -> str:
    try:
        read_image(part)
    except InputError as error:
        return str(error).removeprefix(f"{part}: ")
    return ""


def _retry_after(value: str) -> float:
    """Seconds, from a number or a date."""
    if value.strip().isdecimal():
        return float(value)
    try:
        return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - time.time())
    except (TypeError, ValueError, OverflowError):
        return 0.0
