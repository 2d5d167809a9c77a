"""Captions of a camera: the newest picture is captioned, stale ones are dropped."""

import logging
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from captioner.errors import InputError
from captioner.inference.caption import Caption
from captioner.video.frames import Frame
from captioner.video.scenes import LOOK_SECONDS, SceneDetector

log = logging.getLogger(__name__)

SURER = 0.1  # by how much another caption of the same scene must be more confident to take its place


@dataclass
class Shown:
    """A picture of the camera and what is to be read with it.

    Args:
        caption: of a picture that is at most one caption's computing time older; None before the first one.
        changed: it is another text than that of the picture before.
        since: seconds; from when on it has been true: the beginning of its scene, or the time of the captioned picture.
            Subtitles begin there, not when the caption was ready.
    """

    frame: Frame
    caption: Caption | None
    changed: bool
    since: float


class _Newest:
    """Frames from a thread that reads a camera; only the newest one is kept."""

    def __init__(self, frames: Iterable[Frame]) -> None:
        self._condition = threading.Condition()
        self._frame: Frame | None = None
        self._ended = False
        self._error: Exception | None = None
        threading.Thread(target=self._read, args=(frames,), name="camera", daemon=True).start()

    def _read(self, frames: Iterable[Frame]) -> None:
        try:
            for frame in frames:
                with self._condition:
                    self._frame = frame
                    self._condition.notify()
        except Exception as error:  # handed to the thread that waits for frames
            self._error = error
        with self._condition:
            self._ended = True
            self._condition.notify()

    def next(self, seconds: float, stopped: Callable[[], bool]) -> Frame | None:
        """The newest frame that was not taken yet; None after the last one, or where `stopped()` turns true.

        Raises:
            InputError: none comes within that time, or the camera cannot be read.
        """
        deadline = time.monotonic() + seconds
        with self._condition:
            while self._frame is None:
                if stopped():
                    return None
                if isinstance(self._error, InputError):
                    raise self._error
                if self._error:
                    log.warning("the camera has ended: %s", self._error)
                if self._ended:
                    return None
                if time.monotonic() > deadline:
                    raise InputError(f"the camera has delivered no picture for {seconds:.0f} s")
                self._condition.wait(0.1)
            frame, self._frame = self._frame, None
            return frame


def live_captions(
    frames: Iterable[Frame],
    caption: Callable[[Sequence[np.ndarray]], Sequence[Caption]],
    *,
    every_seconds: float,
    least_seconds: float,
    detect: bool,
    stopped: Callable[[], bool],
    stall_seconds: float = 10.0,
) -> Iterator[Shown]:
    """Show the pictures of a camera with captions that are computed meanwhile.

    Args:
        frames: as they are taken; read in a thread of their own.
        caption: given one uint8 RGB picture, in a thread of its own.
        every_seconds: between the beginnings of two captions, unless the scene changes.
        least_seconds: that a text stays, at least.
        detect: look for new scenes; without it every caption takes the place of the last one.
        stopped: whether the user has had enough.

    Raises:
        InputError: the camera delivers nothing for `stall_seconds`, or cannot be opened.
    """
    newest, detector = _Newest(frames), SceneDetector(least_seconds)
    shown: Caption | None = None
    shown_since = next_look = next_caption = asked_since = since = 0.0
    new_scene = True
    with ThreadPoolExecutor(1, "captions") as pool:
        running: Future[Sequence[Caption]] | None = None
        asked_in_new_scene = True
        while (frame := newest.next(stall_seconds, stopped)) is not None:
            if detect and frame.time >= next_look:
                next_look = frame.time + LOOK_SECONDS
                if detector.look(frame.time, frame.thumbnail()):
                    new_scene, next_caption = True, frame.time
            before = shown
            if running and running.done():
                (found,) = running.result()
                running = None
                another = shown is None or found.text != shown.text
                surer = shown is None or found.confidence > shown.confidence + SURER
                settled = frame.time - shown_since >= least_seconds
                if another and (shown is None or asked_in_new_scene or (surer and settled) or not detect):
                    shown, shown_since, since = found, frame.time, asked_since
            if running is None and frame.time >= next_caption:
                running = pool.submit(caption, [frame.pixels()])
                asked_since = detector.begin if detect and new_scene else frame.time
                asked_in_new_scene, new_scene = new_scene, False
                next_caption = frame.time + every_seconds
            yield Shown(frame, shown, changed=shown is not before, since=since)
