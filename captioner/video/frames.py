"""Frames of a video file or a camera, with their times."""

import errno
import logging
import os
import stat
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import av
import numpy as np

from captioner.errors import InputError

log = logging.getLogger(__name__)

THUMBNAIL_SIDE = 32

# What ffmpeg calls cameras on each system, and how it names the first one.
_CAMERAS = {
    "linux": ("v4l2", "/dev/video{}"),
    "darwin": ("avfoundation", "{}:none"),
    "win32": ("dshow", "video={}"),
}


@dataclass(frozen=True)
class Frame:
    """One picture of a video.

    Args:
        time: seconds since the video began.
        duration: seconds that it is to be seen.
        decoded: the picture as it is stored.
        whole: take all of it; False: the centre square, as the original does.
    """

    time: float
    duration: float
    decoded: av.VideoFrame
    whole: bool

    def thumbnail(self) -> np.ndarray:
        """int16 (32, 32, 3): enough to tell one scene from another, and cheap."""
        small = self.decoded.reformat(THUMBNAIL_SIDE, THUMBNAIL_SIDE, "rgb24")
        return small.to_ndarray().astype(np.int16)

    def pixels(self) -> np.ndarray:
        """uint8 RGB (height, width, 3), upright; height and width are even, as video formats want them."""
        pixels = self.decoded.to_ndarray(format="rgb24")
        pixels = np.rot90(pixels, round(self.decoded.rotation / 90) % 4)
        height, width = (side - side % 2 for side in pixels.shape[:2])
        if not self.whole:
            height = width = min(height, width)
        top, left = (pixels.shape[0] - height) // 2, (pixels.shape[1] - width) // 2
        return np.ascontiguousarray(pixels[top : top + height, left : left + width])


class VideoFile:
    """A video file, which may be read more than once.

    Args:
        whole: its frames are taken whole, not their centre square.

    Raises:
        InputError: it cannot be read, or has no video.
    """

    def __init__(self, path: str | Path, whole: bool = False) -> None:
        self.path, self.whole = Path(path), whole
        self.num_broken = 0  # of the last reading: packets that could not be decoded
        with self._open() as container:
            stream = _video_stream(container, self.path)
            self.rate = stream.average_rate or stream.guessed_rate or Fraction(25)

    def frames(self, sound: "Callable[[av.Packet, float], None] | None" = None) -> Iterator[Frame]:
        """All frames in the order in which they are shown; their times rise. Broken ones are left out.

        Args:
            sound: given the packets of the first sound track as they come, and the time at which the video begins.

        Raises:
            InputError: not one frame can be decoded.
        """
        self.num_broken = 0
        begin = last = None
        with self._open() as container:
            stream = _video_stream(container, self.path)
            stream.thread_type = "AUTO"
            tracks = [stream, *container.streams.audio[:1]] if sound else [stream]
            for packet in self._packets(container, tracks):
                if packet.stream.type != "video":
                    if sound and packet.dts is not None and begin is not None:
                        sound(packet, begin)
                    continue
                for decoded in self._decoded(packet):
                    tick = decoded.time_base or Fraction(0)
                    duration = float((decoded.duration or 0) * tick) or float(1 / self.rate)
                    if decoded.pts is None:
                        time = 0.0 if last is None else last + duration
                    else:
                        time = float(decoded.pts * tick)
                        begin = time if begin is None else begin
                        time -= begin
                    if last is not None and time <= last:
                        time = last + 1e-3  # files with times that do not rise are broken, but they are shown
                    last = time
                    yield Frame(time, duration, decoded, self.whole)
        if last is None:
            raise InputError(f"{self.path}: no picture in it can be decoded", expected="a video")
        if self.num_broken:
            log.warning("%s: %d pieces cannot be decoded and are left out", self.path, self.num_broken)

    def sound_track(self) -> "av.container.InputContainer | None":
        """The open file, if it has a sound track; the caller closes it."""
        container = self._open()
        if container.streams.audio:
            return container
        container.close()
        return None

    def _open(self) -> "av.container.InputContainer":
        try:
            if not stat.S_ISREG(os.stat(self.path).st_mode):  # a pipe would keep us waiting, and is gone when read once
                raise OSError(errno.EINVAL, "a folder, a pipe or a device")
            # With a slash in front: FFmpeg takes what stands before a colon for a protocol.
            name = os.path.abspath(self.path)
            return av.open(name if _is_utf8(name) else self.path.open("rb"), "r", metadata_errors="ignore")
        except (av.error.FFmpegError, OSError, ValueError) as error:
            if isinstance(error, FileNotFoundError):
                reason = "no such file"
            else:
                reason = f"cannot be read as a video ({getattr(error, 'strerror', None) or error})"
            raise InputError(f"{self.path}: {reason}") from error

    def _packets(self, container: "av.container.InputContainer", tracks: list) -> "Iterator[av.Packet]":
        packets = container.demux(tracks)
        while True:
            try:
                yield next(packets)
            except StopIteration:
                return
            except (av.error.FFmpegError, OSError):
                self.num_broken += 1
                return  # the rest of the file cannot even be taken apart

    def _decoded(self, packet: "av.Packet") -> "Iterator[av.VideoFrame]":
        try:
            yield from packet.decode()
        except (av.error.FFmpegError, OSError):
            self.num_broken += 1


def _is_utf8(name: str) -> bool:
    """FFmpeg takes no other names."""
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def camera_frames(name: str, whole: bool) -> Iterator[Frame]:
    """The frames of a camera as it delivers them, with the times at which it took them.

    Args:
        name: its number, from "0"; on Windows its name.

    Raises:
        InputError: there is no such camera, or it is in use.
    """
    kind, address = next(
        (found for system, found in _CAMERAS.items() if sys.platform.startswith(system)), _CAMERAS["linux"]
    )
    try:
        container = av.open(address.format(name), format=kind)
    except (av.error.FFmpegError, OSError, ValueError) as error:
        raise InputError(
            f"camera {name} cannot be opened ({getattr(error, 'strerror', None) or error})",
            remedy="check its number, that nothing else uses it, and your permissions",
        ) from error
    with container:
        stream = _video_stream(container, f"camera {name}")
        begin = None
        pictures = container.decode(stream)
        while True:
            try:
                decoded = next(pictures, None)
            except (av.error.FFmpegError, OSError) as error:
                raise InputError(
                    f"camera {name} gives no more pictures ({getattr(error, 'strerror', None) or error})"
                ) from error
            if decoded is None:
                return
            time = decoded.time or 0.0
            begin = time if begin is None else begin
            yield Frame(time - begin, float(1 / (stream.average_rate or 25)), decoded, whole)


def _video_stream(container: "av.container.InputContainer", name: object) -> "av.VideoStream":
    # The cover of a music file is a "video" of one picture.
    cover = av.stream.Disposition.attached_pic
    streams = [stream for stream in container.streams.video if not stream.disposition & cover]
    if not streams:
        raise InputError(f"{name}: has no video stream")
    return streams[0]
