"""What every metric returns: a row of sums per image, and the score that the summed rows give."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Measure:
    """One metric over N images, in a form that can be resampled.

    Corpus BLEU and METEOR are no means over images but functions of summed counts, so resampling images (bootstrap
    intervals, paired tests) means adding up other rows, not averaging other scores.

    Attributes:
        per_caption: (N,) float64, the score of each prediction by itself.
        rows: (N, K) float64, additive counts of each image.
        combine: summed rows (..., K) → score (...).
    """

    per_caption: np.ndarray
    rows: np.ndarray
    combine: Callable[[np.ndarray], np.ndarray]

    @property
    def score(self) -> float:
        """The corpus score."""
        return float(self.combine(self.rows.sum(axis=0)))


def mean_measure(per_caption: np.ndarray) -> Measure:
    """The measure whose corpus score is the mean over images."""
    return Measure(per_caption, np.stack([per_caption, np.ones_like(per_caption)], axis=1), _ratio)


def _ratio(sums: np.ndarray) -> np.ndarray:
    return sums[..., 0] / sums[..., 1]
