"""A GPU encodes the next batch while it searches captions for this one.

A search is a long row of small kernels with a question to the host at every step; alone it leaves most of a GPU idle.
So the CNN of batch k+1 is queued before batch k is searched, and the search has a queue of the GPU ("stream") of its
own, whose kernels go first where both want a processor. Pixels come through a third one, beside all computing.
"""

import contextlib
import functools
import logging
import threading
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from captioner.data.batch import Batch
from captioner.errors import InputError
from captioner.runtime.memory import is_out_of_memory
from captioner.runtime.pieces import Pieces

log = logging.getLogger(__name__)


@dataclass
class Seen:
    """What models see of a batch of images.

    Attributes:
        encodings: for each model what its decoder reads, one row per image: (N, E), or (N, G, E) where it attends.
        grid: (N, C, S, S), the first model's last convolution block, where it was asked for.
        ready: what a GPU notes when it has computed this; None: whoever reads it is behind it in the same queue.
    """

    encodings: list[Tensor]
    grid: Tensor | None = None
    ready: torch.cuda.Event | None = None


class Sees(Protocol):
    """What encodes batches: a `Captioner`."""

    device: torch.device
    pieces: Pieces
    turn: threading.RLock

    def see(self, batch: Batch, with_grid: bool) -> Seen: ...


class Lookahead:
    """Queues of a GPU, so that a captioner's CNN is a batch ahead of its searches.

    Args:
        with_grid: whether the grid of the last convolution block is wanted, too.
    """

    def __init__(self, captioner: Sees, with_grid: bool) -> None:
        self.captioner, self.with_grid = captioner, with_grid
        self._uploads, self._searches = _streams(captioner.device)
        self._fits = True

    def encoded(self, batches: Iterable[Batch]) -> Iterator[tuple[Batch, Seen | None]]:
        """Every batch, when the next one is queued, with what the models see of it; None where memory is too small for
        two batches at once."""
        before: tuple[Batch, Seen | None] | None = None
        failed: InputError | None = None
        try:
            for batch in batches:
                queued = batch, self._queue(batch)
                if before:
                    yield before
                before = queued
        except InputError as error:  # of the next batch: what comes before it is not lost
            failed = error
        if before:
            yield before
        if failed:
            raise failed

    @contextlib.contextmanager
    def searching(self, seen: Seen) -> Iterator[None]:
        """Within, the GPU is given work for the queue of searches, which waits for what they are about."""
        assert seen.ready
        self._searches.wait_event(seen.ready)
        _keep_for(self._searches, seen.encodings, [seen.grid])
        with torch.cuda.stream(self._searches):
            yield

    @torch.inference_mode()
    def _queue(self, batch: Batch) -> Seen | None:
        if not (batch.positions and self._fits and self.captioner.pieces.count == 1):
            return None
        computing = torch.cuda.current_stream(self.captioner.device)
        try:
            with self.captioner.turn:
                with torch.cuda.stream(self._uploads):
                    moved = batch.to(self.captioner.device)
                computing.wait_stream(self._uploads)
                _keep_for(computing, vars(moved.inputs).values())
                seen = self.captioner.see(moved, self.with_grid)
                seen.ready = computing.record_event()
                return seen
        except RuntimeError as error:  # torch's OutOfMemoryError is one
            if not is_out_of_memory(error):
                raise
            log.info("too little memory to encode a batch while another is searched: one after the other")
            self._fits = False
            return None


def _keep_for(stream: torch.cuda.Stream, *groups: Iterable[Tensor | None]) -> None:
    """Memory from one queue is given to others only when this queue, too, has done with it."""
    for tensor in (tensor for group in groups for tensor in group if tensor is not None):
        tensor.record_stream(stream)


@functools.cache
def _streams(device: torch.device) -> tuple[torch.cuda.Stream, torch.cuda.Stream]:
    """For uploads and for searches; one pair for all, because each keeps the memory that it has freed."""
    return torch.cuda.Stream(device), torch.cuda.Stream(device, priority=-1)
