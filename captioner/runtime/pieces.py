"""Batches that are too large for the device's memory pass through it in pieces."""

import contextlib
import logging
import math
from collections.abc import Iterator, Sequence
from typing import Protocol, TypeVar

import torch

from captioner.errors import InputError
from captioner.runtime.memory import is_out_of_memory

log = logging.getLogger(__name__)

Part = TypeVar("Part", bound="Divisible")


class Divisible(Protocol):
    """What can be cut into smaller ones of its kind; a `Batch` can."""

    @property
    def positions(self) -> Sequence[int]:
        """One per image."""

    def split(self: Part, parts: int) -> list[Part]:
        """Up to `parts` smaller ones."""


class Pieces:
    """Into how many pieces a batch is cut; where the memory is too small for them, their number doubles, for good.

    Args:
        count: pieces to begin with.
        remedy: what to do where the memory is too small even for one image.
    """

    def __init__(self, count: int = 1, remedy: str = "") -> None:
        self.count, self.remedy = count, remedy
        self._halved = False

    @contextlib.contextmanager
    def of(self, batch: Part) -> Iterator[list[Part]]:
        """The pieces of a batch, to be worked on within; running out of memory ends that quietly.

        Then nothing has been done, and the next pieces are smaller: whoever asks goes on until it has succeeded.

        Raises:
            InputError: the memory is too small even for one image at a time.
        """
        if self._halved and torch.cuda.is_available():
            torch.cuda.empty_cache()  # not earlier: the failed work has gone only now; smaller blocks fit elsewhere
        self._halved = False
        try:
            yield batch.split(self.count)
        except (RuntimeError, MemoryError) as error:  # torch's OutOfMemoryError is a RuntimeError
            if not is_out_of_memory(error):
                raise
            if math.ceil(len(batch.positions) / self.count) <= 1:
                raise InputError("out of memory with one image at a time", remedy=self.remedy) from error
            self._halve(len(batch.positions))

    def _halve(self, num_images: int) -> None:
        size = math.ceil(num_images / self.count)
        smaller = math.ceil(size / 2)
        self.count = math.ceil(num_images / smaller)
        self._halved = True
        log.warning(
            "out of memory with %d images at once: going on with %d, in %d pieces; the results are the same",
            size,
            smaller,
            self.count,
        )
