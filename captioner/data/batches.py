"""Batches from a dataset or from image files.

Letters: N images of a batch.
"""

import collections
import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from captioner.data.augmentation import Augmentation, Change, MirroredCaptions
from captioner.data.batch import Batch, FeatureInputs, KnownCaptions, PixelInputs
from captioner.data.cached_features import CachedFeatures
from captioner.data.crops import IMAGE_SIZE, MAX_CROP_OFFSET
from captioner.data.dataset import Dataset
from captioner.data.epoch_order import EpochOrder
from captioner.data.image_like import ImageLike, read_image_like
from captioner.data.image_mode import ImageMode
from captioner.errors import InputError

Result = TypeVar("Result")

VALIDATION_BATCH = 32  # images of a training run's validation at once; results do not depend on it
UNCHANGED = Change(mirrored=False)
FILES_AHEAD = 64  # decoded images waiting for their batch: 12 MB
NO_IMAGES = torch.empty(0, 3, IMAGE_SIZE, IMAGE_SIZE, dtype=torch.uint8)


class TrainingBatches:
    """Training batch number k, for any k: a function of the seed alone, so that a run resumes exactly.

    Images come in the order of their epoch, without regard to where batches end. Of an image with more than S captions
    a random run of S consecutive ones is taken, with fewer they are drawn with replacement, as the original does
    (misc/DataLoader.lua). Crop offsets are drawn per image. An image that is to be mirrored brings the captions that
    can be told of its mirror image; if there is none, it stays as it is.

    Args:
        dataset: where images and captions come from.
        indices: the images of the training split.
        batch_size: N, images of one batch over all processes.
        seq_per_img: S, captions per image.
        shuffle, weights: of the images of an epoch, see `EpochOrder`.
        features: if given, batches carry them instead of pixels.
        share: this process's rows of each batch, as a function of the batch size.
        all_captions_from: from this batch on images bring all of their captions; None: never.
        augmentation: how images are changed; of features only mirrored ones are known.

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
        weights: np.ndarray | None = None,
        features: CachedFeatures | None = None,
        share: Callable[[int], range] = range,
        all_captions_from: int | None = None,
        augmentation: Augmentation | None = None,
    ) -> None:
        self.dataset, self.batch_size, self.seq_per_img = dataset, batch_size, seq_per_img
        self.seed, self.features, self.share = seed, features, share
        self.all_captions_from, self.augmentation = all_captions_from, augmentation
        self.order = EpochOrder(indices, seed=seed, shuffle=shuffle, weights=weights)
        self.mirrored = MirroredCaptions(dataset.vocab)
        if not share(batch_size):
            raise InputError(
                f"--batch_size {batch_size}: not an image for each process", remedy="start fewer processes"
            )

    def image_indices(self, number: int) -> np.ndarray:
        """Which images of the dataset batch `number` holds, over all processes: int64 (N,)."""
        positions = np.arange(number * self.batch_size, (number + 1) * self.batch_size)
        epochs, places = np.divmod(positions, len(self.order))
        return np.array([self.order(epoch)[place] for epoch, place in zip(epochs, places, strict=True)], np.int64)

    def describe(self, number: int) -> str:
        """Name the images of batch `number`, for messages."""
        names = [str(self.dataset.info[i].get("file_path", f"row {i}")) for i in self.image_indices(number)]
        return f"the batch of {', '.join(names[:3])}{' and others' if len(names) > 3 else ''}"

    def __call__(self, number: int) -> Batch:
        """Build batch `number` (this process's rows of it)."""
        rng = np.random.default_rng((self.seed, 2, number))
        indices = self.image_indices(number)
        # Everything random is drawn for the whole batch before cutting it up: the same for any number of processes.
        offsets = rng.integers(0, MAX_CROP_OFFSET + 1, size=(len(indices), 2))
        changes, known = self._changed(number, indices)
        captions = [self._choose_captions(of_image, rng) for of_image in known]
        if self.all_captions_from is not None and number >= self.all_captions_from:
            captions = known
        crops = rng.integers(0, self.features.crops if self.features is not None else 1, size=len(indices))
        rows = list(self.share(len(indices)))
        indices = indices[rows]
        inputs: PixelInputs | FeatureInputs
        if self.features is not None:
            mirrored = np.array([changes[row].mirrored for row in rows])
            inputs = FeatureInputs(self.features.read(indices, crops[rows], mirrored))
        else:
            images = _read_rows(self.dataset, indices, [changes[row] for row in rows])
            inputs = PixelInputs(images, torch.from_numpy(offsets[rows]))
        info = [self.dataset.info[i] for i in indices]
        return Batch(info, rows, inputs, _known_captions([captions[row] for row in rows]))

    def _changed(self, number: int, indices: np.ndarray) -> tuple[list[Change], list[np.ndarray]]:
        """What becomes of the images of batch `number`, and the captions of each that are still true."""
        known = [self.dataset.captions_of(int(index)) for index in indices]
        if self.augmentation is None:
            return [UNCHANGED] * len(indices), known
        changes = self.augmentation.draw(np.random.default_rng((self.seed, 3, number)), len(indices))
        for row, change in enumerate(changes):
            if change.mirrored:
                captions = self.mirrored(known[row])
                if len(captions):
                    known[row] = captions
                else:
                    changes[row] = dataclasses.replace(change, mirrored=False)
        return changes, known

    def _choose_captions(self, captions: np.ndarray, rng: np.random.Generator) -> np.ndarray:
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
    features: CachedFeatures | None = None,
) -> Iterator[Batch]:
    """Images of a dataset, each with all of its captions and the centre crop.

    Args:
        indices: the images of the whole run.
        positions: for each batch, which of them it holds.
        features: if given, batches carry those of the centre crop instead of pixels.
    """

    def build(places: Sequence[int]) -> Batch:
        chosen = indices[list(places)]
        inputs: PixelInputs | FeatureInputs
        if features is not None:
            inputs = FeatureInputs(features.read(chosen))
        else:
            inputs = PixelInputs(_read_rows(dataset, chosen))
        captions = _known_captions([dataset.captions_of(int(i)) for i in chosen])
        return Batch([dataset.info[i] for i in chosen], list(places), inputs, captions)

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
            inputs=PixelInputs(torch.from_numpy(np.stack([image for _, image in good])) if good else NO_IMAGES),
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


def pinned_ahead(batches: Iterable[Batch]) -> Iterator[Batch]:
    """The batches in page-locked memory, for a GPU; put together in a thread of their own, one ahead."""
    iterator = iter(batches)

    def job() -> Batch | None:
        batch = next(iterator, None)
        return batch and batch.pin()

    for batch in prefetch(itertools.repeat(job), num_workers=1, ahead=1):
        if batch is None:
            return
        yield batch


def _known_captions(of_images: Sequence[np.ndarray]) -> KnownCaptions:
    """The captions of each image in turn, (S, D) each."""
    if not of_images:
        return KnownCaptions()
    counts = torch.tensor([len(captions) for captions in of_images])
    return KnownCaptions(torch.from_numpy(np.concatenate(of_images).astype(np.int64)), torch.repeat_interleave(counts))


def _read_rows(dataset: Dataset, indices: np.ndarray, changes: Sequence[Change] | None = None) -> Tensor:
    """uint8 (N, 3, 256, 256), copied out of the memory-mapped file, and changed."""
    dataset.require_whole_file()
    rows = torch.empty((len(indices), 3, IMAGE_SIZE, IMAGE_SIZE), dtype=torch.uint8)
    for row, index, change in zip(rows.numpy(), indices, changes or [UNCHANGED] * len(indices), strict=True):
        row[...] = change(dataset.images[int(index)])
    return rows
