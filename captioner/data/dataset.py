"""The prepared dataset, an h5 and a json file, as it is read; `dataset_writer` writes it.

N images, M captions, L = max_length, V words.

h5    images (N, 3, 256, 256) uint8, contiguous and uncompressed; labels (M, L) uint32, ids from 1, padded with 0;
      label_start_ix, label_end_ix (N,) uint32, 1-based inclusive rows of labels; label_length (M,) uint32.
json  ix_to_word {"1": word, ..}, images [{split, file_path?, id?}, ..] in h5 order, tokenizer, and further keys.

The layout is that of neuraltalk2's prepro.py, so files go both ways.
"""

import bisect
import contextlib
import copy
import functools
import itertools
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import NoneType
from typing import Any, TypeAlias

import h5py
import numpy as np

from captioner.data.crops import IMAGE_SIZE
from captioner.data.image_mode import IMAGE_MODES, ImageMode
from captioner.data.vocabulary import UNK, Vocab
from captioner.errors import InputError
from captioner.runtime.files import protect, read_json, shortest_names

Paths: TypeAlias = str | Path | Sequence[str | Path]

IMAGE_SHAPE = (3, IMAGE_SIZE, IMAGE_SIZE)
IMAGE_BYTES = 3 * IMAGE_SIZE * IMAGE_SIZE
MOST_COMPRESSED = 1100  # times smaller than its content: what deflate can do
IMAGE_OFFSET = 4096  # the pixels begin here: room for the h5 structure, and a page boundary for mapping

_FIELDS = {"file_path": (str, NoneType), "id": (int, str, NoneType), "captions": (list, NoneType)}  # of an image
_REMEDY = "prepare the dataset with caption-prepro"


class StoredPictures:
    """The pictures of one h5 file, on disk until they are asked for.

    It can be pickled: a worker process opens the file for itself.

    Args:
        count: how many they are.
        offset: where their pixels begin in the file; None: they are stored in chunks, which cannot be mapped.
    """

    def __init__(self, path: Path, count: int, offset: int | None) -> None:
        self.path, self.count = path, count
        self._offset = offset
        self._rows: Any = None

    @property
    def rows(self) -> Any:
        """uint8 (count, 3, 256, 256): memory-mapped, or an h5py dataset where the file stores it in chunks."""
        if self._rows is None:
            if self._offset is not None:
                self._rows = np.memmap(self.path, np.uint8, "r", self._offset, (self.count, *IMAGE_SHAPE))
            else:
                self._rows = _open_h5(self.path)["images"]
        return self._rows

    def require_whole(self) -> None:
        """Call before reading mapped pictures: where the file ends too early the system kills the process (SIGBUS).

        Raises:
            InputError: the file has become shorter since it was opened.
        """
        if self._offset is None:
            return
        try:
            size = os.stat(self.path).st_size
        except OSError as error:
            raise InputError(f"{self.path}: cannot be read any more ({error.strerror or error})") from error
        if size < self._offset + self.count * IMAGE_BYTES:
            raise InputError(
                f"{self.path}: has become shorter while it was in use", remedy="restore it, or prepare it anew"
            )

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_rows": None}


class _RowsOfSeveral:
    """Pictures of several files, one file's after the other's."""

    def __init__(self, files: Sequence[StoredPictures]) -> None:
        self._files = files
        self._starts = [0, *itertools.accumulate(file.count for file in files)]

    def __getitem__(self, row: int) -> np.ndarray:
        file = bisect.bisect_right(self._starts, row) - 1
        return np.asarray(self._files[file].rows[row - self._starts[file]])


class Dataset:
    """A prepared dataset, checked on opening; of several pairs of files, if they were opened as one."""

    def __init__(
        self,
        files: Sequence[StoredPictures],
        json_paths: Sequence[Path],
        *,
        vocab: Vocab,
        info: list[dict[str, Any]],
        labels: np.ndarray,
        label_start_ix: np.ndarray,
        label_end_ix: np.ndarray,
        image_mode: ImageMode = "squash",
    ) -> None:
        self.files = files
        self.json_paths = json_paths
        self.vocab = vocab
        self.info = info
        self.labels = labels
        self.label_start_ix = label_start_ix
        self.label_end_ix = label_end_ix
        self.image_mode: ImageMode = image_mode  # what became of pictures that were no squares
        self._rows = None if len(files) == 1 else _RowsOfSeveral(files)

    @classmethod
    def open(cls, input_h5: Paths, input_json: Paths) -> "Dataset":
        """Open both files and check them against each other; or as many of both, which become one dataset.

        Then it has the words of all: the first one's under their ids, after them what only the others have. Its images
        know their file (`source`), and where an image before has the same id, the file's name is part of theirs.

        Raises:
            InputError: a file is missing, is no such file, or they do not belong together.
        """
        h5_paths, json_paths = _as_list(input_h5), _as_list(input_json)
        if len(h5_paths) != len(json_paths):
            raise InputError(
                f"{len(h5_paths)} h5 and {len(json_paths)} json files",
                expected="two of each run of caption-prepro, in the same order",
            )
        parts = [cls._open_pair(*pair) for pair in zip(h5_paths, json_paths, strict=True)]
        return parts[0] if len(parts) == 1 else _joined(parts)

    @classmethod
    def _open_pair(cls, h5_path: Path, json_path: Path) -> "Dataset":
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
            [StoredPictures(h5_path, num_images, image_offset)],
            [json_path],
            vocab=vocab,
            info=info,
            labels=labels.astype(np.uint32, copy=False),
            label_start_ix=start_ix,
            label_end_ix=end_ix,
            image_mode=image_mode,
        )

    def with_words_of(self, vocab: Vocab) -> "Dataset":
        """The same dataset, with the ids of a vocabulary that has all of its words, or UNK for those it lacks."""
        new_ids = np.array([0, *vocab.encode(self.vocab.words, self.vocab.size)], np.uint32)
        changed = copy.copy(self)
        changed.vocab, changed.labels = vocab, new_ids[self.labels]
        return changed

    def words_to_know(self, known: Vocab) -> Vocab:
        """What a model with these words must know of the data: all words but those that it lacks and that occur once.

        They can hardly be learnt from one place, and trying made other words worse or nothing better (docs/recipes.md).
        If there is no UNK to stand for them, they are words, too.
        """
        if UNK not in known and UNK not in self.vocab:
            return self.vocab
        counts = zip(self.vocab.words, self.word_counts(), strict=True)
        kept = [word for word, count in counts if count > 1 or word in known or word == UNK]
        return Vocab(kept, self.vocab.tokenizer)

    def word_counts(self) -> list[int]:
        """How often each word is in the captions, in the order of the vocabulary."""
        return np.bincount(self.labels.ravel(), minlength=self.vocab.size + 1)[1:].tolist()

    @property
    def h5_name(self) -> str:
        """For messages; so is `json_name`."""
        return ", ".join(str(file.path) for file in self.files)

    @property
    def json_name(self) -> str:
        return ", ".join(map(str, self.json_paths))

    @property
    def images(self) -> Any:
        """uint8 (N, 3, 256, 256), of which a row is asked for; of one file also several at a time."""
        return self._rows or self.files[0].rows

    def require_whole_file(self) -> None:
        """Call before reading mapped pictures: see `StoredPictures.require_whole`.

        Raises:
            InputError: a file has become shorter since it was opened.
        """
        for file in self.files:
            file.require_whole()

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
                f"{self.json_name}: no image of split {split!r} has captions", remedy="prepare the data anew"
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


def _as_list(paths: Paths) -> list[Path]:
    return [Path(paths)] if isinstance(paths, str | Path) else [Path(path) for path in paths]


def _joined(parts: Sequence[Dataset]) -> Dataset:
    """One dataset of several.

    Raises:
        InputError: they were prepared in ways that do not go together.
    """
    first = parts[0]
    for part in parts[1:]:
        for option, one, other in (
            ("max_length", first.max_length, part.max_length),
            ("image_mode", first.image_mode, part.image_mode),
            ("tokenizer", first.vocab.tokenizer, part.vocab.tokenizer),
        ):
            if one != other:
                raise InputError(
                    f"{part.json_name} was prepared with --{option} {other}, {first.json_name} with {one}",
                    remedy="prepare them alike",
                )
    vocab = functools.reduce(Vocab.grown_by, (part.vocab for part in parts))
    rows_before = [0, *itertools.accumulate(len(part.labels) for part in parts)]
    places = list(zip(parts, rows_before, strict=False))
    return Dataset(
        [file for part in parts for file in part.files],
        [path for part in parts for path in part.json_paths],
        vocab=vocab,
        info=_info_of_several(parts),
        labels=np.concatenate([part.with_words_of(vocab).labels for part in parts]),
        label_start_ix=np.concatenate([part.label_start_ix.astype(np.int64) + before for part, before in places]),
        label_end_ix=np.concatenate([part.label_end_ix.astype(np.int64) + before for part, before in places]),
        image_mode=first.image_mode,
    )


def _info_of_several(parts: Sequence[Dataset]) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    ids: set[int | str] = set()
    for part, name in zip(parts, shortest_names([part.files[0].path for part in parts]), strict=True):
        for entry in part.info:
            described = {"source": name, **entry}
            if described.get("id") in ids:
                described["id"] = f"{name}/{described['id']}"
            if described.get("id") is not None:
                ids.add(described["id"])
            found.append(described)
    return found


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
    if os.path.exists(path) and not os.path.isfile(path):  # HDF5 would wait for what writes to a pipe
        raise InputError(f"{path}: is not a file", remedy=_REMEDY)
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
