"""Videos for tests, encoded by PyAV; damage is done to their bytes."""

import struct
from collections.abc import Iterable, Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from PIL import Image

RATE = 25
EXAMPLES = Path(__file__).parents[1] / "examples"


def example(name: str, size: tuple[int, int] = (320, 240)) -> np.ndarray:
    """uint8 RGB (height, width, 3) of one of the example photos."""
    with Image.open(EXAMPLES / f"{name}.jpg") as image:
        return np.asarray(image.convert("RGB").resize(size))


def write_video(
    path: Path, pictures: Iterable[np.ndarray], times: Sequence[float] | None = None, sound: bool = False
) -> Path:
    """One picture a frame, at 25 a second or at `times`."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=RATE, options={"preset": "ultrafast"})
        stream.pix_fmt = "yuv420p"
        stream.codec_context.time_base = Fraction(1, 12_800)
        audio = container.add_stream("aac", rate=44_100) if sound else None
        count = 0
        for number, picture in enumerate(pictures):
            if not count:
                stream.height, stream.width = picture.shape[:2]
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            frame.time_base = Fraction(1, 12_800)
            frame.pts = round((times[number] if times else number / RATE) * 12_800)
            frame.duration = 12_800 // RATE
            container.mux(stream.encode(frame))
            count += 1
        container.mux(stream.encode(None))
        if audio:
            samples = np.zeros((1, 44_100 * count // RATE), np.float32)
            for start in range(0, samples.shape[1] - 1024, 1024):
                beep = av.AudioFrame.from_ndarray(samples[:, start : start + 1024], format="fltp", layout="mono")
                beep.sample_rate, beep.pts, beep.time_base = 44_100, start, Fraction(1, 44_100)
                container.mux(audio.encode(beep))
            container.mux(audio.encode(None))
    return path


def turn_clockwise(path: Path) -> None:
    """Have players turn an mp4 by 90 degrees, as phones do: by the matrix in its track header (ISO 14496-12)."""
    data = bytearray(path.read_bytes())
    at = data.index(b"tkhd") + 4
    matrix = at + 4 + (32 if data[at] == 1 else 20) + 16
    height = struct.unpack(">I", data[matrix + 40 : matrix + 44])[0]
    data[matrix : matrix + 36] = struct.pack(">9i", 0, 1 << 16, 0, -1 << 16, 0, 0, height, 0, 1 << 30)
    path.write_bytes(data)
