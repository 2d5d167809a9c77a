"""Batches from a dataset or from image files; one batch type for both.

Letters: N images of a batch, M their captions, D words per caption, F width of a cached CNN feature.
"""

import collections
import functools
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from captioner.data.dataset import Dataset
from captioner.data.image_like import ImageLike, read_image_like
from captioner.data.image_mode import ImageMode
from captioner.data.images import IMAGE_SIZE, MAX_CROP_OFFSET
from captioner.errors import InputError

Result = TypeVar("Result")

VALIDATION_BATCH = 32  # images of a training run's validation at once; results do not depend on it
FILES_AHEAD = 64  # decoded images waiting for their batch: 12 MB


@dataclass
class Batch:
    """Images with what is known about them. Either `images` or `features` is present."""

    info: list[dict[str, Any]]  # per image: id, file_path, ... as the source has them
    positions: list[int]  # of each image within the whole run, from 0
    images: Tensor | None = None  # uint8 (N, 3, 256, 256), RGB
    features: Tensor | None = None  # float32 (N, F): cached CNN features
    offsets: Tensor | None = None  # int64 (N, 2): first row and column of each training crop; None is the centre
    labels: Tensor | None = None  # int64 (M, D): word ids, 0-padded
    image_of_caption: Tensor | None = None  # int64 (M,): row of `images` that each caption describes
    skipped: list[tuple[str, str]] = field(default_factory=list)  # files that could not be read: name, reason

    def to(self, device: torch.device) -> "Batch":
        """The same batch with its tensors on `device`; copies overlap with computation where memory is pinned.

        Labels stay on the CPU: the decoder arranges them there.
        """
        moved = {
            name: value.to(device, non_blocking=True)
            for name, value in vars(self).items()
            if isinstance(value, Tensor) and name != "labels"
        }
        return Batch(**{**vars(self), **moved})

    def pin(self) -> "Batch":
        """The same batch in page-locked memory, so that copies to a GPU need not wait."""
        pinned = {name: value.pin_memory() for name, value in vars(self).items() if isinstance(value, Tensor)}
        return Batch(**{**vars(self), **pinned})

    def split(self, parts: int) -> "list[Batch]":
        """The batch cut into up to `parts` smaller ones with about equally many images each."""
        count = len(self.positions)
        if parts <= 1 or count <= 1:
            return [self]
        size = math.ceil(count / parts)
        pieces = []
        for start in range(0, count, size):
            rows = slice(start, start + size)
            piece = Batch(
                info=self.info[rows],
                positions=self.positions[rows],
                images=None if self.images is None else self.images[rows],
                features=None if self.features is None else self.features[rows],
                offsets=None if self.offsets is None else self.offsets[rows],
                skipped=self.skipped if start == 0 else [],
            )
            if self.labels is not None and self.image_of_caption is not None:
                chosen = (self.image_of_caption >= start) & (self.image_of_caption < start + size)
                piece.labels, piece.image_of_caption = self.labels[chosen], self.image_of_caption[chosen] - start
            pieces.append(piece)
        return pieces


class TrainingBatches:
    """Training batch number k, for any k: a function of the seed alone, so that a run resumes exactly.

    Images come in a new random order each epoch (`shuffle`), without regard to where batches end. Of an image with more
    than S captions a random run of S consecutive ones is taken, with fewer they are drawn with replacement, as the
    original does (misc/DataLoader.lua). Crop offsets are drawn per image.

    Args:
        dataset: where images and captions come from.
        indices: the images of the training split.
        batch_size: N, images of one batch over all processes.
        seq_per_img: S, captions per image.
        features: float (images of the dataset, crops, F); if given, batches carry features instead of pixels.
        share: this process's rows of each batch, as a function of the batch size.
        all_captions_from: from this batch on images bring all of their captions; None: never.

    Raises:
        InputError: this process would have no rows.
    """

    def __init__(
        self,
        dataset: Dataset,
        indices: np.ndarray,
        *,
        batch_size: int,
        seq_per_img: int,
        seed: int,
        shuffle: bool,
        features: np.ndarray | None = None,
        share: Callable[[int], range] = range,
        all_captions_from: int | None = None,
    ) -> None:
        self.dataset, self.indices, self.batch_size, self.seq_per_img = dataset, indices, batch_size, seq_per_img
        self.seed, self.shuffle, self.features, self.share = seed, shuffle, features, share
        self.all_captions_from = all_captions_from
        self._orders: dict[int, np.ndarray] = {}
        if not share(batch_size):
            raise InputError(
                f"--batch_size {batch_size}: not an image for each process", remedy="start fewer processes"
            )

    def image_indices(self, number: int) -> np.ndarray:
        """Which images of the dataset batch `number` holds, over all processes: int64 (N,)."""
        positions = np.arange(number * self.batch_size, (number + 1) * self.batch_size)
        epochs, places = np.divmod(positions, len(self.indices))
        return np.array([self._order(epoch)[place] for epoch, place in zip(epochs, places, strict=True)], np.int64)

    def describe(self, number: int) -> str:
        """Name the images of batch `number`, for messages."""
        names = [str(self.dataset.info[i].get("file_path", f"row {i}")) for i in self.image_indices(number)]
        return f"the batch of {', '.join(names[:3])}{' and others' if len(names) > 3 else ''}"

    def _order(self, epoch: int) -> np.ndarray:
        if not self.shuffle:
            return self.indices
        if epoch not in self._orders:
            order = np.random.default_rng((self.seed, 1, epoch)).permutation(self.indices)
            # Batches of at most two epochs are in the making at any time; older orders are not needed again.
            self._orders = {e: o for e, o in self._orders.items() if e >= epoch - 2} | {epoch: order}
        return self._orders[epoch]

    def __call__(self, number: int) -> Batch:
        """Build batch `number` (this process's share of it)."""
        rng = np.random.default_rng((self.seed, 2, number))
        indices = self.image_indices(number)
        # Everything random is drawn for the whole batch before sharing it out: the same for any number of processes.
        offsets = rng.integers(0, MAX_CROP_OFFSET + 1, size=(len(indices), 2))
        captions = [self._choose_captions(int(index), rng) for index in indices]
        if self.all_captions_from is not None and number >= self.all_captions_from:
            captions = [self.dataset.captions_of(int(index)) for index in indices]
        crops = rng.integers(0, self.features.shape[1] if self.features is not None else 1, size=len(indices))
        rows = list(self.share(len(indices)))
        indices = indices[rows]
        batch = Batch(
            info=[self.dataset.info[i] for i in indices],
            positions=rows,
            labels=torch.from_numpy(np.concatenate([captions[row] for row in rows]).astype(np.int64)),
            image_of_caption=torch.repeat_interleave(torch.tensor([len(captions[row]) for row in rows])),
        )
        if self.features is not None:
            batch.features = torch.from_numpy(self.features[indices, crops[rows]].astype(np.float32))
        else:
            batch.images = _read_rows(self.dataset, indices)
            batch.offsets = torch.from_numpy(offsets[rows])
        return batch

    def _choose_captions(self, index: int, rng: np.random.Generator) -> np.ndarray:
        captions = self.dataset.captions_of(index)
        count, wanted = len(captions), self.seq_per_img
        if count < wanted:
            return captions[rng.integers(0, count, size=wanted)]
        first = rng.integers(0, count - wanted + 1)
        return captions[first : first + wanted]


def dataset_batches(
    dataset: Dataset,
    indices: np.ndarray,
    positions: Iterable[Sequence[int]],
    num_workers: int,
    features: np.ndarray | None = None,
) -> Iterator[Batch]:
    """Images of a dataset, each with all of its captions and the centre crop.

    Args:
        indices: the images of the whole run.
        positions: for each batch, which of them it holds.
        features: float (images of the dataset, crops, F); the first crop is the centre.
    """

    def build(places: Sequence[int]) -> Batch:
        chosen = indices[list(places)]
        captions = [dataset.captions_of(int(i)) for i in chosen]
        batch = Batch(info=[dataset.info[i] for i in chosen], positions=list(places))
        if captions:
            batch.labels = torch.from_numpy(np.concatenate(captions).astype(np.int64))
            counts = torch.tensor([len(c) for c in captions])
            batch.image_of_caption = torch.arange(len(chosen)).repeat_interleave(counts)
        if features is not None:
            batch.features = torch.from_numpy(features[chosen, 0].astype(np.float32))
        else:
            batch.images = _read_rows(dataset, chosen)
        return batch

    return prefetch((functools.partial(build, places) for places in positions), num_workers, ahead=2 * num_workers)


def shares(count: int, batch_size: int, rank: int, size: int, first: int = 0) -> Iterator[range]:
    """Positions first..count-1 in rounds of one batch per process; yields this process's part of every round.

    All processes see the same number of rounds, so that they can meet after each; the last may leave some without work.
    """
    for start in range(first + rank * batch_size, count + rank * batch_size, size * batch_size):
        yield range(min(start, count), min(start + batch_size, count))


def file_batches(
    files: Sequence[tuple[ImageLike, dict[str, Any]]],
    positions: Iterable[Sequence[int]],
    num_workers: int,
    image_mode: ImageMode = "squash",
) -> Iterator[Batch]:
    """Batches of files or other pictures, decoded in worker threads (decoders leave Python's lock while they work).

    Args:
        files: every picture of the run, and what is known about it.
        positions: for each batch, which of them it holds.
        image_mode: what becomes of pictures that are no squares: the model's.

    Yields:
        A batch per group of positions, with its readable images; unreadable ones are listed under `skipped`.
    """

    def read(position: int) -> np.ndarray | str:
        try:
            return read_image_like(files[position][0], image_mode)
        except InputError as error:
            return str(error)

    # Single images are the jobs, not batches: the first batch is ready as soon as all workers together can make it.
    groups, flat = itertools.tee(positions)
    jobs = (functools.partial(read, position) for group in flat for position in group)
    images = prefetch(jobs, num_workers, ahead=FILES_AHEAD)
    for group in groups:
        rows = list(zip(group, itertools.islice(images, len(group)), strict=True))
        good = [(position, image) for position, image in rows if not isinstance(image, str)]
        yield Batch(
            info=[files[position][1] for position, _ in good],
            positions=[position for position, _ in good],
            images=torch.from_numpy(np.stack([image for _, image in good])) if good else None,
            skipped=[(files[position][1]["file_path"], image) for position, image in rows if isinstance(image, str)],
        )


def prefetch(jobs: Iterable[Callable[[], Result]], num_workers: int, ahead: int) -> Iterator[Result]:
    """Run jobs in threads, at most `ahead` of the consumer, and yield their results in order.

    With `num_workers` 0 they run in the caller's thread, which is easier to debug.
    """
    if num_workers == 0:
        yield from (job() for job in jobs)
        return
    pending: collections.deque[Future[Result]] = collections.deque()
    pool = ThreadPoolExecutor(num_workers, thread_name_prefix="loader")
    try:
        for job in jobs:
            pending.append(pool.submit(job))
            if len(pending) > ahead:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def _read_rows(dataset: Dataset, indices: np.ndarray) -> Tensor:
    """uint8 (N, 3, 256, 256), copied out of the memory-mapped file."""
    dataset.require_whole_file()
    rows = torch.empty((len(indices), 3, IMAGE_SIZE, IMAGE_SIZE), dtype=torch.uint8)
    for row, index in zip(rows.numpy(), indices, strict=True):
        row[...] = dataset.images[int(index)]
    return rows
