"""Captions of shards: which there are, what is said about their pictures, and the loop in this process."""

import collections
import glob
import hashlib
import itertools
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from json import dumps
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

import captioner
from captioner.data.batch import Batch, PixelInputs
from captioner.data.batches import NO_IMAGES
from captioner.data.listing import SHARD_SUFFIXES, natural_key, require_pyarrow
from captioner.data.shards import is_parquet, is_shard, read_members
from captioner.errors import InputError
from captioner.inference.caption import Caption
from captioner.output.rows import caption_row
from captioner.runtime.files import protect
from captioner.runtime.precision import Precision
from captioner.runtime.storage import find, is_remote, on_this_machine
from captioner.scale.items import Item, Worker

if TYPE_CHECKING:
    from captioner import Model


def find_shards(names: Sequence[str]) -> list[str]:
    """The shards that names stand for, in their order: files, folders of shards, patterns, addresses.

    Raises:
        InputError: a name stands for nothing, or for something else, or for what this Python cannot read.
    """
    found: list[str] = []
    for name in names:
        if is_remote(name):
            found += find(name)
        elif os.path.isdir(name):
            inside = [entry.path for entry in os.scandir(name) if entry.name.lower().endswith(SHARD_SUFFIXES)]
            if not inside:
                raise InputError(f"{name}: no shards (.tar, .parquet) in this folder")
            found += sorted(inside, key=natural_key)
        elif os.path.lexists(name):
            found.append(name)
        else:
            matches = sorted(glob.glob(name, recursive=True), key=natural_key)
            if not matches:
                raise InputError(f"{name}: no such shard")
            found += matches
    for name in found:
        # One that is damaged from its first byte on is known by its ending, and listed later.
        if not (name.lower().endswith(SHARD_SUFFIXES) or is_shard(name)):
            raise InputError(
                f"{name}: is no shard", expected="tar archives or Parquet files of pictures, with --output_dir"
            )
        here = on_this_machine(name)
        if here is not None:
            protect(here)
    if any(map(is_parquet, found)):
        require_pyarrow()
    return list(dict.fromkeys(found))


def first_pictures(shards: Iterable[str], count: int) -> list[bytes]:
    """The contents of so many files of the first shard, and of the next ones if it has fewer."""
    members = itertools.chain.from_iterable(map(read_members, shards))
    return [member.data for member in itertools.islice(members, count) if not member.error]


def digest_of(path: str | os.PathLike[str]) -> str:
    """The same for the same content, on any machine."""
    digest = hashlib.blake2b(digest_size=10)
    with open(path, "rb") as stream:
        while block := stream.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def _batch_of(items: Sequence[Item]) -> Batch:
    """Those of the pictures that could be decoded."""
    good = [item for item in items if item.pixels is not None]
    pixels = [item.pixels for item in good if item.pixels is not None]
    return Batch(
        info=[{"id": item.id, "file_path": item.file_name} for item in good],
        positions=[item.index for item in good],  # by which random draws differ
        inputs=PixelInputs(torch.from_numpy(np.stack(pixels)) if pixels else NO_IMAGES),
    )


class CaptionItems:
    """A Worker: says what a model sees.

    Args:
        search: as for `Model.search_options`.
        seed: of sampling; picture i of a shard draws from seed + i.

    Raises:
        InputError: an option makes no sense.
    """

    def __init__(self, model: "Model", search: Mapping[str, Any], seed: int, min_confidence: float) -> None:
        self.model, self.options = model, model.search_options(**search)
        self.seed, self.min_confidence = seed, min_confidence

    def __call__(self, batches: Iterable[Sequence[Item]]) -> Iterator[list[Item]]:
        """Batch after batch; a GPU encodes the next one meanwhile."""
        taken: collections.deque[Sequence[Item]] = collections.deque()  # whoever captions may read ahead

        def decoded() -> Iterator[Batch]:
            for items in batches:
                taken.append(items)
                yield _batch_of(items)

        for evaluated in self.model.run_batches(decoded(), self.options, seed=self.seed):
            captions = iter(self.model.captions_of(evaluated, self.min_confidence))
            yield [item if item.pixels is None else _said(item, next(captions)) for item in taken.popleft()]


def _said(item: Item, caption: Caption) -> Item:
    return replace(item, pixels=None, row=dumps(caption_row(caption), ensure_ascii=False))


@dataclass(frozen=True)
class LoadCaptionItems:
    """Makes a CaptionItems on another machine, where the models' files need not be.

    Attributes:
        models: contents of checkpoints; none: the bundled one.
        calibration: see `captioner.load_model`.
    """

    models: Sequence[bytes]
    precision: Precision
    calibration: Sequence[bytes]
    search: Mapping[str, Any]
    seed: int
    min_confidence: float

    def __call__(self, device: str, num_threads: int) -> Worker:
        torch.set_num_threads(num_threads)
        with tempfile.TemporaryDirectory(prefix="captioner-") as folder:
            paths = [Path(folder, f"{number}.pt") for number in range(len(self.models))]
            for path, content in zip(paths, self.models, strict=True):
                path.write_bytes(content)
            model = captioner.load_model(paths or None, device, self.precision, self.calibration)
            return CaptionItems(model, self.search, self.seed, self.min_confidence)


def run_here(
    shards: Sequence[str],
    numbers: Iterable[int],
    read: Callable[[int, str], Iterator[Item]],
    worker: CaptionItems,
    batch_size: int,
) -> Iterator[Item]:
    """The pictures of the shards that are asked for, through a worker in this process."""
    items = itertools.chain.from_iterable(read(number, shards[number]) for number in numbers)
    batches = iter(lambda: list(itertools.islice(items, batch_size)), [])
    return itertools.chain.from_iterable(worker(batches))
