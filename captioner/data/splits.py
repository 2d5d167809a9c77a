"""Which pictures train, which choose the best model, and which are kept for the test."""

import random
from collections.abc import Sequence

from captioner.data.captioned import CaptionedPicture
from captioner.errors import InputError


def assign_splits(pictures: Sequence[CaptionedPicture], num_val: int, num_test: int, seed: int) -> list[str]:
    """The split of each picture: its own, else shuffled with the seed num_val, then num_test, the rest train.

    Raises:
        InputError: there are fewer pictures without a split than asked for.
    """
    order = without_split(pictures, num_val, num_test)
    random.Random(seed).shuffle(order)
    splits = [picture.split or "train" for picture in pictures]
    for place, index in enumerate(order[: num_val + num_test]):
        splits[index] = "val" if place < num_val else "test"
    return splits


def without_split(pictures: Sequence[CaptionedPicture], num_val: int, num_test: int) -> list[int]:
    """The places of the pictures that the numbers are taken from.

    Raises:
        InputError: there are too few of them.
    """
    places = [index for index, picture in enumerate(pictures) if picture.split is None]
    if places and num_val + num_test > len(places):
        raise InputError(
            f"--num_val {num_val} and --num_test {num_test} ask for {num_val + num_test} images,"
            f" but there are {len(places)}",
            remedy="ask for fewer",
        )
    return places
