"""A folder whose pictures are captioned as they arrive."""

import contextlib
import hashlib
import logging
import os
import queue
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from captioner.data.batch import Batch
from captioner.data.batches import file_batches
from captioner.data.image_formats import has_image_suffix, starts_like_image
from captioner.data.image_mode import ImageMode
from captioner.data.listing import list_images
from captioner.metrics.pairing import Reference

log = logging.getLogger(__name__)

SETTLE_SECONDS = 1.0  # a file that has not changed for so long is thought to be whole
PATIENCE_SECONDS = 10.0  # one that cannot be read may still be on its way for so long
POLL_SECONDS = 2.0  # between two looks at the folder where the system does not report changes
RESCAN_SECONDS = 30.0  # and where it does: network drives report none of what other machines do

_Stamp = tuple[int, float]  # bytes, time of modification: another one means another content


class WatchedFolder:
    """The pictures of a folder in the order in which they were seen to be whole; more come while it is watched.

    A `Source` whose positions begin after those of an earlier run.

    Args:
        recursive: its subfolders, too.
        ignored: a folder or file inside it that is written by us.

    Raises:
        InputError: it cannot be read.
    """

    def __init__(self, folder: str | Path, recursive: bool, ignored: Sequence[Path] = ()) -> None:
        self.folder, self.recursive = Path(folder), recursive
        self._ignored = [path.resolve() for path in ignored]
        self._files: dict[int, tuple[Path, dict[str, Any]]] = {}
        self._length = 0
        self._seen: dict[Path, _Stamp] = {}
        self._arriving: dict[Path, tuple[_Stamp, float]] = {}  # its stamp, and when to look at it again
        self._changes: queue.SimpleQueue[str | None] = queue.SimpleQueue()  # paths; None: anything in the folder
        self._next_scan = 0.0
        self._rescan_seconds = POLL_SECONDS
        list_images(self.folder, recursive)  # refuses folders that cannot be read

    def skip(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Leave out what an earlier run has captioned, unless it was changed since; new positions follow its ids.

        Args:
            rows: of that run's results.
        """
        for row in rows:
            path = self.folder / row["file_name"]
            stamp = _stamp(path)
            if stamp and stamp[1] == row.get("modified"):
                self._seen[path] = stamp
            with contextlib.suppress(TypeError, ValueError):  # an id that the journal of a watched folder has not
                self._length = max(self._length, int(row["image_id"]))

    def modified(self, position: int) -> float:
        """When the file was last changed before it was read, in seconds since 1970."""
        return self._seen[self._files[position][0]][1]

    def __len__(self) -> int:
        return self._length

    def info(self) -> Iterator[dict[str, Any]]:
        return (info for _, info in self._files.values())

    def batches(
        self, positions: Iterable[Sequence[int]], num_workers: int, image_mode: ImageMode = "squash"
    ) -> Iterator[Batch]:
        for group in positions:
            files = [self._files[position] for position in group]
            for batch in file_batches(files, [range(len(files))], num_workers, image_mode):
                yield replace(batch, positions=[group[place] for place in batch.positions])

    def picture(self, position: int) -> Path:
        return self._files[position][0]

    def references(self) -> list[Reference]:
        return []

    def identity(self, sizes: bool = True) -> str:
        return hashlib.blake2b(str(self.folder.resolve()).encode(), digest_size=10).hexdigest()

    def arrivals(self, stopped: Callable[[], bool], at_most: int) -> Iterator[list[int]]:
        """Positions of pictures that have become whole, as they do; an empty list where there is nothing to do for
        now. Ends when `stopped()` turns true."""
        stop_observing = self._observe()
        self._next_scan = 0.0  # for what came before
        try:
            while not stopped():
                yield self._whole(at_most)
        finally:
            stop_observing()

    def unreadable(self, name: str) -> bool:
        """Whether a file that could not be read is to be reported; False: it may still be on its way."""
        path = self.folder / name
        stamp = _stamp(path)
        if stamp is None:
            return False  # it was taken away again
        if abs(time.time() - stamp[1]) > PATIENCE_SECONDS:  # or to come: clocks of cameras are wrong at times
            return True
        self._arriving[path] = (stamp, time.monotonic() + POLL_SECONDS)
        return False

    def written_by_us(self, positions: Iterable[int]) -> None:
        """These pictures may have got our metadata, which leaves their time alone: they are not new for that."""
        for position in positions:
            path = self._files[position][0]
            stamp = _stamp(path)
            if stamp and stamp[1] == self._seen[path][1]:
                self._seen[path] = stamp

    def forget(self, positions: Iterable[int]) -> None:
        """These pictures are dealt with; memory does not grow with them."""
        for position in positions:
            self._files.pop(position, None)

    def _whole(self, at_most: int) -> list[int]:
        self._take_changes(0.0 if self._ready(time.monotonic()) else 0.2)
        now = time.monotonic()
        if now >= self._next_scan:
            self._next_scan = now + self._rescan_seconds
            for path in list_images(self.folder, self.recursive):
                self._consider(path)
        positions = []
        for path in self._ready(now)[:at_most]:
            stamp, _ = self._arriving.pop(path)
            found = _stamp(path)
            if found is None:
                continue
            if found != stamp or not found[0]:
                self._arriving[path] = (found, now + SETTLE_SECONDS)
                continue
            self._seen[path] = found
            info = {"id": str(self._length + 1), "file_path": path.relative_to(self.folder).as_posix()}
            self._files[self._length] = (path, info)
            positions.append(self._length)
            self._length += 1
        return positions

    def _ready(self, now: float) -> list[Path]:
        return [path for path, (_, look) in self._arriving.items() if now >= look]

    def _take_changes(self, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while True:
            try:
                changed = self._changes.get(timeout=max(0.0, deadline - time.monotonic()))
            except queue.Empty:
                return
            if changed is None:
                self._next_scan = 0.0
            else:
                self._consider(Path(changed))

    def _consider(self, path: Path) -> None:
        """Take a file into account, if it is a picture of ours and new, or changed since it was captioned."""
        # Names with a dot are what rsync and browsers call files that are under way.
        if path.name.startswith(".") or path in self._arriving:
            return
        if not (has_image_suffix(path.name) or starts_like_image(str(path))):
            return
        stamp = _stamp(path)
        if stamp is None or self._seen.get(path) == stamp or self._is_ignored(path):
            return
        self._arriving[path] = (stamp, time.monotonic() + SETTLE_SECONDS)

    def _is_ignored(self, path: Path) -> bool:
        resolved = path.resolve()
        return any(resolved == ignored or ignored in resolved.parents for ignored in self._ignored)

    def _observe(self) -> Callable[[], None]:
        """Have the system report changes, if it can; returns what ends that."""
        try:
            from watchdog.events import FileSystemEvent, FileSystemEventHandler
            from watchdog.observers import Observer
        except ImportError:
            log.info('looking at the folder every %.0f s (pip install "captioner[watch]": at once)', POLL_SECONDS)
            return lambda: None
        changes, folder = self._changes, self.folder

        class Handler(FileSystemEventHandler):
            def on_any_event(self, event: FileSystemEvent) -> None:
                if event.event_type not in ("created", "modified", "moved", "closed"):
                    return
                path = os.fsdecode(event.dest_path or event.src_path)
                if not event.is_directory:
                    changes.put(path)
                elif event.event_type in ("created", "moved"):
                    changes.put(None)  # a folder may come with pictures in it

        observer = Observer()
        try:
            observer.schedule(Handler(), str(folder), recursive=self.recursive)
            observer.start()
        except OSError as error:  # such as too few inotify watches
            log.warning("looking at the folder every %.0f s: the system reports no changes (%s)", POLL_SECONDS, error)
            return lambda: None
        self._rescan_seconds = RESCAN_SECONDS

        def stop() -> None:
            observer.stop()
            observer.join()

        return stop


def _stamp(path: Path) -> _Stamp | None:
    try:
        status = os.stat(path)
    except OSError:
        return None
    return status.st_size, status.st_mtime
