"""Finds the pictures of a dataset to be that are there twice.

A picture that is in the training set and, rescaled or recompressed, in the test set too makes every score too good.
Candidates are found by a perceptual hash, the signs of brightness differences between neighbours ("dHash"), and
then compared as thumbnails.
"""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from captioner.data.crops import IMAGE_SIZE

_THUMBNAIL_SIDE = 16
_HASH_SIDE = 8  # 8×8 blocks, each compared with its right neighbour: 56 bits
_MAX_HASH_DISTANCE = 10
_MIN_CORRELATION = 0.97  # of the thumbnails; different photos of one scene stay below
_MIN_CONTRAST = 4.0  # standard deviation in grey levels below which there is nothing to recognise a picture by
_BLOCK = 1024  # pictures compared with all later ones at a time


@dataclass(frozen=True)
class Pair:
    """Two pictures by their positions, and whether their pixels are the same."""

    first: int
    second: int
    exact: bool


class Thumbnails:
    """Keeps about 400 bytes per picture and finds the ones that look the same."""

    def __init__(self) -> None:
        self._positions: list[int] = []
        self._digests: list[bytes] = []
        self._thumbnails: list[np.ndarray] = []

    def add(self, position: int, pixels: np.ndarray) -> None:
        """Take note of a picture, uint8 (3, 256, 256)."""
        self._positions.append(position)
        self._digests.append(hashlib.blake2b(np.ascontiguousarray(pixels).data, digest_size=16).digest())
        block = IMAGE_SIZE // _THUMBNAIL_SIDE
        sums = pixels.reshape(3, _THUMBNAIL_SIDE, block, IMAGE_SIZE).sum((0, 2), dtype=np.uint32)
        thumbnail = sums.reshape(_THUMBNAIL_SIDE, _THUMBNAIL_SIDE, block).sum(2)
        self._thumbnails.append((thumbnail / (3 * block * block)).astype(np.float32).ravel())

    def pairs(self) -> list[Pair]:
        """Each picture that looks like an earlier one, with that one, in order of the later one."""
        first_of: dict[bytes, int] = {}
        found: dict[int, tuple[int, bool]] = {}
        for index, digest in enumerate(self._digests):
            first = first_of.setdefault(digest, index)
            if first != index:
                found[index] = first, True
        for first, second in self._near(np.array(sorted(first_of.values()), dtype=np.int64)):
            found.setdefault(second, (first, False))
        return [
            Pair(self._positions[first], self._positions[second], exact)
            for second, (first, exact) in sorted(found.items())
        ]

    def _near(self, indices: np.ndarray) -> Iterator[tuple[int, int]]:
        """Pairs (earlier, later) of nearly equal pictures among `indices`."""
        if not len(indices):
            return
        thumbnails = np.stack([self._thumbnails[index] for index in indices])
        contrast = thumbnails.std(axis=1)
        indices, thumbnails = indices[contrast >= _MIN_CONTRAST], thumbnails[contrast >= _MIN_CONTRAST]
        if not len(indices):  # pictures of one colour each
            return
        step = _THUMBNAIL_SIDE // _HASH_SIDE
        blocks = thumbnails.reshape(-1, _HASH_SIDE, step, _HASH_SIDE, step).mean(axis=(2, 4))
        signs = np.where(np.diff(blocks, axis=2) > 0, np.float32(1), np.float32(-1)).reshape(len(blocks), -1)
        thumbnails = thumbnails - thumbnails.mean(axis=1, keepdims=True)
        thumbnails /= np.linalg.norm(thumbnails, axis=1, keepdims=True)
        for start in range(0, len(indices), _BLOCK):
            stop = start + _BLOCK
            # The product of two hashes of signs is their length minus twice the number of bits that differ.
            agreement = signs[start:stop] @ signs[start:].T
            rows, columns = np.nonzero(agreement >= signs.shape[1] - 2 * _MAX_HASH_DISTANCE)
            rows, columns = rows[rows < columns] + start, columns[rows < columns] + start
            alike = np.einsum("ij,ij->i", thumbnails[rows], thumbnails[columns]) >= _MIN_CORRELATION
            for first, second in zip(rows[alike], columns[alike], strict=True):
                yield int(indices[first]), int(indices[second])
