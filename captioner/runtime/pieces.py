"""Batches that are too large for the device's memory pass through it in pieces."""

import logging
import math
from collections.abc import Callable, Sequence
from typing import Protocol, TypeVar

import torch

log = logging.getLogger(__name__)

Result = TypeVar("Result")
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
    """

    def __init__(self, count: int = 1) -> None:
        self.count = count

    def each(
        self, batch: Part, work: Callable[[Part], Result], begin: Callable[[], None] | None = None
    ) -> list[Result]:
        """What `work` makes of each piece of the batch, all of the same attempt.

        Args:
            begin: called before every attempt; undoes what one without enough memory left behind.

        Raises:
            torch.OutOfMemoryError: the memory is too small even for one image at a time.
        """
        while True:
            if begin:
                begin()
            try:
                return [work(piece) for piece in batch.split(self.count)]
            except torch.OutOfMemoryError:
                if math.ceil(len(batch.positions) / self.count) <= 1:
                    raise
            # The handler is left before the next attempt: its traceback keeps activations alive.
            self._halve(len(batch.positions))

    def _halve(self, num_images: int) -> None:
        size = math.ceil(num_images / self.count)
        smaller = math.ceil(size / 2)
        self.count = math.ceil(num_images / smaller)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()  # blocks of the old sizes are of no use to smaller ones
        log.warning(
            "out of memory with %d images at once: going on with %d, in %d pieces; the results are the same",
            size,
            smaller,
            self.count,
        )
