"""Pictures of many files → the pixels of a dataset file, in one pass that can be interrupted.

While it runs there are DATA.h5.partial, pixels without the structure that would make it an h5 file, and
DATA.h5.journal, one line per picture that is safely in it. Only a finished file gets its name.
"""

import contextlib
import hashlib
import json
import logging
import os
import shutil
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import IO

import numpy as np
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from captioner.data.dataset import IMAGE_BYTES, IMAGE_OFFSET
from captioner.data.decode_pool import read_images
from captioner.data.image_mode import ImageMode
from captioner.data.images import READING_RULES
from captioner.errors import InputError
from captioner.runtime.files import atomic_write, cannot_write
from captioner.runtime.quantities import bytes_text

log = logging.getLogger(__name__)

_PARTIAL, _JOURNAL = ".partial", ".journal"
_JOURNAL_START = b'{"pictures": '
_H5_SIGNATURE = b"\x89HDF\r\n\x1a\n"
_SYNC_SECONDS = 2.0  # at most this much work is lost when the machine goes down


class PartialPixels:
    """The pixels written so far, and what became of each picture.

    Args:
        h5_path: the dataset file to come.
        paths: all pictures in order; a partial file of the same list is continued.
        resume: False starts afresh in any case.
        image_mode: what becomes of pictures that are no squares.

    Raises:
        InputError: the files cannot be written, or another run is writing them.
    """

    def __init__(
        self, h5_path: Path, paths: Sequence[str], resume: bool = True, image_mode: ImageMode = "squash"
    ) -> None:
        self.pixels_path = h5_path.with_name(h5_path.name + _PARTIAL)
        self.journal_path = h5_path.with_name(h5_path.name + _JOURNAL)
        self.reasons: list[str | None] = []  # of the pictures done: None if it is in the file
        self.num_rows = 0
        self.paths = paths
        self.image_mode: ImageMode = image_mode
        self._unsynced: list[str | None] = []
        self._synced_at = time.monotonic()
        for path, is_ours in ((self.pixels_path, _holds_pixels), (self.journal_path, _holds_journal)):
            if path.exists() and not is_ours(path):
                raise InputError(f"{path}: is there already, but not from caption-prepro", remedy="move it away")
        try:
            # Both stay open until close().
            mode = "r+b" if self.pixels_path.exists() else "w+b"
            self._pixels: IO[bytes] = open(self.pixels_path, mode, buffering=0)  # noqa: SIM115
            _lock(self._pixels, self.pixels_path)
            header = json.dumps({"pictures": len(paths), "key": _key(paths, image_mode)})
            if not (resume and self._load(header)):
                self._begin(header)
            self._journal: IO[str] = open(self.journal_path, "a", encoding="utf-8")  # noqa: SIM115
        except OSError as error:
            if hasattr(self, "_pixels"):
                self._pixels.close()  # with its lock, for the next attempt of this process
            raise cannot_write(self.pixels_path, error) from error

    def add(self, result: np.ndarray | str) -> None:
        """Append the next picture, or the reason why there is none."""
        if isinstance(result, str):
            self._unsynced.append(result)
        else:
            try:
                _write_all(self._pixels, np.ascontiguousarray(result).data.cast("B"))
            except OSError as error:
                raise cannot_write(self.pixels_path, error) from error
            self._unsynced.append(None)
            self.num_rows += 1
        if time.monotonic() - self._synced_at > _SYNC_SECONDS:
            self.sync()

    def sync(self) -> None:
        """Bring the pixels to the disk, then the lines of the journal that vouch for them."""
        try:
            os.fsync(self._pixels.fileno())
            for path, reason in zip(self.paths[len(self.reasons) :], self._unsynced, strict=False):
                line = None if reason is None else [reason, *_signature(path)]
                self._journal.write(json.dumps(line) + "\n")
            self._journal.flush()
            os.fsync(self._journal.fileno())
        except OSError as error:
            raise cannot_write(self.pixels_path, error) from error
        self.reasons += self._unsynced
        self._unsynced = []
        self._synced_at = time.monotonic()

    def publish(self, h5_path: Path) -> None:
        """Give the finished file its name."""
        self.close()  # Windows renames no open file
        try:
            os.replace(self.pixels_path, h5_path)
            self.journal_path.unlink()
        except OSError as error:
            raise cannot_write(h5_path, error) from error

    def discard(self) -> None:
        """Remove both files."""
        self.close()
        for path in (self.pixels_path, self.journal_path):
            path.unlink(missing_ok=True)

    def close(self) -> None:
        self._pixels.close()
        with contextlib.suppress(OSError):  # a full disk; what could be synced is synced
            self._journal.close()

    def __enter__(self) -> "PartialPixels":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None and self._unsynced:
            with contextlib.suppress(InputError):  # the first error is the one to report
                self.sync()
        self.close()

    def _load(self, header: str) -> bool:
        """Take up the journal if it belongs to these pictures and the pixels are there."""
        try:
            lines = self.journal_path.read_text(encoding="utf-8").split("\n")[:-1]  # the last line may be cut off
        except (OSError, UnicodeDecodeError):
            return False
        if not lines or lines[0] != header:
            if lines:
                log.warning("%s belongs to other pictures: starting afresh", self.journal_path)
            return False
        try:
            self.reasons = list(_still_true([json.loads(line) for line in lines[1:]], self.paths))
        except (ValueError, TypeError, IndexError, RecursionError):
            log.warning("%s is damaged: starting afresh", self.journal_path)
            return False
        self.num_rows = self.reasons.count(None)
        end = IMAGE_OFFSET + self.num_rows * IMAGE_BYTES
        if os.fstat(self._pixels.fileno()).st_size < end:
            log.warning("%s is shorter than its journal says: starting afresh", self.pixels_path)
            return False
        self._pixels.truncate(end)
        self._pixels.seek(end)
        # A cut-off last line must not be continued by the next one.
        with atomic_write(self.journal_path, "w", encoding="utf-8") as stream:
            stream.writelines(line + "\n" for line in lines[: len(self.reasons) + 1])
        if self.reasons:
            log.info("continuing after %d of %d pictures", len(self.reasons), len(self.paths))
        return True

    def _begin(self, header: str) -> None:
        self.reasons, self.num_rows = [], 0
        self._pixels.truncate(0)
        self._pixels.truncate(IMAGE_OFFSET)
        self._pixels.seek(IMAGE_OFFSET)
        self.journal_path.write_text(header + "\n", encoding="utf-8")


def fill(partial: PartialPixels, num_workers: int) -> Iterator[tuple[int, str]]:
    """Read the pictures that `partial` does not have yet; yields index and reason of each unreadable one.

    An unreadable picture is noted only when the next one is asked for: who stops there can continue with it.
    """
    done = len(partial.reasons)
    yield from ((index, reason) for index, reason in enumerate(partial.reasons[:]) if reason is not None)
    for index, result in enumerate(
        read_with_progress(partial.paths, num_workers, done, partial.image_mode), start=done
    ):
        if isinstance(result, str):
            yield index, result
        partial.add(result)
    partial.sync()


def read_with_progress(
    paths: Sequence[str], num_workers: int, done: int = 0, image_mode: ImageMode = "squash"
) -> Iterator[np.ndarray | str]:
    """`read_images` of the paths after the first `done`, with a progress bar on a terminal."""
    with (
        contextlib.closing(read_images(paths[done:], num_workers, image_mode=image_mode)) as results,
        tqdm(total=len(paths), initial=done, unit=" images", disable=None, smoothing=0.05) as bar,
        logging_redirect_tqdm(),  # a line about a picture goes above the bar
    ):
        for result in results:
            yield result
            bar.update()


def require_disk_space(h5_path: Path, num_images: int, num_captions: int, max_length: int) -> None:
    """Compare what a dataset needs with what is free, before the first byte is written.

    Raises:
        InputError: it will not fit.
    """
    needed = dataset_bytes(num_images, num_captions, max_length)
    partial = h5_path.with_name(h5_path.name + _PARTIAL)
    free = shutil.disk_usage(h5_path.parent).free + (partial.stat().st_size if partial.exists() else 0)
    if needed > free:
        raise InputError(
            f"{h5_path}: {num_images:,} images need {bytes_text(needed)}, but only {bytes_text(free)} are free",
            remedy="free some space, or name another disk with --output_h5",
        )


def dataset_bytes(num_images: int, num_captions: int, max_length: int) -> int:
    """Size of a dataset on disk, h5 and json together, in bytes (rounded up)."""
    per_caption = 4 * max_length + 4 + 60  # labels, length, and the sentence itself in the json
    return IMAGE_OFFSET + num_images * (IMAGE_BYTES + 8 + 120) + num_captions * per_caption + 2**16


def _signature(path: str) -> tuple[int, int] | tuple[None, None]:
    """Time and size of a file, to see later whether it is still the one that could not be read."""
    try:
        status = os.stat(path)
    except (OSError, ValueError):
        return None, None
    return status.st_mtime_ns, status.st_size


def _still_true(entries: Iterable[list | None], paths: Sequence[str]) -> Iterator[str | None]:
    """The journal up to the first unreadable picture that has been repaired or has appeared since."""
    for entry, path in zip(entries, paths, strict=False):
        if entry is None:
            yield None
        elif tuple(entry[1:]) == _signature(path):
            yield str(entry[0])
        else:
            return


def _key(paths: Iterable[str], image_mode: ImageMode) -> str:
    digest = hashlib.sha256(f"{READING_RULES}\0{'' if image_mode == 'squash' else image_mode}".encode())
    for path in paths:
        # Absolute: the same command in another folder means other pictures. A name can hold what is no character.
        digest.update(os.path.abspath(path).encode("utf-8", "surrogatepass") + b"\0")
    return digest.hexdigest()


def _holds_pixels(path: Path) -> bool:
    """Whether a file is one that `PartialPixels` began: with room for the h5 structure, or with that structure."""
    if not path.is_file():
        return False
    with path.open("rb") as stream:
        head = stream.read(IMAGE_OFFSET)
    return not head.strip(b"\0") or head.startswith(_H5_SIGNATURE)


def _holds_journal(path: Path) -> bool:
    if not path.is_file():
        return False
    with path.open("rb") as stream:
        head = stream.read(len(_JOURNAL_START))
    return _JOURNAL_START.startswith(head)  # a shorter one was cut off


def _write_all(stream: IO[bytes], data: memoryview) -> None:
    while data:
        data = data[stream.write(data) :]


def _lock(stream: IO[bytes], path: Path) -> None:
    """Two runs on one file would ruin it; the system drops the lock with the process."""
    try:
        import fcntl
    except ImportError:  # Windows has no such lock, but does not let an open file be renamed either
        return
    try:
        fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        raise InputError(f"{path}: another caption-prepro is writing this file", remedy="wait for it") from None
