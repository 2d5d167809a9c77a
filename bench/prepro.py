"""Preparing pictures: speed against the obvious loop, distance to Pillow's filter, and memory by number of pictures.

The obvious loop: Pillow's open, convert("RGB"), resize to 256×256 bilinear, one process. Ours includes starting the
workers for each round, but not the process they are forked from, which imports torch once in a run.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from bench.timing import interleave, ratio
from captioner.data.decode_pool import read_images
from captioner.data.images import read_image

ROOT = Path(__file__).resolve().parents[1]
PHOTOS = ROOT.parent / "shared/data/flickr8k_originals/images"
WORKERS = 2
ROUNDS = 5
COUNTS = (1_000, 10_000, 100_000)


def run() -> None:
    """Print both tables."""
    photos = sorted(PHOTOS.iterdir())
    print(f"images/s, median (least-greatest) of {ROUNDS} rounds, {WORKERS} workers on {os.cpu_count()} CPUs\n")
    print("| pictures | obvious loop | captioner | ratio | grey levels from Pillow: mean (worst picture) |")
    print("|---|---|---|---|---|")
    _speed("Flickr8k originals, about 500×375", photos, repeat=5)
    with tempfile.TemporaryDirectory() as folder:
        _speed("12 megapixels, JPEG quality 90", [_enlarge(path, Path(folder), 0) for path in photos[:12]], repeat=2)
        _speed(
            "the same with the noise of a sensor", [_enlarge(path, Path(folder), 6) for path in photos[:12]], repeat=2
        )
    print()
    _memory()


def _speed(title: str, paths: Sequence[Path], repeat: int) -> None:
    names = [str(path) for path in paths] * repeat
    longer = names * 6  # as many seconds of work as for the obvious loop, or more

    def obvious() -> None:
        for name in names:
            _pillow(name)

    def ours() -> None:
        for _ in read_images(longer, WORKERS):
            pass

    seconds = interleave({"obvious": obvious, "ours": ours}, ROUNDS)
    of_obvious = [value / len(names) for value in seconds["obvious"]]
    of_ours = [value / len(longer) for value in seconds["ours"]]
    distances = [float(np.abs(_pillow(path).astype(int) - read_image(path)).mean()) for path in paths]
    print(
        f"| {title} | {_rate(of_obvious)} | {_rate(of_ours)} | {ratio(of_obvious, of_ours)}"
        f" | {statistics.mean(distances):.2f} ({max(distances):.2f}) |",
        flush=True,
    )


def _pillow(path: str | Path) -> np.ndarray:
    with Image.open(path) as image:
        squashed = image.convert("RGB").resize((256, 256), Image.Resampling.BILINEAR)
    return np.asarray(squashed).transpose(2, 0, 1)


def _rate(seconds_per_picture: list[float]) -> str:
    rates = [1 / value for value in seconds_per_picture]
    return f"{statistics.median(rates):.0f} ({min(rates):.0f}-{max(rates):.0f})"


def _enlarge(path: Path, folder: Path, noise: int) -> Path:
    """A photo of 12 megapixels, which carries as much detail as the small one, and noise of ±`noise` grey levels."""
    with Image.open(path) as image:
        pixels = np.asarray(image.convert("RGB").resize((4000, 3000), Image.Resampling.BICUBIC))
    added = np.random.default_rng(0).integers(-noise, noise + 1, pixels.shape, dtype=np.int16)
    target = folder / path.name
    Image.fromarray(np.clip(pixels + added, 0, 255).astype(np.uint8)).save(target, quality=90)
    return target


def _memory(counts: Sequence[int] = COUNTS) -> None:
    """caption-prepro on many small pictures: seconds, and the peak of its memory."""
    print("| pictures | seconds | images/s | peak memory of all processes (MiB) | private memory of the first |")
    print("|---|---|---|---|---|")
    for count in counts:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            for index in range(count):
                colour = (index % 256, index // 256 % 256, 99)
                Image.new("RGB", (64, 48), colour).save(folder / f"{index}.jpg")
            sentence = "a small picture of a single colour with nothing on it"
            records = [{"file_path": f"{index}.jpg", "captions": [sentence] * 5} for index in range(count)]
            (folder / "raw.json").write_text(json.dumps(records))
            seconds, total, first = _watch(
                [sys.executable, "-m", "captioner.cli.prepro", "--input_json", "raw.json", "--num_val", "10"],
                folder,
            )
            print(f"| {count:,} | {seconds:.1f} | {count / seconds:.0f} | {total:.0f} | {first:.0f} |", flush=True)


def _watch(command: list[str], folder: Path) -> tuple[float, float, float]:
    """Run a command; seconds, and in MiB the peak memory of its process tree and the peak private memory of itself."""
    began = time.perf_counter()
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        command, cwd=folder, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    total = first = 0.0
    while process.poll() is None:
        # What several processes share, libraries say, is divided among them (Pss), so that the sum counts it once.
        total = max(total, sum(_memory_of(pid, "Pss:") for pid in _tree(process.pid)))
        first = max(first, _memory_of(process.pid, "Private_Clean:", "Private_Dirty:"))
        time.sleep(0.2)
    if process.returncode:
        raise RuntimeError(f"{command} ended with {process.returncode}")
    return time.perf_counter() - began, total, first


def _tree(pid: int) -> list[int]:
    try:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except OSError:
        return [pid]
    return [pid, *(member for child in children for member in _tree(int(child)))]


def _memory_of(pid: int, *kinds: str) -> float:
    """Memory of one process in MiB, by the lines of smaps_rollup that begin so; 0 if it has ended."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0.0
    return sum(int(line.split()[1]) for line in lines if line.startswith(kinds)) / 1024
