"""CNN features of a whole dataset that were computed once, as they are read; `training/feature_cache.py` makes them.

Letters: I images of the dataset, N of a batch, K crops, S the shape of one feature, of which C, the last, counts
channels.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from captioner.data.checked_rows import check_sums
from captioner.errors import InputError


@dataclass(frozen=True)
class CachedFeatures:
    """Features on disk: of each image those of its crops, and of the same crops of the mirrored image or not.

    Attributes:
        values: (I, K, *S), or (I, 2·K, *S) with the mirrored image's after the others; memory-mapped. What uint8 means
            is under `scale`.
        scale: float32 (C,): uint8 values times it are the square roots of the features; None for other types.
        crops: K; the first is the centre.
        sums: of `values`: uint32 (I, K) or (I, 2·K), memory-mapped; None: there are none, as of features made up.
        path: the file, for messages.
    """

    values: np.ndarray
    scale: np.ndarray | None
    crops: int
    sums: np.ndarray | None = None
    path: Path = Path()

    @property
    def knows_mirrored(self) -> bool:
        """Whether the mirrored image was looked at, too; else its grid is taken for the grid of the image, mirrored."""
        return self.values.shape[1] > self.crops

    def read(self, indices: np.ndarray, crops: np.ndarray | int = 0, mirrored: np.ndarray | None = None) -> Tensor:
        """float32 (N, *S): of each image one crop.

        Args:
            indices: int (N,), rows of the dataset.
            crops: int (N,) below K, or one for all.
            mirrored: bool (N,); None: no image is.

        Raises:
            InputError: they are not what was written.
        """
        if mirrored is None or not mirrored.any():
            return self._plain(indices, crops)
        if self.knows_mirrored:
            return self._plain(indices, crops + self.crops * mirrored)
        features = self._plain(indices, crops)
        features[torch.from_numpy(mirrored)] = mirror_grids(features[torch.from_numpy(mirrored)])
        return features

    def _plain(self, indices: np.ndarray, views: np.ndarray | int) -> Tensor:
        stored = self.values[indices, views]
        self._check(stored, indices, np.broadcast_to(views, indices.shape))
        rows = stored.astype(np.float32)
        if self.scale is not None:
            rows *= self.scale
            np.square(rows, out=rows)
        return torch.from_numpy(rows)

    def _check(self, stored: np.ndarray, indices: np.ndarray, views: np.ndarray) -> None:
        if self.sums is None:
            return
        found = check_sums(stored, place_numbers(indices, views, self.values.shape[1]).tolist())
        wrong = indices[found != self.sums[indices, views]]
        if len(wrong):
            raise InputError(
                f"{self.path}: the features of image {wrong[0]} are damaged (their check sum differs)",
                remedy="delete it and run again",
            )


def place_numbers(indices: np.ndarray, views: np.ndarray, num_views: int) -> np.ndarray:
    """Which view of which image it is: one number, whose check sum tells it from all others."""
    return indices.astype(np.int64) * num_views + views


def mirror_grids(features: Tensor) -> Tensor:
    """Grids with left and right exchanged: (N, side², C), row by row, or (N, side, side, C).

    Nearly the grid of the mirrored photo: what each cell shows is the same, but the CNN saw it the other way round.
    """
    if features.ndim == 4:
        return features.flip(2)
    side = round(features.shape[1] ** 0.5)
    return features.unflatten(1, (side, side)).flip(2).flatten(1, 2)
