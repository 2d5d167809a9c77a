"""caption-eval end to end against a plain torchvision VGG16 forward pass at batch 16, on photos of that size.

Beside them what this machine can do at most: VGG16's 15.5 billion products at the speed of a large matrix product.
"""

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
VGG16_PRODUCTS = 15.5e9  # of one picture


def run() -> None:
    """Print images/s and ratios as Markdown tables."""
    with tempfile.TemporaryDirectory() as folder:
        photos = Path(folder) / "photos"
        photos.mkdir()
        make_photos(photos)
        plain = vgg16(weights=None).eval()
        batch = torch.randn(16, 3, 224, 224)
        columns: dict[str, list[float]] = {}
        for _ in range(ROUNDS):
            started = time.perf_counter()
            with torch.inference_mode():
                for _ in range(4):
                    plain(batch)
            plain_rate = 4 * 16 / (time.perf_counter() - started)
            row = {"torchvision VGG16 fp32, images/s": plain_rate}
            for precision in ("bf16", "int8"):
                first, total = _time_command(photos, precision)
                rate, steady = NUM_PHOTOS / total, (NUM_PHOTOS - 8) / (total - first)
                row |= {
                    f"{precision}: first caption, s": first,
                    f"{precision}: images/s with start-up": rate,
                    f"{precision}: images/s after it": steady,
                    f"{precision}: ratio with start-up": rate / plain_rate,
                    f"{precision}: ratio after start-up": steady / plain_rate,
                }
            row |= _limits(plain_rate)
            for name, value in row.items():
                columns.setdefault(name, []).append(value)
    print("| what | median (min-max) |\n|---|---|")
    for name, values in columns.items():
        print(f"| {name} | {statistics.median(values):.2f} ({min(values):.2f}-{max(values):.2f}) |")


def _limits(plain_rate: float) -> dict[str, float]:
    """How much faster than the plain forward pass a CNN alone could be here, by the speed of matrix products."""
    size, limits = 2048, {}
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        a, b = torch.randn(size, size).to(dtype), torch.randn(size, size).to(dtype)
        torch.mm(a, b)
        started = time.perf_counter()
        for _ in range(8):
            torch.mm(a, b)
        seconds = (time.perf_counter() - started) / 8 * VGG16_PRODUCTS / size**3
        limits[f"limit of {name} by its matrix products: ratio of the CNN alone"] = 1 / seconds / plain_rate
    return limits


def make_photos(folder: Path) -> None:
    """JPEGs of 224×224 with smooth random content."""
    rng = np.random.default_rng(0)
    for number in range(NUM_PHOTOS):
        small = Image.fromarray(rng.integers(0, 256, size=(16, 16, 3), dtype=np.uint8))
        small.resize((224, 224), Image.Resampling.BICUBIC).save(folder / f"{number}.jpg", quality=90)


def _time_command(photos: Path, precision: str) -> tuple[float, float]:
    """Seconds until the first batch's captions and until the end."""
    argv = [sys.executable, "-m", "captioner.cli.eval", "--image_folder", str(photos), "--beam_size", "3"]
    argv += ["--gpuid", "-1", "--vis_dir", "", "--precision", precision]
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
