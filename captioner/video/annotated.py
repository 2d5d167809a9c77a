"""A video with the caption written on its pictures."""

import contextlib
import logging
import math
import textwrap
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import IO

import av
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from captioner.errors import InputError
from captioner.video.frames import Frame, VideoFile

log = logging.getLogger(__name__)

FORMATS = {".mp4": "mp4", ".mov": "mov", ".mkv": "matroska"}

_TICKS = 90_000  # of the file's clock in a second: exact for all usual frame rates
_SOUND = ("aac", "mp3", "ac3", "eac3", "alac", "flac", "opus")  # that all FORMATS may hold


@contextlib.contextmanager
def _encoder_errors() -> Iterator[None]:
    """What FFmpeg does not take, as times beyond all clocks; what the disk refuses is told as of any file."""
    try:
        yield
    except (av.error.FFmpegError, ValueError, OverflowError) as error:
        if isinstance(error, OSError):
            raise
        raise InputError(f"the annotated video cannot be made ({error})", remedy="leave out --output") from error


def require_known_format(path: Path) -> None:
    """Refuse a file name whose format is unknown before the work starts.

    Raises:
        InputError: its suffix is not one of FORMATS.
    """
    if path.suffix.lower() not in FORMATS:
        raise InputError(f"{path}: a video cannot be written in this format", expected=", ".join(FORMATS))


class Painter:
    """Writes captions on pictures: white on a dark band at the bottom. The band of a text is drawn once."""

    def __init__(self) -> None:
        self._drawn: tuple[str, tuple[int, int]] | None = None
        self._band = np.empty(0)

    def paint(self, pixels: np.ndarray, text: str) -> np.ndarray:
        """A copy of uint8 RGB (height, width, 3) with `text` on it; without text the picture itself."""
        if not text:
            return pixels
        height, width = pixels.shape[:2]
        if self._drawn != (text, (height, width)):
            self._band, self._drawn = _band(text, height, width), (text, (height, width))
        rows = self._band.shape[0]
        painted = pixels.copy()
        # Darkened to 3/8, and brightened where there is a letter.
        below = painted[height - rows :].astype(np.uint16) * 3 // 8
        painted[height - rows :] = np.maximum(below, self._band)
        return painted


def _band(text: str, height: int, width: int) -> np.ndarray:
    """uint8 (rows, width, 1): the letters' brightness."""
    size = max(8, height // 18)
    font = ImageFont.load_default(size)
    margin = size // 2
    letters = max(1, math.floor((width - 2 * margin) / max(1.0, font.getlength("n"))))
    lines = textwrap.wrap(text, letters)
    rows = min(height, round(1.25 * size * len(lines)) + margin)
    band = Image.new("L", (width, rows))
    draw = ImageDraw.Draw(band)
    draw.multiline_text(
        (width / 2, rows / 2), "\n".join(lines), fill=255, font=font, anchor="mm", align="center", spacing=size // 8
    )
    return np.asarray(band)[:, :, None]


class AnnotatedVideo:
    """A video file in the making: H.264 where there is an encoder for it, else MPEG-4.

    Args:
        stream: binary, writable and seekable.
        suffix: one of FORMATS.
        rate: frames a second, on average; each frame keeps its own time.
        source: whose sound goes along, as it is.
    """

    def __init__(self, stream: IO[bytes], suffix: str, rate: Fraction, source: VideoFile | None = None) -> None:
        self._container = av.open(stream, "w", format=FORMATS[suffix.lower()])
        self._rate = rate
        self._video: av.VideoStream | None = None
        self._sound: av.AudioStream | None = None
        self._source = source.sound_track() if source else None
        self.num_frames = 0

    def __enter__(self) -> "AnnotatedVideo":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        with _encoder_errors() if kind is None else contextlib.nullcontext():
            if kind is None and self._video is not None:
                self._container.mux(self._video.encode(None))
            self._container.close()
        if self._source:
            self._source.close()

    def add(self, frame: Frame, pixels: np.ndarray) -> None:
        """Add a picture, uint8 RGB with even sides, at the time of `frame`.

        Raises:
            InputError: FFmpeg cannot encode it.
        """
        with _encoder_errors():
            self._add(frame, pixels)

    def _add(self, frame: Frame, pixels: np.ndarray) -> None:
        if self._video is None:
            self._start(pixels.shape[1], pixels.shape[0])
        assert self._video is not None
        if pixels.shape[:2] != (self._video.height, self._video.width):  # the file changes its size on the way
            resized = Image.fromarray(pixels).resize((self._video.width, self._video.height))
            pixels = np.asarray(resized)
        picture = av.VideoFrame.from_ndarray(pixels, format="rgb24")
        picture.time_base = Fraction(1, _TICKS)
        picture.pts = round(frame.time * _TICKS)
        picture.duration = round(frame.duration * _TICKS)
        self._container.mux(self._video.encode(picture))
        self.num_frames += 1

    def add_sound(self, packet: "av.Packet", begin: float) -> None:
        """Add a packet of the source's sound; `begin` is the time at which its video begins."""
        if self._sound is None or packet.dts is None:
            return
        shift = round(begin / float(packet.time_base))
        if packet.dts < shift:
            return  # before the first picture
        packet.dts -= shift
        packet.pts = packet.dts if packet.pts is None else packet.pts - shift
        packet.stream = self._sound
        with _encoder_errors():
            self._container.mux(packet)

    def _start(self, width: int, height: int) -> None:
        codec = "libx264" if "libx264" in av.codecs_available else "mpeg4"
        video = self._container.add_stream(codec, rate=self._rate)
        assert isinstance(video, av.VideoStream)
        video.width, video.height, video.pix_fmt = width, height, "yuv420p"
        video.codec_context.time_base = Fraction(1, _TICKS)
        if codec == "mpeg4":
            video.bit_rate = 4 * width * height  # its default is too little for anything
            video.codec_context.time_base = Fraction(1, 60_000)  # it knows no finer clock
        self._video = video
        if self._source:
            track = self._source.streams.audio[0]
            if track.codec_context.name in _SOUND:
                self._sound = self._container.add_stream_from_template(track)
            else:
                log.warning("the sound (%s) is left out: it does not fit into this format", track.codec_context.name)
