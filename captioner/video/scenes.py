"""Where scenes of a video begin, and one caption for each."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from captioner.inference.caption import Caption
from captioner.video.frames import Frame

# Mean difference of thumbnails, in grey levels of 255.
CHANGED = 28.0  # unrelated photos differ by 40 to 100, neighbouring frames of a moving camera by 1 to 10
SAME = 18.0  # back below it, the picture has returned to the scene: it was a flash
CONFIRM_SECONDS = 0.15  # how long a changed picture must stay

LOOK_SECONDS = 0.03  # between two looks for a new scene; videos of more frames a second have some that nobody looks at
SETTLE_SECONDS = 0.2  # from the beginning of a scene to the first picture that is captioned

DISPLAY_SIDE = 800  # pixels of a scene's picture on the page, at most


class SceneDetector:
    """Finds new scenes by comparing small pictures, one after the other, with the one the present scene began with.

    Two thresholds and two durations keep flashes, camera shake and rapid cuts from making scenes of their own.

    Args:
        least_seconds: duration of a scene, at least.
    """

    def __init__(self, least_seconds: float) -> None:
        self.least_seconds = least_seconds
        self.begin = 0.0  # of the present scene
        self._anchor: np.ndarray | None = None
        self._changed_since: float | None = None

    @property
    def undecided(self) -> bool:
        """Whether the last picture may be the first of a new scene."""
        return self._changed_since is not None

    def look(self, time: float, thumbnail: np.ndarray) -> bool:
        """Whether a new scene is now known to have begun: at `begin`, shortly before `time`."""
        if self._anchor is None:
            self.begin, self._anchor = time, thumbnail
            return True
        difference = float(np.abs(thumbnail - self._anchor).mean())
        if difference < SAME:
            self._changed_since = None
        elif difference > CHANGED and self._changed_since is None:
            self._changed_since = time
        if self._changed_since is None or time - self._changed_since < CONFIRM_SECONDS:
            return False
        begin = max(self._changed_since, self.begin + self.least_seconds)
        if begin > time:
            return False
        self.begin, self._anchor, self._changed_since = begin, thumbnail, None
        return True


@dataclass
class Scene:
    """A part of a video with one caption.

    Args:
        begin: seconds.
        end: seconds; the next scene's beginning, or the end of the video.
        caption: the surest one of its pictures.
        picture: that picture, uint8 RGB (height, width, 3), 800 pixels long at most.
    """

    begin: float
    end: float
    caption: Caption
    picture: np.ndarray


@dataclass
class _Sample:
    scene: int
    begin: float  # of its scene
    pixels: np.ndarray


def scenes_of(
    frames: Iterable[Frame],
    caption: Callable[[Sequence[np.ndarray]], Sequence[Caption]],
    *,
    every_seconds: float,
    least_seconds: float,
    detect: bool,
    batch_size: int,
) -> Iterator[Scene]:
    """Cut a video into scenes and caption each; memory does not grow with its length.

    Args:
        frames: of the video, with rising times.
        caption: given uint8 RGB pictures, at most `batch_size`.
        every_seconds: between two pictures of a scene that are captioned; the surest caption is the scene's.
        least_seconds: duration of a scene, at least.
        detect: False: no detection, each picture that is captioned is a scene.
    """
    detector = SceneDetector(least_seconds)
    samples: list[_Sample] = []
    open_scene: Scene | None = None
    open_number = number = -1
    begin = next_look = next_sample = end = 0.0
    for frame in frames:
        end = frame.time + frame.duration
        if detect and frame.time >= next_look:
            next_look = frame.time + LOOK_SECONDS
            if detector.look(frame.time, frame.thumbnail()):
                number, begin = number + 1, detector.begin
                next_sample = frame.time if number == 0 else max(frame.time, begin + SETTLE_SECONDS)
        if frame.time < next_sample or detector.undecided:
            continue
        next_sample = frame.time + every_seconds
        if not detect:
            number, begin = number + 1, frame.time
        samples.append(_Sample(number, begin, _display_size(frame.pixels())))
        if len(samples) == batch_size:
            for done in _captioned(samples, caption):
                open_scene, open_number, finished = _join(open_scene, open_number, *done)
                if finished:
                    yield finished
            samples.clear()
    for done in _captioned(samples, caption):
        open_scene, open_number, finished = _join(open_scene, open_number, *done)
        if finished:
            yield finished
    if open_scene:
        open_scene.end = end
        yield open_scene


def _captioned(
    samples: Sequence[_Sample], caption: Callable[[Sequence[np.ndarray]], Sequence[Caption]]
) -> Iterator[tuple[_Sample, Caption]]:
    if samples:
        yield from zip(samples, caption([sample.pixels for sample in samples]), strict=True)


def _join(scene: Scene | None, number: int, sample: _Sample, caption: Caption) -> tuple[Scene, int, Scene | None]:
    """Add a captioned picture: the scene that is now open, its number, and the one that is thereby finished."""
    if scene is None or sample.scene != number:
        if scene:
            scene.end = sample.begin
        return Scene(sample.begin, sample.begin, caption, sample.pixels), sample.scene, scene
    if caption.confidence > scene.caption.confidence:
        scene.caption, scene.picture = caption, sample.pixels
    return scene, number, None


def _display_size(pixels: np.ndarray) -> np.ndarray:
    if max(pixels.shape) <= DISPLAY_SIDE:
        return pixels
    picture = Image.fromarray(pixels)
    picture.thumbnail((DISPLAY_SIDE, DISPLAY_SIDE), Image.Resampling.BILINEAR)
    return np.asarray(picture)
