"""A dataset of COCO's shape for benchmarks: real photos, 9,567 words, five captions of COCO's lengths per picture."""

import itertools
import json
from pathlib import Path

import h5py
import numpy as np

from captioner.data.dataset import Dataset
from captioner.data.images import read_image

V, CAPTIONS, LONGEST = 9567, 5, 16
# Words per caption of COCO's training captions: mean, standard deviation and the least, cut at LONGEST.
MEAN_LENGTH, SPREAD, SHORTEST = 10.5, 2.2, 7
HELD_OUT_SHARE = 4  # every fourth picture is not of the train split
ROOT = Path(__file__).resolve().parents[1]
PHOTOS = Path("data/flickr8k/images")


def random_captions(rng: np.random.Generator, count: int) -> np.ndarray:
    """uint32 (count, LONGEST) word ids, 0-padded."""
    lengths = rng.normal(MEAN_LENGTH, SPREAD, (count, 1)).round().clip(SHORTEST, LONGEST)
    words = rng.integers(1, V + 1, (count, LONGEST), dtype=np.uint32)
    return words * (np.arange(LONGEST) < lengths).astype(np.uint32)


def make_dataset(folder: Path, num_images: int, held_out: str = "test") -> Dataset:
    """Write data.h5 and data.json; photos are used again, shifted, where there are too few.

    Args:
        held_out: the split of every fourth picture.

    Raises:
        FileNotFoundError: there are no photos beside the project.
    """
    folders = [parent / "shared" / PHOTOS for parent in (ROOT.parent, ROOT)]
    photos = sorted(path for found in folders for path in found.glob("*.jpg"))[:num_images]
    if not photos:
        raise FileNotFoundError(f"no photos in {' or '.join(map(str, folders))}")
    rng = np.random.default_rng(0)
    last = CAPTIONS * np.arange(1, num_images + 1, dtype=np.uint32)
    labels = random_captions(rng, num_images * CAPTIONS)
    with h5py.File(folder / "data.h5", "w") as file:
        file.create_dataset("labels", data=labels)
        file.create_dataset("label_start_ix", data=last - CAPTIONS + 1)
        file.create_dataset("label_end_ix", data=last)
        file.create_dataset("label_length", data=(labels > 0).sum(1).astype(np.uint32))
        images = file.create_dataset("images", (num_images, 3, 256, 256), dtype=np.uint8)
        for number, path in enumerate(photos):
            pixels = read_image(path)
            for copy, row in enumerate(range(number, num_images, len(photos))):
                images[row] = np.roll(pixels, 37 * copy, axis=2)
    splits = itertools.cycle([held_out] + ["train"] * (HELD_OUT_SHARE - 1))
    described = [{"split": split, "id": row} for row, split in zip(range(num_images), splits)]  # noqa: B905
    words = {str(number): f"w{number}" for number in range(1, V + 1)}
    (folder / "data.json").write_text(json.dumps({"ix_to_word": words, "images": described}))
    return Dataset.open(folder / "data.h5", folder / "data.json")
