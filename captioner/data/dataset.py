"""The prepared dataset, an h5 and a json file: the one place that writes and reads them.

N images, M captions, L = max_length, V words.

h5    images (N, 3, 256, 256) uint8, contiguous and uncompressed; labels (M, L) uint32, ids from 1, padded with 0;
      label_start_ix, label_end_ix (N,) uint32, 1-based inclusive rows of labels; label_length (M,) uint32.
json  ix_to_word {"1": word, ..}, images [{split, file_path?, id?}, ..] in h5 order, tokenizer, and further keys.

The layout is that of neuraltalk2's prepro.py, so files go both ways.
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

from captioner.data.images import IMAGE_SIZE
from captioner.data.vocabulary import Vocab
from captioner.errors import InputError
from captioner.runtime.files import atomic_write, cannot_write

IMAGE_SHAPE = (3, IMAGE_SIZE, IMAGE_SIZE)
IMAGE_BYTES = 3 * IMAGE_SIZE * IMAGE_SIZE
IMAGE_OFFSET = 4096  # the pixels begin here: room for the h5 structure, and a page boundary for mapping

_ROWS = 2**14  # of labels, handled at a time

_REMEDY = "prepare the dataset with caption-prepro"


class Dataset:
    """A prepared dataset, checked on opening; pictures stay on disk until they are asked for.

    It can be pickled: a worker process opens the file for itself.
    """

    def __init__(
        self,
        h5_path: Path,
        json_path: Path,
        *,
        vocab: Vocab,
        info: list[dict[str, Any]],
        labels: np.ndarray,
        label_start_ix: np.ndarray,
        label_end_ix: np.ndarray,
        image_offset: int | None,
    ) -> None:
        self.h5_path = h5_path
        self.json_path = json_path
        self.vocab = vocab
        self.info = info
        self.labels = labels
        self.label_start_ix = label_start_ix
        self.label_end_ix = label_end_ix
        self._image_offset = image_offset  # None: stored in chunks, which cannot be mapped
        self._images: Any = None

    @classmethod
    def open(cls, input_h5: str | Path, input_json: str | Path) -> "Dataset":
        """Open both files and check them against each other.

        Raises:
            InputError: a file is missing, is no such file, or the two do not belong together.
        """
        h5_path, json_path = Path(input_h5), Path(input_json)
        vocab, info, fingerprint = _read_json(json_path)
        with _open_h5(h5_path) as file:
            images = _member(file, h5_path, "images", 4)
            if images.shape[1:] != IMAGE_SHAPE or images.dtype != np.uint8:
                raise InputError(
                    f"{h5_path}: images are {images.dtype} of shape {images.shape}",
                    expected=f"uint8 of shape (N, 3, {IMAGE_SIZE}, {IMAGE_SIZE})",
                    remedy=_REMEDY,
                )
            labels = _member(file, h5_path, "labels", 2)[:]
            start_ix = _member(file, h5_path, "label_start_ix", 1)[:]
            end_ix = _member(file, h5_path, "label_end_ix", 1)[:]
            image_offset = images.id.get_offset() if images.chunks is None else None
            num_images = images.shape[0]
            h5_fingerprint = file.attrs.get("fingerprint")
        _check_labels(h5_path, json_path, vocab, num_images, labels, start_ix, end_ix)
        if num_images != len(info):
            raise InputError(
                f"{h5_path} holds {num_images} images, but {json_path} describes {len(info)}",
                expected="two files of one run of caption-prepro",
            )
        if fingerprint and h5_fingerprint and fingerprint != h5_fingerprint:
            raise InputError(
                f"{h5_path} and {json_path} come from different runs of caption-prepro",
                remedy="run caption-prepro again, or name the two files of one run",
            )
        return cls(
            h5_path,
            json_path,
            vocab=vocab,
            info=info,
            labels=labels.astype(np.uint32, copy=False),
            label_start_ix=start_ix,
            label_end_ix=end_ix,
            image_offset=image_offset,
        )

    @property
    def images(self) -> Any:
        """uint8 (N, 3, 256, 256): memory-mapped, or an h5py dataset where the file stores it in chunks."""
        if self._images is None:
            if self._image_offset is not None:
                shape = (len(self.info), *IMAGE_SHAPE)
                self._images = np.memmap(self.h5_path, np.uint8, "r", self._image_offset, shape)
            else:
                self._images = _open_h5(self.h5_path)["images"]
        return self._images

    def require_whole_file(self) -> None:
        """Call before reading mapped pictures: where the file ends too early the system kills the process (SIGBUS).

        Raises:
            InputError: the file has become shorter since it was opened.
        """
        if self._image_offset is None:
            return
        try:
            size = os.stat(self.h5_path).st_size
        except OSError as error:
            raise InputError(f"{self.h5_path}: cannot be read any more ({error.strerror or error})") from error
        if size < self._image_offset + len(self.info) * IMAGE_BYTES:
            raise InputError(
                f"{self.h5_path}: has become shorter while it was in use", remedy="restore it, or prepare it anew"
            )

    @property
    def max_length(self) -> int:
        """L, the words a caption can have."""
        return self.labels.shape[1]

    @property
    def splits(self) -> list[str]:
        """The names of the splits, sorted."""
        return sorted({entry["split"] for entry in self.info})

    def split_indices(self, split: str) -> np.ndarray:
        """int64 indices of the images of a split, in file order (none: an empty array)."""
        return np.array([index for index, entry in enumerate(self.info) if entry["split"] == split], dtype=np.int64)

    def captioned_indices(self, split: str) -> np.ndarray:
        """int64 indices of the images of a split that have captions, in file order.

        Raises:
            InputError: there are none.
        """
        indices = self.split_indices(split)
        indices = indices[self.label_end_ix[indices] >= self.label_start_ix[indices]]
        if not len(indices):
            raise InputError(
                f"{self.json_path}: no image of split {split!r} has captions", remedy="prepare the data anew"
            )
        return indices

    def captions_of(self, index: int) -> np.ndarray:
        """uint32 (S, L): the captions of image `index` (0-based), padded with 0."""
        return self.labels[int(self.label_start_ix[index]) - 1 : int(self.label_end_ix[index])]

    def references_of(self, index: int) -> list[str]:
        """The captions of image `index` to score against: as written where the json has them (val and test), else
        what the labels hold of them."""
        written = self.info[index].get("captions")
        if isinstance(written, list) and written:
            return [str(caption) for caption in written]
        return [self.vocab.decode(row.tolist()) for row in self.captions_of(index)]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_images": None}


def _read_json(path: Path) -> tuple[Vocab, list[dict[str, Any]], Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror or error})", remedy=_REMEDY) from error
    except ValueError as error:
        raise InputError(f"{path}: is not JSON ({error})", remedy=_REMEDY) from error
    if not isinstance(content, dict) or "ix_to_word" not in content or not isinstance(content.get("images"), list):
        raise InputError(f"{path}: is not the json of a prepared dataset (no ix_to_word or images)", remedy=_REMEDY)
    tokenizer = content.get("tokenizer", "ascii")  # the original's files do not say
    vocab = Vocab.from_ix_to_word(content["ix_to_word"], tokenizer, source=str(path))
    info = content["images"]
    for index, entry in enumerate(info):
        if not isinstance(entry, dict) or not isinstance(entry.get("split"), str):
            raise InputError(f"{path}: images[{index}] has no split", expected='{"split": "train", ..}')
    return vocab, info, content.get("fingerprint")


def _open_h5(path: Path) -> h5py.File:
    try:
        return h5py.File(path, "r")
    except FileNotFoundError as error:
        raise InputError(f"{path}: no such file", remedy=_REMEDY) from error
    except OSError as error:
        raise InputError(f"{path}: is not a readable HDF5 file", remedy=_REMEDY) from error


def _member(file: h5py.File, path: Path, name: str, dimensions: int) -> h5py.Dataset:
    member = file.get(name)
    if not isinstance(member, h5py.Dataset):
        raise InputError(f"{path}: has no dataset {name!r}", remedy=_REMEDY)
    if member.ndim != dimensions or member.dtype.kind not in "ui":
        raise InputError(
            f"{path}: {name} is {member.dtype} with {member.ndim} dimensions",
            expected=f"integers with {dimensions} dimensions",
            remedy=_REMEDY,
        )
    return member


def _check_labels(
    h5_path: Path,
    json_path: Path,
    vocab: Vocab,
    num_images: int,
    labels: np.ndarray,
    start_ix: np.ndarray,
    end_ix: np.ndarray,
) -> None:
    if len(start_ix) != num_images or len(end_ix) != num_images:
        raise InputError(
            f"{h5_path}: {num_images} images, but {len(start_ix)} label_start_ix and {len(end_ix)} label_end_ix",
            remedy=_REMEDY,
        )
    start, end = start_ix.astype(np.int64), end_ix.astype(np.int64)
    wrong = (start < 1) | (end > len(labels)) | (start > end + 1)
    if wrong.any():
        index = int(np.argmax(wrong))
        raise InputError(
            f"{h5_path}: image {index} points to captions {start[index]}..{end[index]} of {len(labels)}",
            expected="1-based rows of labels",
            remedy=_REMEDY,
        )
    if labels.size and (int(labels.max()) > vocab.size or int(labels.min()) < 0):
        bad = int(labels.max()) if int(labels.max()) > vocab.size else int(labels.min())
        raise InputError(
            f"{h5_path}: labels hold the word id {bad}, but the vocabulary of {json_path} has {vocab.size} words",
            expected="two files of one run of caption-prepro",
        )


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


def fingerprint_of(vocab: Vocab, info: Iterable[dict[str, Any]], labels: np.ndarray) -> str:
    """What tells that the two files of a dataset belong together."""
    digest = hashlib.sha256(f"[{json.dumps(vocab.words)}, {json.dumps(vocab.tokenizer)}, [".encode())
    for index, entry in enumerate(info):
        digest.update(f"{', ' if index else ''}{json.dumps(entry)}".encode())
    digest.update(b"]]")
    for row in range(0, len(labels), _ROWS):
        digest.update(labels[row : row + _ROWS].astype(np.uint32).tobytes())
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
