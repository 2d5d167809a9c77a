"""What is done to sound files: their bytes are changed, or the values of the tables in them."""

import copy
import json
import math
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fuzz_readers import mutate

ODD: tuple[Any, ...] = (
    *(None, True, -1, 0, 0.5, 1e300, math.nan, math.inf, 2**63, 2**64, 10**30, "", "\ud800", "\0", "a\nb", "../x", "/"),
    *([], {}, [1], [[]], {"a": 1}, ["a", 5], "attention", "fc7", "é" * 1000),
)


@dataclass
class Target:
    """A reader with files that it takes.

    Attributes:
        damaged: makes the content of the next file.
        read: is given its path.
        suffix: of its name.
    """

    name: str
    damaged: Callable[[random.Random], bytes]
    read: Callable[[Path], object]
    suffix: str = ""


def by_bytes(*seeds: bytes) -> Callable[[random.Random], bytes]:
    return lambda rng: mutate(rng.choice(seeds), rng)


def by_values(table: Any, write: Callable[[Any], bytes]) -> Callable[[random.Random], bytes]:
    """Files whose tables have odd values in one to three places."""

    def damaged(rng: random.Random) -> bytes:
        odd = copy.deepcopy(table)
        for _ in range(rng.choice((1, 1, 2, 3))):
            places = list(_places(odd))
            if not places:
                break
            owner, key = rng.choice(places)
            other, its_key = rng.choice(places)
            action = rng.random()
            if action < 0.5:
                owner[key] = copy.deepcopy(rng.choice(ODD))
            elif action < 0.8:
                owner[key] = copy.deepcopy(other[its_key])
            elif action < 0.9 or isinstance(owner, list):
                del owner[key]
            else:
                owner[rng.choice(("x", 5, "images", "id", "file_path"))] = owner.pop(key)
        return write(odd)

    return damaged


def _places(table: Any) -> Iterator[tuple[Any, Any]]:
    waiting = [table]
    while waiting:
        one = waiting.pop()
        for key, value in list(one.items() if isinstance(one, dict) else enumerate(one)):
            yield one, key
            if isinstance(value, dict | list):
                waiting.append(value)


def as_json(value: Any) -> bytes:
    return json.dumps(value, default=str).encode()
