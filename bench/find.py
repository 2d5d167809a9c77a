"""Photos by words: seconds of a search among 10,000 photos, and what it misses of a search that judges them all.

The photos are mixtures of the examples' features, CAPTIONER_BENCH_COUNT of them; 16 texts of 1 to 9 words. With
CAPTIONER_BENCH_PHOTOS=FOLDER its photos are searched instead (they are looked at first, which takes long once).
"""

import os
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch

from captioner.data.batches import shares
from captioner.inference import find
from captioner.inference.load import load_models
from captioner.inference.model import Model
from captioner.inference.sources import open_folder
from captioner.runtime.files import cache_folder

ROOT = Path(__file__).resolve().parents[1]
PHOTOS = int(os.environ.get("CAPTIONER_BENCH_COUNT", "10000"))
TOP = 20
TEXTS = (
    "two dogs",
    "a red car",
    "a cat on a sofa",
    "two dogs on a beach",
    "a man riding a wave",
    "children playing in the snow",
    "a group of people at a table",
    "a man in a red shirt climbing a rock",
)
MORE = ("a plate of food", "a woman with a camera", "a train", "a boy with a ball in the grass")
TEXTS += (
    *MORE,
    "snow",
    "a bird on a branch",
    "a kitchen with a stove and a sink",
    "a street with cars and buses at night",
)


def run() -> None:
    """Print a Markdown table: seconds to open, seconds a text, and the share of the true first 20 that is found."""
    checkpoints = load_models()
    model = Model(checkpoints, torch.device("cpu"), "fp32")
    digests = find.digests_of(checkpoints, model.captioner.arithmetic)
    with tempfile.TemporaryDirectory() as folder:
        given = os.environ.get("CAPTIONER_BENCH_PHOTOS", "")
        photos = find.PhotoSearch(model.captioner, digests, cache_folder() if given else Path(folder))
        paths = _indexed(photos, model, given, Path(folder))
        began = time.perf_counter()
        photos = find.PhotoSearch(model.captioner, digests, cache_folder() if given else Path(folder))
        photos.open(paths, lambda positions: [])
        opened = time.perf_counter() - began
        queries = [photos.query(text) for text in TEXTS]
        photos.find(queries[0])
        seconds = []
        found = []
        for query in queries:
            began = time.perf_counter()
            found.append([one.position for one in photos.find(query)[:TOP]])
            seconds.append(time.perf_counter() - began)
        began = time.perf_counter()
        shares_found = []
        for query, positions in zip(queries, found, strict=True):
            logprobs = photos._judge(query, np.arange(len(photos.positions))).sum(1)
            best = {photos.positions[row] for row in logprobs.topk(min(TOP, len(logprobs))).indices.tolist()}
            shares_found.append(len(best & set(positions)) / len(best))
        whole = (time.perf_counter() - began) / len(queries)
    count, threads = len(photos.positions), torch.get_num_threads()
    print(f"{count:,} photos, fp32, {threads} threads; opening the index: {opened:.2f} s\n")
    print(f"| seconds a text, median | longest | judging all | of their first {TOP}, found | least |")
    print("|---|---|---|---|---|")
    print(
        f"| {statistics.median(seconds):.2f} | {max(seconds):.2f} | {whole:.1f} "
        f"| {statistics.mean(shares_found):.1%} | {min(shares_found):.0%} |"
    )


def _indexed(photos: find.PhotoSearch, model: Model, given: str, folder: Path) -> list[Path]:
    """Files whose features are in the index."""
    source = open_folder(given or str(ROOT / "examples"), False, -1)

    def batches(positions: Sequence[int]) -> Iterator:
        return source.batches([[positions[i] for i in group] for group in shares(len(positions), 8, 0, 1)], 2)

    if given:
        paths = [path for path, _ in source.files]
        photos.open(paths, batches)
        return paths
    few = np.concatenate([photos._features(batch) for batch in batches(range(len(source)))])
    rng = np.random.default_rng(0)
    paths = [folder / f"{number}" for number in range(PHOTOS)]
    for path in paths:
        path.write_text(path.name)

    def mixtures(positions: Sequence[int]) -> Iterator[tuple[int, np.ndarray]]:
        for position in positions:
            weights = rng.dirichlet(np.full(len(few), 0.3)).astype(np.float32)
            yield position, weights @ few * rng.uniform(0.5, 1.5, few.shape[1]).astype(np.float32)

    photos.index.update(paths, mixtures)
    return paths


if __name__ == "__main__":
    run()
