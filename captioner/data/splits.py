"""Which pictures train, which choose the best model, and which are kept for the test."""

import random
from collections.abc import Sequence

from captioner.data.clean import Picture
from captioner.errors import InputError


def assign_splits(pictures: Sequence[Picture], num_val: int, num_test: int, seed: int) -> list[str]:
    """The split of each picture: its own, else shuffled with the seed num_val, then num_test, the rest train.

    Raises:
        InputError: there are fewer pictures than asked for.
    """
    if pictures and pictures[0].split is not None:
        return [picture.split or "train" for picture in pictures]
    if num_val + num_test > len(pictures):
        raise InputError(
            f"--num_val {num_val} and --num_test {num_test} ask for {num_val + num_test} images,"
            f" but there are {len(pictures)}",
            remedy="ask for fewer",
        )
    order = list(range(len(pictures)))
    random.Random(seed).shuffle(order)
    splits = ["train"] * len(pictures)
    for place, index in enumerate(order[: num_val + num_test]):
        splits[index] = "val" if place < num_val else "test"
    return splits
