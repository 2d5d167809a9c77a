"""A file of equal records that takes hours to compute: all processes share the work, and a killed run loses a batch.

While it is computed, a folder `.NAME.parts` stands beside the file to come, with a file for each part of the records
that is done, whichever process did it; and `.NAME.partial`, which the main process puts together from them in the end.
Which parts there are does not depend on the processes: others, and fewer or more of them, go on where these stopped.
"""

import contextlib
import os
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from tqdm import tqdm

from captioner.errors import InputError
from captioner.runtime.files import atomic_write, resumable_write
from captioner.runtime.processes import Processes
from captioner.runtime.signals import Stopped

MOST_PARTS = 512  # in a round of parts processes wait for the slowest one, so none is large
VISIBLE_WITHIN = 120.0  # seconds: some network file systems show late what another machine has written
_TRAILER = "trailer"

# Numbers of records, and the trailer → their bytes, batch by batch.
Compute = Callable[[range, bytes], Iterator[bytes]]


@dataclass(frozen=True)
class Records:
    """What the file consists of, but for the trailer.

    Attributes:
        header: what comes before the records.
        count: of the records.
        size: bytes of each.
        batch: so many are computed at once.
    """

    header: bytes
    count: int
    size: int
    batch: int

    def parts(self) -> list[range]:
        """The numbers of the records of each part: whole batches, but for the last."""
        length = self.batch * -(-self.count // (self.batch * MOST_PARTS))
        return [range(first, min(first + length, self.count)) for first in range(0, self.count, length)]


def write_together(
    path: Path,
    records: Records,
    make_trailer: Callable[[], bytes],
    compute: Compute,
    processes: Processes,
    stop_signal: Callable[[], int],
    what: str,
) -> None:
    """Compute the records, those left by an earlier attempt, and write the file, which is whole or absent.

    Args:
        make_trailer: what comes after the records, and is known before them; called once, in the main process.
        stop_signal: the number of the signal that asked to stop, 0 if none has.
        what: the records are, for the progress bar.

    Raises:
        InputError: the folder cannot be written or is not the same for all, or another run is writing this file.
        Stopped: a process was asked to stop; all do.
    """
    folder = path.with_name(f".{path.name}.parts")
    with resumable_write(path) if processes.is_main else contextlib.nullcontext() as stream:
        found = _look(stream, folder, records, make_trailer) if stream else None
        left, trailer = processes.gather(found, patient=True)[0]
        done = records.count - sum(len(part) for part in left)
        hidden = None if processes.is_main else True  # None: on a terminal
        with tqdm(total=records.count, initial=done, desc=what, unit=" images", disable=hidden) as bar:
            for first in range(0, len(left), processes.size):
                in_this_round = left[first : first + processes.size]
                if processes.rank < len(in_this_round):
                    part = in_this_round[processes.rank]
                    with contextlib.suppress(Stopped):  # those who work on shall know
                        _compute_part(folder, part, records, trailer, compute, stop_signal, bar, len(in_this_round))
                if signal := processes.largest(stop_signal(), patient=True):
                    raise Stopped(signal)
        if stream:
            _put_together(stream, folder, records, trailer)
    if processes.is_main:
        shutil.rmtree(folder, ignore_errors=True)
    processes.wait()


def forget_parts(path: Path) -> None:
    """Remove what a process that was killed in its last moment has left beside the finished file."""
    shutil.rmtree(path.with_name(f".{path.name}.parts"), ignore_errors=True)


def _look(
    stream: IO[bytes], folder: Path, records: Records, make_trailer: Callable[[], bytes]
) -> tuple[list[range], bytes]:
    """The parts that are left to compute, and the trailer; the stream is cut to what is whole in it."""
    folder.mkdir(exist_ok=True)
    end = stream.tell()
    stream.seek(0)
    is_ours = stream.read(len(records.header)) == records.header
    there = (end - len(records.header)) // records.size if is_ours else 0
    together = max((part.stop for part in records.parts() if part.stop <= there), default=0)
    stream.truncate(len(records.header) + together * records.size if together else 0)
    if not together:
        stream.write(records.header)
    kept = folder / _TRAILER
    if not kept.exists():
        with atomic_write(kept) as copy:
            copy.write(make_trailer())
    left = [part for part in records.parts() if part.stop > together and not _is_whole(folder, part, records)]
    return left, kept.read_bytes()


def _file_of(folder: Path, part: range) -> Path:
    return folder / f"{part.start:09}-{part.stop:09}"


def _is_whole(folder: Path, part: range, records: Records) -> bool:
    path = _file_of(folder, part)
    return path.exists() and path.stat().st_size == len(part) * records.size


def _wait_for(folder: Path, part: range, records: Records) -> None:
    deadline = time.monotonic() + VISIBLE_WITHIN
    while not _is_whole(folder, part, records):
        if time.monotonic() > deadline:
            raise InputError(
                f"{_file_of(folder, part)}: was written by another machine, and is not to be seen here",
                expected="a folder that all machines share",
            )
        time.sleep(0.5)


def _compute_part(
    folder: Path,
    part: range,
    records: Records,
    trailer: bytes,
    compute: Compute,
    stop_signal: Callable[[], int],
    bar: tqdm,
    at_once: int,
) -> None:
    """Write the file of a part, after the whole batches that an earlier attempt has left of it."""
    with resumable_write(_file_of(folder, part)) as stream:
        done = stream.tell() // (records.batch * records.size) * records.batch
        stream.truncate(done * records.size)
        for values in compute(part[done:], trailer):
            stream.write(values)
            bar.update(len(values) // records.size * at_once)
            if signal := stop_signal():
                raise Stopped(signal)


def _put_together(stream: IO[bytes], folder: Path, records: Records, trailer: bytes) -> None:
    """Append the parts that are not there yet; each is removed when it is, so that the disk holds one of them twice."""
    together = (stream.seek(0, os.SEEK_END) - len(records.header)) // records.size
    for part in records.parts():
        if part.start >= together:
            _wait_for(folder, part, records)
            path = _file_of(folder, part)
            with path.open("rb") as source:
                shutil.copyfileobj(source, stream, 2**20)
            stream.flush()
            os.fsync(stream.fileno())
            path.unlink()
    stream.write(trailer)
