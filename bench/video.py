"""Captioning video of 25 frames a second, with and without scene detection, against the obvious loop.

Then how old the captions of a live stream of 25 frames a second are, against what one caption takes.
"""

import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from PIL import Image

from bench.timing import interleave
from captioner import load_model
from captioner.inference.caption import Caption
from captioner.video.frames import Frame, VideoFile
from captioner.video.live import live_captions
from captioner.video.scenes import scenes_of

RATE = 25
SECONDS = 30
SCENE_SECONDS = 5
WIDTH, HEIGHT = 1280, 720
LOOP_SECONDS = 1  # of the video that the obvious loop goes through; its time is multiplied
LIVE_SECONDS = 12
ROUNDS = 2


def run() -> None:
    """Print seconds of computing per minute of video, and ages of live captions, as Markdown tables."""
    model = load_model(device="cpu")

    def caption(pictures: Sequence[np.ndarray]) -> Sequence[Caption]:
        return model.caption(list(pictures), num_workers=0, batch_size=len(pictures))

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "clip.mp4"
        _write_clip(path)

        def scenes(detect: bool) -> None:
            frames, options = VideoFile(path).frames(), {"every_seconds": 2.0, "least_seconds": 1.0, "batch_size": 8}
            list(scenes_of(frames, caption, detect=detect, **options))  # type: ignore[arg-type]

        def decode_only() -> None:
            for frame in VideoFile(path).frames():
                frame.thumbnail()

        def obvious_loop() -> None:
            for frame in VideoFile(path).frames():
                if frame.time >= LOOP_SECONDS:
                    return
                caption([frame.pixels()])

        seconds = interleave(
            {
                "with scene detection": lambda: scenes(True),
                "a caption every 2 s": lambda: scenes(False),
                "decoding and thumbnails alone": decode_only,
                f"every frame (from {LOOP_SECONDS} s of it)": obvious_loop,
            },
            ROUNDS,
        )
    print(f"| {WIDTH}×{HEIGHT}, a scene every {SCENE_SECONDS} s | seconds per minute of video |\n|---|---|")
    for name, values in seconds.items():
        factor = 60 / (LOOP_SECONDS if name.startswith("every frame") else SECONDS)
        print(f"| {name} | {factor * statistics.median(values):.1f} |")
    _live(caption)


def _write_clip(path: Path) -> None:
    """Example photos that move slowly."""
    photos = sorted((Path(__file__).parents[1] / "examples").glob("*.jpg"))
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=RATE, options={"preset": "veryfast"})
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv420p"
        for number in range(RATE * SECONDS):
            scene, step = divmod(number, RATE * SCENE_SECONDS)
            if step == 0:
                with Image.open(photos[scene % len(photos)]) as image:
                    wide = np.asarray(image.convert("RGB").resize((WIDTH + RATE * SCENE_SECONDS, HEIGHT)))
            moved = np.ascontiguousarray(wide[:, step : step + WIDTH])
            container.mux(stream.encode(av.VideoFrame.from_ndarray(moved, format="rgb24")))
        container.mux(stream.encode(None))


def _live(caption: object) -> None:
    """How long ago the captioned picture was taken, whenever a picture is shown."""
    taken: dict[str, float] = {}
    took: list[float] = []
    waited: list[float] = []

    def timed(pictures: Sequence[np.ndarray]) -> Sequence[Caption]:
        began = time.perf_counter()
        found = caption(pictures)  # type: ignore[operator]
        took.append(time.perf_counter() - began)
        number = str(int(pictures[0][0, 0, 0]) * 256 + int(pictures[0][0, 0, 1]))
        waited.append(began - taken[number])
        return [Caption(number, found[0].logprob, found[0].confidence, found[0].words)]

    def camera() -> Iterator[Frame]:
        began = time.perf_counter()
        for number in range(RATE * LIVE_SECONDS):
            time.sleep(max(0.0, began + number / RATE - time.perf_counter()))
            pixels = np.zeros((480, 640, 3), np.uint8)
            pixels[:, :, 0], pixels[:, :, 1] = divmod(number, 256)
            taken[str(number)] = time.perf_counter()
            yield Frame(
                number / RATE, float(Fraction(1, RATE)), av.VideoFrame.from_ndarray(pixels, format="rgb24"), True
            )

    ages = [
        time.perf_counter() - taken[one.caption.text]
        for one in live_captions(
            camera(), timed, every_seconds=0.01, least_seconds=0.1, detect=False, stopped=lambda: False
        )
        if one.changed and one.caption
    ]
    print(f"\n| live, {RATE} frames a second | seconds |\n|---|---|")
    print(f"| one caption: median | {statistics.median(took):.3f} |")
    print(f"| greatest | {max(took):.3f} |")
    print(f"| how old a picture is when its caption is begun: median | {statistics.median(waited):.3f} |")
    print(f"| greatest (target: one caption) | {max(waited):.3f} |")
    print(f"| age of a caption when it is shown: median | {statistics.median(ages):.3f} |")
    print(f"| greatest | {max(ages):.3f} |")
