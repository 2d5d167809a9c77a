"""Fuzzing of the two readers of foreign files: damaged input gives InputError, fast and in little memory.

    PYTHONPATH=. python tests/fuzz_readers.py --inputs 120000 --seed 1

Every input is a small valid file (Torch7 binary, Torch7 ascii, Caffe old, Caffe new) with one to four mutations: bits,
bytes, numbers set to extreme values, cuts, insertions, blocks moved or doubled; or a whole Torch7 file of a checkpoint
in which values were swapped for others, of any type, from anywhere in it. A reader may return, or raise InputError.
Anything else, more than a second, or more memory than ten times the input and one megabyte stops the run,
with the input in fuzz_failure.bin.
"""

import argparse
import math
import random
import struct
import time
import tracemalloc
from collections import Counter
from pathlib import Path
from typing import Any

from caffe_writer import narrow_net, written
from torch7_writer import Instance, checkpoint, dumps

from captioner.convert.caffe import parse_caffemodel
from captioner.convert.neuraltalk2 import parse_neuraltalk2
from captioner.errors import InputError

SECONDS = 1.0
BYTES_PER_BYTE, BYTES_MORE = 10, 1_000_000
MEASURED = 10  # memory is traced for one input in so many: tracing is slow
EXTREME = (
    0,
    1,
    -1,
    2,
    7,
    8,
    127,
    128,
    255,
    2**15,
    2**16,
    2**31 - 1,
    -(2**31),
    2**31,
    2**32 - 1,
    2**62,
    2**63 - 1,
    -(2**63),
)


def read_torch7(data: bytes) -> None:
    parse_neuraltalk2(data, "fuzz")


def read_caffe(data: bytes) -> None:
    parse_caffemodel(data, "fuzz")


def corpus() -> dict[str, tuple[list[bytes], object]]:
    one, two = checkpoint()[0], checkpoint(num_layers=2, kind="Double", backend="cudnn")[0]
    return {
        "Torch7 binary": ([dumps(one), dumps(two)], read_torch7),
        "Torch7 ascii": ([dumps(one, ascii=True), dumps(two, ascii=True)], read_torch7),
        "Torch7 values swapped": ([], read_torch7),
        "Caffe old": ([written(narrow_net(), old=True)], read_caffe),
        "Caffe new": ([written(narrow_net()), written(narrow_net(), dims_packed=False, in_pieces=True)], read_caffe),
    }


def mutate(data: bytes, rng: random.Random) -> bytes:
    """One to four of the damages above."""
    out = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 3, 4))):
        at, other = rng.randrange(len(out) + 1), rng.randrange(len(out) + 1)
        length = rng.choice((1, 2, 4, 8, 16, 64, 256))
        kind = rng.randrange(9)
        if kind == 0 and at < len(out):
            out[at] ^= 1 << rng.randrange(8)
        elif kind == 1 and at < len(out):
            out[at] = rng.randrange(256)
        elif kind == 2:
            del out[at:]
        elif kind == 3:
            del out[at : at + length]
        elif kind == 4:
            out[at:at] = rng.randbytes(length)
        elif kind == 5:
            out[at : at + length] = out[other : other + length]
        elif kind == 6:
            out[at:at] = out[other : other + length]
        elif kind == 7:
            value, form = rng.choice(EXTREME), rng.choice(("<q", "<i"))
            wrapped = value % 2 ** (64 if form == "<q" else 32)
            out[at : at + struct.calcsize(form)] = struct.pack(form.upper(), wrapped)
        else:  # a number of an ascii file
            digits = [i for i in range(at, min(at + 200, len(out))) if 48 <= out[i] <= 57]
            if digits:
                out[digits[0] : digits[0] + 1] = str(rng.choice(EXTREME)).encode()
        if not out:
            break
    return bytes(out)


def swapped(rng: random.Random) -> bytes:
    """A checkpoint with one to three values replaced, by odd ones or by others of its own: types, shapes, cycles."""
    table = checkpoint(num_layers=rng.choice((1, 2)))[0]
    places: list[tuple[dict, Any]] = []
    tables: list[dict] = [table]
    seen: set[int] = set()
    while tables:
        one = tables.pop()
        if id(one) in seen:
            continue
        seen.add(id(one))
        for key, value in one.items():
            places.append((one, key))
            inner = value.fields if isinstance(value, Instance) else value
            if isinstance(inner, dict):
                tables.append(inner)
    for _ in range(rng.choice((1, 2, 3))):
        owner, key = rng.choice(places)
        other, its_key = rng.choice(places)
        constant = rng.choice((None, True, -1, 0, 0.5, 1e300, math.nan, math.inf, "", "nn.Linear", {}, {1: 1}))
        owner[key] = other.get(its_key) if rng.random() < 0.6 else constant
    return dumps(table, ascii=rng.random() < 0.3)


def run(inputs: int, seed: int) -> str:
    """Read so many mutated files; a Markdown table of what came of it.

    Raises:
        AssertionError: a reader broke its promise; the input lies in fuzz_failure.bin.
    """
    rng = random.Random(seed)
    rows = [
        "| reader | inputs | refused | read | longest input (kB) | most memory (kB) | slowest (ms) |",
        "|---|---|---|---|---|---|---|",
    ]
    files = corpus()
    for name, (seeds, read) in files.items():
        results: Counter = Counter()
        slowest = most = longest = 0.0
        for i in range(inputs // len(files)):
            data = mutate(rng.choice(seeds), rng) if seeds else swapped(rng)
            longest = max(longest, len(data))
            traced = i % MEASURED == 0
            if traced:
                tracemalloc.start()
            started = time.process_time()
            try:
                read(data)  # type: ignore[operator]
                results["read"] += 1
            except InputError:
                results["refused"] += 1
            except BaseException:
                Path("fuzz_failure.bin").write_bytes(data)
                raise
            seconds = time.process_time() - started
            peak = 0
            if traced:
                peak = tracemalloc.get_traced_memory()[1]
                tracemalloc.stop()
                most = max(most, peak)
            else:
                slowest = max(slowest, seconds)
            if seconds > SECONDS or peak > BYTES_PER_BYTE * len(data) + BYTES_MORE:
                Path("fuzz_failure.bin").write_bytes(data)
                raise AssertionError(f"{name}: {seconds:.2f} s, {peak} bytes for an input of {len(data)}")
        rows.append(
            f"| {name} | {results.total():,} | {results['refused']:,} | {results['read']:,} "
            f"| {longest / 1000:.0f} | {most / 1000:.0f} | {1000 * slowest:.0f} |"
        )
    return "\n".join(rows)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--inputs", type=int, default=120_000)
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    print(run(arguments.inputs, arguments.seed))
