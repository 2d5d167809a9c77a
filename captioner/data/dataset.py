"""The prepared dataset, an h5 and a json file, as it is read; `dataset_writer` writes it.

N images, M captions, L = max_length, V words.

h5    images (N, 3, 256, 256) uint8, contiguous and uncompressed; labels (M, L) uint32, ids from 1, padded with 0;
      label_start_ix, label_end_ix (N,) uint32, 1-based inclusive rows of labels; label_length (M,) uint32.
json  ix_to_word {"1": word, ..}, images [{split, file_path?, id?}, ..] in h5 order, tokenizer, and further keys.

The layout is that of neuraltalk2's prepro.py, so files go both ways.
"""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from types import NoneType
from typing import Any

import h5py
import numpy as np

from captioner.data.crops import IMAGE_SIZE
from captioner.data.image_mode import IMAGE_MODES, ImageMode
from captioner.data.vocabulary import Vocab
from captioner.errors import InputError
from captioner.runtime.files import protect, read_json

IMAGE_SHAPE = (3, IMAGE_SIZE, IMAGE_SIZE)
IMAGE_BYTES = 3 * IMAGE_SIZE * IMAGE_SIZE
MOST_COMPRESSED = 1100  # times smaller than its content: what deflate can do
IMAGE_OFFSET = 4096  # the pixels begin here: room for the h5 structure, and a page boundary for mapping

_FIELDS = {"file_path": (str, NoneType), "id": (int, str, NoneType), "captions": (list, NoneType)}  # of an image
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
        image_mode: ImageMode = "squash",
    ) -> None:
        self.h5_path = h5_path
        self.json_path = json_path
        self.vocab = vocab
        self.info = info
        self.labels = labels
        self.label_start_ix = label_start_ix
        self.label_end_ix = label_end_ix
        self.image_mode: ImageMode = image_mode  # what became of pictures that were no squares
        self._image_offset = image_offset  # None: stored in chunks, which cannot be mapped
        self._images: Any = None

    @classmethod
    def open(cls, input_h5: str | Path, input_json: str | Path) -> "Dataset":
        """Open both files and check them against each other.

        Raises:
            InputError: a file is missing, is no such file, or the two do not belong together.
        """
        h5_path, json_path = Path(input_h5), Path(input_json)
        protect(h5_path)
        protect(json_path)
        vocab, info, fingerprint, image_mode = _read_json(json_path)
        with _open_h5(h5_path) as file, _damage_told(h5_path):
            images = _member(file, h5_path, "images", 4)
            if images.shape[1:] != IMAGE_SHAPE or images.dtype != np.uint8:
                raise InputError(
                    f"{h5_path}: images are {images.dtype} of shape {images.shape}",
                    expected=f"uint8 of shape (N, 3, {IMAGE_SIZE}, {IMAGE_SIZE})",
                    remedy=_REMEDY,
                )
            labels = _values(file, h5_path, "labels", 2)
            start_ix = _values(file, h5_path, "label_start_ix", 1)
            end_ix = _values(file, h5_path, "label_end_ix", 1)
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
            image_mode=image_mode,
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


def _read_json(path: Path) -> tuple[Vocab, list[dict[str, Any]], Any, ImageMode]:
    content = read_json(path, remedy=_REMEDY)
    if not isinstance(content, dict) or "ix_to_word" not in content or not isinstance(content.get("images"), list):
        raise InputError(f"{path}: is not the json of a prepared dataset (no ix_to_word or images)", remedy=_REMEDY)
    tokenizer = content.get("tokenizer", "ascii")  # the original's files do not say
    vocab = Vocab.from_ix_to_word(content["ix_to_word"], tokenizer, source=str(path))
    info = content["images"]
    for index, entry in enumerate(info):
        if not isinstance(entry, dict) or not isinstance(entry.get("split"), str):
            raise InputError(f"{path}: images[{index}] has no split", expected='{"split": "train", ..}')
        for name, kinds in _FIELDS.items():
            if not isinstance(entry.get(name), kinds):
                raise InputError(
                    f"{path}: images[{index}]: its {name} is a {type(entry[name]).__name__}", remedy=_REMEDY
                )
    image_mode = content.get("image_mode", "squash")
    if image_mode not in IMAGE_MODES:
        raise InputError(f"{path}: image_mode is {image_mode!r}", expected=" or ".join(IMAGE_MODES))
    return vocab, info, content.get("fingerprint"), image_mode


def _open_h5(path: Path) -> h5py.File:
    try:
        return h5py.File(path, "r")
    except FileNotFoundError as error:
        raise InputError(f"{path}: no such file", remedy=_REMEDY) from error
    except (OSError, RuntimeError, ValueError, KeyError) as error:
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


def _values(file: h5py.File, path: Path, name: str, dimensions: int) -> np.ndarray:
    member = _member(file, path, name, dimensions)
    size = member.size * member.dtype.itemsize
    if size > MOST_COMPRESSED * path.stat().st_size:  # a damaged size, for which there is no memory
        raise InputError(f"{path}: {name} claims to have {member.shape} numbers", remedy=_REMEDY)
    return member[:]


@contextlib.contextmanager
def _damage_told(path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, RuntimeError, ValueError, KeyError, TypeError, OverflowError, MemoryError) as error:
        raise InputError(f"{path}: is a damaged HDF5 file ({error})", remedy=_REMEDY) from error


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
