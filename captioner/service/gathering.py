"""Pictures of many requests, captioned in shared batches."""

import asyncio
import collections
import contextlib
import time
from collections.abc import Callable, Hashable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Generic, TypeVar

from captioner.service.limits import Limits, busy

Picture = TypeVar("Picture")
Options = TypeVar("Options", bound=Hashable)
Result = TypeVar("Result")


@dataclass
class _Waiting(Generic[Picture, Options, Result]):
    picture: Picture
    options: Options
    result: "asyncio.Future[Result]"


class Gatherer(Generic[Picture, Options, Result]):
    """Hands pictures to a model in batches: whatever came while the model was busy goes together.

    Args:
        caption: called with pictures that share their options, in a thread of its own, never twice at once.
        limits: batch size, how long an idle model waits for company, and the length of the queue.
        observe: told the size of each batch and the seconds it took.
    """

    def __init__(
        self,
        caption: Callable[[Sequence[Picture], Options], Sequence[Result]],
        limits: Limits,
        observe: Callable[[int, float], None] = lambda size, seconds: None,
    ) -> None:
        self.limits = limits
        self.places_taken = 0
        self._caption, self._observe = caption, observe
        self._waiting: collections.deque[_Waiting[Picture, Options, Result]] = collections.deque()
        self._arrived = asyncio.Event()
        self._thread = ThreadPoolExecutor(1, "captions")
        self._seconds_per_picture = 0.0  # mean of the latest batches; at first nothing is expected
        self._num_batches = 0
        self._loop_task: asyncio.Task[None] | None = None

    async def __aenter__(self) -> "Gatherer[Picture, Options, Result]":
        self._loop_task = asyncio.create_task(self._run())
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._loop_task is not None
        self._loop_task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._loop_task
        self._thread.shutdown()

    @contextlib.contextmanager
    def places(self, count: int) -> Iterator[None]:
        """Hold places in the queue for the pictures of a request, from before they are decoded to the answer.

        Raises:
            Refusal: there are not that many left, or the last of them would wait for too long; says when to try again.
        """
        if self.places_taken + count > self.limits.queue:
            raise busy("too many pictures are waiting", self.expected_seconds(0))
        # Who comes alone is served, however slow this machine is.
        if self.places_taken and self.expected_seconds(count) > self.limits.queue_seconds:
            raise busy("pictures wait for too long", self.expected_seconds(count) - self.limits.queue_seconds)
        self.places_taken += count
        try:
            yield
        finally:
            self.places_taken -= count

    def expected_seconds(self, more: int = 1) -> float:
        """Until what has a place now, and `more` pictures behind it, would have its captions."""
        return (self.places_taken + more) * self._seconds_per_picture

    @property
    def is_full(self) -> bool:
        """Whether another picture would be refused."""
        too_long = self.expected_seconds() > self.limits.queue_seconds
        return self.places_taken >= self.limits.queue or (self.places_taken > 0 and too_long)

    async def submit(self, picture: Picture, options: Options) -> Result:
        """The caption of one picture. Cancelled while it waits, it is left out of its batch."""
        waiting = _Waiting(picture, options, asyncio.get_running_loop().create_future())
        self._waiting.append(waiting)
        self._arrived.set()
        return await waiting.result

    async def _run(self) -> None:
        while True:
            await self._arrived.wait()
            if len(self._waiting) < self.limits.batch_size:
                await asyncio.sleep(self.limits.batch_seconds)
            batch = self._next_batch()
            if not self._waiting:
                self._arrived.clear()
            if batch:
                await self._caption_batch(batch)

    def _next_batch(self) -> list[_Waiting[Picture, Options, Result]]:
        """The picture that has waited for longest, and those behind it with the same options."""
        batch: list[_Waiting[Picture, Options, Result]] = []
        others: collections.deque[_Waiting[Picture, Options, Result]] = collections.deque()
        for one in self._waiting:
            if one.result.done():
                continue  # its client has gone, or its time is up
            if len(batch) < self.limits.batch_size and (not batch or one.options == batch[0].options):
                batch.append(one)
            else:
                others.append(one)
        self._waiting = others
        return batch

    async def _caption_batch(self, batch: list[_Waiting[Picture, Options, Result]]) -> None:
        started = time.monotonic()
        pictures = [one.picture for one in batch]
        try:
            loop = asyncio.get_running_loop()
            results = await loop.run_in_executor(self._thread, self._caption, pictures, batch[0].options)
        except Exception as error:
            # The requests get it; the service goes on with the next batch.
            for one in batch:
                if not one.result.done():
                    one.result.set_exception(error)
            return
        seconds = time.monotonic() - started
        self._num_batches += 1
        if self._num_batches > 1:  # the first one sets everything up, and tells nothing about the others
            weight = max(0.1, 1 / (self._num_batches - 1))
            self._seconds_per_picture += weight * (seconds / len(batch) - self._seconds_per_picture)
        self._observe(len(batch), seconds)
        for one, result in zip(batch, results, strict=True):
            if not one.result.done():
                one.result.set_result(result)
