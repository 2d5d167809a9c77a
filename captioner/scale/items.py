"""What goes through captioning shards: pictures that are decoded, then what was said about them."""

import dataclasses
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np

from captioner.data.batches import FILES_AHEAD, prefetch
from captioner.data.image_mode import ImageMode
from captioner.data.shards import Member, decode, read_members
from captioner.errors import InputError


@dataclass(slots=True)
class Item:
    """A picture of a shard; or, as its last item, the shard's end; or the reason why all of the shard is missing."""

    shard: int  # its place in the run's list of shards
    index: int  # of the picture within the shard; of the end: how many pictures there are
    id: str = ""
    file_name: str = ""
    pixels: np.ndarray | None = None  # uint8 (3, 256, 256)
    error: str = ""  # why there are no pixels
    row: str = ""  # what was found, as JSON: see output.rows
    end: bool = False


# Batches of pictures that are decoded → the same with their rows, in order; the next may be read before one is done.
Worker: TypeAlias = Callable[[Iterable[Sequence[Item]]], Iterator[list[Item]]]


def read_items(shard: int, path: str, image_mode: ImageMode, num_workers: int) -> Iterator[Item]:
    """The pictures of a shard in order, decoded by so many threads ahead of who takes them; then its end.

    The same shard gives the same items every time: who has lost some reads it again.
    """

    def item(index: int, member: Member) -> Item:
        found = decode(member, image_mode)
        known = Item(shard, index, member.id, member.file_name)
        return dataclasses.replace(known, **({"error": found} if isinstance(found, str) else {"pixels": found}))

    numbers = itertools.count()
    jobs = (
        lambda index=index, member=member: item(index, member)
        for index, member in zip(numbers, read_members(path), strict=False)
    )
    count = 0
    try:
        for one in prefetch(jobs, num_workers, FILES_AHEAD):
            yield one
            count += 1
        yield Item(shard, count, end=True)
    except InputError as error:
        yield Item(shard, 0, error=str(error), end=True)
