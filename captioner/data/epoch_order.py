"""Which training images an epoch has, and in which order."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from captioner.errors import InputError


def source_of(info: Mapping[str, Any]) -> str:
    """The input that an image of a mixed data set comes from; "" where there was only one."""
    return str(info.get("source", ""))


def weights_by_source(infos: Sequence[Mapping[str, Any]], weights: Mapping[str, float]) -> np.ndarray | None:
    """float64, the weight of each image by its source, 1 where none is named; None if all weigh the same.

    Raises:
        InputError: there is no such source, or nothing is left.
    """
    if not weights:
        return None
    sources = [source_of(info) for info in infos]
    unknown = sorted(weights.keys() - set(sources))
    if unknown:
        raise InputError(
            f"--source_weights names {unknown[0]!r}, which no training image comes from",
            expected=", ".join(sorted(set(sources))),
        )
    found = np.array([weights.get(source, 1.0) for source in sources])
    if not found.any():
        raise InputError("--source_weights leaves no training image")
    return None if (found == 1).all() else found


class EpochOrder:
    """The images of each epoch, a function of the seed and the epoch alone; every epoch has equally many.

    Args:
        indices: the training images, int64.
        shuffle: whether they come in a new random order each epoch.
        weights: of each of them: an image with weight 2.5 is in every epoch twice, and in half of the epochs once more.
            As many of those with the same weight are there once more in every epoch. None: each is there once.
    """

    def __init__(self, indices: np.ndarray, *, seed: int, shuffle: bool, weights: np.ndarray | None = None) -> None:
        self._seed, self._shuffle = seed, shuffle
        self._groups: list[tuple[np.ndarray, int, int]] = []  # images, how often all of them, how many once more
        for weight in [1.0] if weights is None else np.unique(weights):
            group = indices if weights is None else indices[weights == weight]
            whole = int(weight)
            self._groups.append((group, whole, round((weight - whole) * len(group))))
        self._size = sum(whole * len(group) + more for group, whole, more in self._groups)
        if not self._size:
            raise InputError("--source_weights leaves no training image")
        self._kept: dict[int, np.ndarray] = {}

    def __len__(self) -> int:
        """Images of an epoch."""
        return self._size

    def __call__(self, epoch: int) -> np.ndarray:
        """int64, the images of an epoch in order."""
        if epoch not in self._kept:
            rng = np.random.default_rng((self._seed, 1, epoch))
            parts = []
            for group, whole, more in self._groups:
                parts += [group] * whole + ([rng.choice(group, more, replace=False)] if more else [])
            order = np.concatenate(parts)
            order = rng.permutation(order) if self._shuffle else order
            # Batches of at most two epochs are in the making at any time; older orders are not needed again.
            self._kept = {e: o for e, o in self._kept.items() if e >= epoch - 2} | {epoch: order}
        return self._kept[epoch]
