"""How sure a score is: bootstrap intervals, and a paired test of two systems on the same images.

Letters: N images, B resamples, K columns of a measure's rows.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from captioner.metrics.measure import Measure

CONFIDENCE = 0.95
NUM_BOOTSTRAP = 1000
NUM_SWAPS = 10_000
_CELLS_AT_ONCE = 2**22  # of a (B, N) array of draws: bounds memory for any number of images


def bootstrap_intervals(
    measures: Mapping[str, Measure], *, num_samples: int = NUM_BOOTSTRAP, seed: int = 123
) -> dict[str, tuple[float, float]]:
    """95 % percentile intervals from resampling images (Efron 1979; for BLEU Koehn 2004).

    References and CIDEr's document frequencies stay as they are: the interval tells how the score would move with
    other images of the same kind, not with other references.
    """
    drawn = _bootstrap(measures, num_samples, seed)
    return {name: _interval(values) for name, values in drawn.items()}


@dataclass(frozen=True)
class Comparison:
    """Score of one system minus the score of the other.

    Attributes:
        difference: on all images.
        low, high: 95 % interval of the difference, resampling images for both systems alike.
        p: how often the difference would be at least as large if it did not matter which system made which caption.
    """

    difference: float
    low: float
    high: float
    p: float


def compare(
    first: Mapping[str, Measure],
    second: Mapping[str, Measure],
    *,
    num_samples: int = NUM_BOOTSTRAP,
    num_swaps: int = NUM_SWAPS,
    seed: int = 123,
) -> dict[str, Comparison]:
    """Paired comparison of two systems, image i of `first` being image i of `second`.

    The interval is a paired bootstrap, p a two-sided approximate randomisation test (Noreen 1989): the two captions
    of an image are swapped at random.
    """
    names = [name for name in first if name in second]
    # The same draws for both systems: the seed and the number of images are the same.
    drawn = _bootstrap({name: first[name] for name in names}, num_samples, seed)
    other = _bootstrap({name: second[name] for name in names}, num_samples, seed)
    swapped = _swapped_differences([(first[name], second[name]) for name in names], num_swaps, seed)
    comparisons = {}
    for name, differences in zip(names, swapped, strict=True):
        difference = first[name].score - second[name].score
        low, high = _interval(drawn[name] - other[name])
        # The tolerance counts ties in spite of rounding, the 1 the observed labelling itself.
        as_large = np.count_nonzero(np.abs(differences) >= abs(difference) - 1e-12)
        comparisons[name] = Comparison(difference, low, high, (1 + as_large) / (1 + num_swaps))
    return comparisons


def _interval(values: np.ndarray) -> tuple[float, float]:
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(values, [tail, 1 - tail])
    return float(low), float(high)


def _chunks(num_samples: int, num_images: int) -> Iterator[int]:
    step = max(1, _CELLS_AT_ONCE // num_images)
    for begin in range(0, num_samples, step):
        yield min(step, num_samples - begin)


def _bootstrap(measures: Mapping[str, Measure], num_samples: int, seed: int) -> dict[str, np.ndarray]:
    """Scores (B,) of B resamples of the images, the same resamples for all measures."""
    if not measures:
        return {}
    num_images = len(next(iter(measures.values())).rows)
    generator = np.random.default_rng(seed)
    scores: dict[str, list[np.ndarray]] = {name: [] for name in measures}
    for size in _chunks(num_samples, num_images):
        draws = generator.integers(num_images, size=(size, num_images))
        draws += np.arange(size)[:, None] * num_images
        times = np.bincount(draws.ravel(), minlength=size * num_images).reshape(size, num_images).astype(np.float64)
        sums: dict[int, np.ndarray] = {}  # Bleu_1 to Bleu_4 share their rows
        for name, measure in measures.items():
            if id(measure.rows) not in sums:
                sums[id(measure.rows)] = times @ measure.rows
            scores[name].append(measure.combine(sums[id(measure.rows)]))
    return {name: np.concatenate(parts) for name, parts in scores.items()}


def _swapped_differences(pairs: list[tuple[Measure, Measure]], num_swaps: int, seed: int) -> list[np.ndarray]:
    """Per pair of measures the differences (B,) after swapping the systems' captions of random images."""
    if not pairs:
        return []
    num_images = len(pairs[0][0].rows)
    generator = np.random.default_rng(seed)
    differences: list[list[np.ndarray]] = [[] for _ in pairs]
    for size in _chunks(num_swaps, num_images):
        bits = np.frombuffer(generator.bytes(size * num_images // 8 + 1), np.uint8)
        swap = np.unpackbits(bits, count=size * num_images).reshape(size, num_images).astype(np.float64)
        moves: dict[int, np.ndarray] = {}
        for (first, second), found in zip(pairs, differences, strict=True):
            if id(first.rows) not in moves:
                moves[id(first.rows)] = swap @ (second.rows - first.rows)
            move = moves[id(first.rows)]
            found.append(first.combine(first.rows.sum(axis=0) + move) - first.combine(second.rows.sum(axis=0) - move))
    return [np.concatenate(parts) for parts in differences]
