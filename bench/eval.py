"""caption-eval end to end against a plain torchvision VGG16 forward pass at batch 16, on the same photos."""

import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torchvision.models import vgg16

NUM_PHOTOS = 256
ROUNDS = 5


def run() -> None:
    """Print images/s of both, and the ratio, as a Markdown table."""
    with tempfile.TemporaryDirectory() as folder:
        photos = Path(folder) / "photos"
        photos.mkdir()
        _make_photos(photos)
        plain = vgg16(weights=None).eval()
        batch = torch.randn(16, 3, 224, 224)
        argv = [sys.executable, "-m", "captioner.cli.eval", "--image_folder", str(photos), "--beam_size", "3"]
        argv += ["--gpuid", "-1", "--vis_dir", "", "--batch_size", "1"]
        rows = []
        for _ in range(ROUNDS):
            started = time.perf_counter()
            with torch.inference_mode():
                for _ in range(4):
                    plain(batch)
            plain_rate = 4 * 16 / (time.perf_counter() - started)
            first, total = _time_command(argv)
            rows.append((plain_rate, NUM_PHOTOS / total, (NUM_PHOTOS - 8) / (total - first), first))
    columns = list(zip(*rows, strict=True))
    print("| what | median (min-max) |\n|---|---|")
    for name, values in zip(
        ("torchvision VGG16 fp32, images/s", "caption-eval, images/s with start-up", "caption-eval, images/s after it",
         "first caption, s"), columns, strict=True):  # fmt: skip
        print(f"| {name} | {statistics.median(values):.2f} ({min(values):.2f}-{max(values):.2f}) |")
    for name, column in (("with start-up", 1), ("after start-up", 2)):
        ratios = [row[column] / row[0] for row in rows]
        print(f"| ratio {name} | {statistics.median(ratios):.2f} ({min(ratios):.2f}-{max(ratios):.2f}) |")


def _make_photos(folder: Path) -> None:
    """JPEGs of 224×224 with smooth random content."""
    rng = np.random.default_rng(0)
    for number in range(NUM_PHOTOS):
        small = Image.fromarray(rng.integers(0, 256, size=(16, 16, 3), dtype=np.uint8))
        small.resize((224, 224), Image.Resampling.BICUBIC).save(folder / f"{number}.jpg", quality=90)


def _time_command(argv: list[str]) -> tuple[float, float]:
    """Seconds until the first batch's captions and until the end."""
    started = time.perf_counter()
    first = 0.0
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    with subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=environment) as process:
        assert process.stdout is not None
        for _ in process.stdout:
            first = first or time.perf_counter() - started
    if process.returncode:
        raise RuntimeError(f"{' '.join(argv)} ended with {process.returncode}")
    return first, time.perf_counter() - started
