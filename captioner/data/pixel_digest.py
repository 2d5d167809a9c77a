"""A digest of every pixel of a data set, which is kept beside it: reading all of COCO's takes minutes."""

import contextlib
import hashlib
import json
import os
import re

import numpy as np

from captioner.data.dataset import Dataset, StoredPictures
from captioner.errors import InputError
from captioner.runtime.files import atomic_write, identity_of, read_small

BLOCK = 16  # pictures in hand at once


def pixel_digest(dataset: Dataset) -> str:
    """The same for the same pictures in the same order, and for no others."""
    digests = [_digest_of(file) for file in dataset.files]
    return digests[0] if len(digests) == 1 else hashlib.blake2b("".join(digests).encode(), digest_size=16).hexdigest()


def _digest_of(file: StoredPictures) -> str:
    known = file.path.with_name(f".{file.path.name}.pixels")
    changed = file.path.stat().st_ctime_ns  # which, unlike the time of modification, nobody can set back
    state = f"{identity_of(file.path)}\0{changed}"
    # None yet, or a damaged one.
    with contextlib.suppress(OSError, ValueError, TypeError, KeyError, RecursionError):
        kept = json.loads(read_small(known))
        if kept["of"] == state and re.fullmatch(r"[0-9a-f]{32}", kept["digest"]):
            return kept["digest"]
    digest = hashlib.blake2b(digest_size=16)
    for first in range(0, file.count, BLOCK):
        file.require_whole()
        digest.update(np.ascontiguousarray(file.rows[first : first + BLOCK]).data)
    # A folder that cannot be written, or somebody else's file: the next run reads them again.
    with contextlib.suppress(OSError, InputError):
        if not os.path.lexists(known) or read_small(known).startswith((b'{"of": ', b"\0")):
            with atomic_write(known, "w") as stream:
                json.dump({"of": state, "digest": digest.hexdigest()}, stream)
    return digest.hexdigest()
