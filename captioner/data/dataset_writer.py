"""Writes a prepared dataset: captions as word ids, the h5 structure around the pixels, and the json.

The layout is described in `dataset`. N images, M captions, L = max_length, V words.
"""

import hashlib
import json
import os
import shutil
import tempfile
from array import array
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from captioner.data.dataset import IMAGE_BYTES, IMAGE_OFFSET, IMAGE_SHAPE
from captioner.data.vocabulary import Vocab
from captioner.runtime.files import atomic_write, cannot_write

_ROWS = 2**14  # of labels, handled at a time


def encode_labels(
    captions: Iterable[Sequence[Sequence[str]]], vocab: Vocab, max_length: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Tokenised captions of each image → labels, label_start_ix, label_end_ix, label_length (see the module).

    The labels come as uint16 where that is enough: of all that is kept for a caption they are the largest part.
    """
    labels = array("H" if vocab.size < 2**16 else "I")
    counts, lengths = array("I"), array("I")
    for of_image in captions:
        counts.append(len(of_image))
        for tokens in of_image:
            ids = vocab.encode(tokens, max_length)
            labels.extend(ids)
            labels.extend([0] * (max_length - len(ids)))
            lengths.append(len(ids))
    end_ix = np.cumsum(np.asarray(counts), dtype=np.uint32)
    start_ix = end_ix - np.asarray(counts) + np.uint32(1)
    return np.asarray(labels).reshape(-1, max_length), start_ix, end_ix, np.asarray(lengths)


def fingerprint_of(vocab: Vocab, info: Iterable[dict[str, Any]], labels: np.ndarray, *more: str) -> str:
    """What tells that the two files of a dataset belong together, and is another for another dataset."""
    digest = hashlib.sha256(f"[{json.dumps(vocab.words)}, {json.dumps(vocab.tokenizer)}, [".encode())
    for index, entry in enumerate(info):
        digest.update(f"{', ' if index else ''}{json.dumps(entry)}".encode())
    digest.update(b"]]")
    for row in range(0, len(labels), _ROWS):
        digest.update(labels[row : row + _ROWS].astype(np.uint32).tobytes())
    digest.update("".join(more).encode())
    return digest.hexdigest()


def finish_h5(
    path: Path,
    num_images: int,
    labels: np.ndarray,
    label_start_ix: np.ndarray,
    label_end_ix: np.ndarray,
    label_length: np.ndarray,
    fingerprint: str,
) -> None:
    """Make a valid h5 file of one that holds nothing but pixels, from byte `IMAGE_OFFSET` on.

    How many pictures can be read is known only after the last one, but a contiguous h5 dataset cannot shrink. So
    the pixels come first, and the h5 structure around them is taken from an empty file of the right size.

    Raises:
        InputError: the disk is full.
    """
    arrays = {
        "labels": labels,
        "label_start_ix": label_start_ix,
        "label_end_ix": label_end_ix,
        "label_length": label_length,
    }
    pixels_end = IMAGE_OFFSET + num_images * IMAGE_BYTES
    try:
        with tempfile.TemporaryFile(dir=path.parent) as skeleton:
            with h5py.File(skeleton, "w", alignment_threshold=IMAGE_BYTES, alignment_interval=IMAGE_OFFSET) as file:
                offset = _create_empty_images(file, num_images)
                assert offset == IMAGE_OFFSET, f"h5py put the pixels at {offset}"
                for name, values in arrays.items():
                    member = file.create_dataset(name, values.shape, np.uint32)
                    for row in range(0, len(values), _ROWS):
                        member[row : row + _ROWS] = values[row : row + _ROWS]
                file.attrs["fingerprint"] = fingerprint
            skeleton.seek(0)
            head = skeleton.read(IMAGE_OFFSET)
            skeleton.seek(pixels_end)
            with path.open("r+b") as stream:
                stream.truncate(pixels_end)
                stream.seek(pixels_end)
                shutil.copyfileobj(skeleton, stream)
                stream.flush()
                os.fsync(stream.fileno())
                stream.seek(0)
                stream.write(head)  # last: without it the file is no h5 file
                stream.flush()
                os.fsync(stream.fileno())
    except OSError as error:
        raise cannot_write(path, error) from error


def _create_empty_images(file: h5py.File, num_images: int) -> int:
    """Reserve contiguous room for the pictures without writing it; returns the byte where it begins."""
    properties = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    properties.set_layout(h5py.h5d.CONTIGUOUS)
    properties.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)
    properties.set_fill_time(h5py.h5d.FILL_TIME_NEVER)
    properties.set_obj_track_times(False)
    space = h5py.h5s.create_simple((num_images, *IMAGE_SHAPE))
    images = h5py.h5d.create(file.id, b"images", h5py.h5t.STD_U8LE, space, properties)
    return images.get_offset()


def write_dataset_json(
    path: Path, vocab: Vocab, info: Iterable[dict[str, Any]], fingerprint: str, **more: object
) -> None:
    """Write the json of a dataset; `more` keys come after those every reader knows.

    Raises:
        InputError: the disk is full, or the folder cannot be written.
    """
    with atomic_write(path, "w", encoding="utf-8") as stream:
        stream.write(f'{{"ix_to_word": {json.dumps(vocab.ix_to_word)}, "images": [')
        for index, entry in enumerate(info):  # one at a time: all of them at once take much memory
            stream.write(f"{', ' if index else ''}{json.dumps(entry)}")
        rest = json.dumps({"tokenizer": vocab.tokenizer, "fingerprint": fingerprint, **more})
        stream.write("], " + rest.removeprefix("{"))
