"""What is to be captioned: the files of a folder, the images of a COCO list, or a split of a dataset."""

import hashlib
import json
import logging
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from captioner.data.batch import Batch
from captioner.data.batches import dataset_batches, file_batches
from captioner.data.dataset import Dataset
from captioner.data.image_like import ImageLike, file_name_of
from captioner.data.image_mode import ImageMode
from captioner.data.listing import find_in_subfolders, list_images
from captioner.errors import InputError
from captioner.metrics.pairing import Reference
from captioner.runtime.files import identity_of, read_json

log = logging.getLogger(__name__)


class Images(Protocol):
    """Images with positions 0..len-1."""

    def __len__(self) -> int: ...

    def batches(
        self, positions: Iterable[Sequence[int]], num_workers: int, image_mode: ImageMode = "squash"
    ) -> Iterator[Batch]:
        """One batch per group of positions, in order. Unreadable files are not in it but under its `skipped`.

        `image_mode` says what becomes of pictures that are no squares: the model's.
        """
        ...


class Source(Images, Protocol):
    """Images with all that the results of a run want to know of them."""

    def picture(self, position: int) -> Path | np.ndarray:
        """What the page shows: a file, or uint8 (3, 256, 256)."""
        ...

    def info(self) -> Iterator[dict[str, Any]]:
        """What is known of each image: "id", "file_path"."""
        ...

    def references(self) -> list[Reference]:
        """The known captions, of the images that have any."""
        ...

    def identity(self, sizes: bool = True) -> str:
        """The same for the same images in the same order.

        Args:
            sizes: whether a file of another size counts as another image.
        """
        ...


class ImageList:
    """Pictures in any form, numbered from "1"; those in memory have no file name."""

    def __init__(self, pictures: Sequence[ImageLike]) -> None:
        self.pictures = [
            (picture, {"id": str(number), "file_path": file_name_of(picture)})
            for number, picture in enumerate(pictures, start=1)
        ]

    def __len__(self) -> int:
        return len(self.pictures)

    def batches(
        self, positions: Iterable[Sequence[int]], num_workers: int, image_mode: ImageMode = "squash"
    ) -> Iterator[Batch]:
        return file_batches(self.pictures, positions, num_workers, image_mode)


class FileSource:
    """Image files with their info (id, file_path).

    Args:
        keep: what must not be thrown away before the files are: their temporary folder.
    """

    def __init__(self, files: Sequence[tuple[Path, dict[str, Any]]], keep: object = None) -> None:
        self.files, self.keep = files, keep

    def __len__(self) -> int:
        return len(self.files)

    def batches(
        self, positions: Iterable[Sequence[int]], num_workers: int, image_mode: ImageMode = "squash"
    ) -> Iterator[Batch]:
        return file_batches(self.files, positions, num_workers, image_mode)

    def picture(self, position: int) -> Path:
        return self.files[position][0]

    def without(self, is_done: Callable[[Path], bool], limit: int) -> "FileSource":
        """Those files that are not done yet, `limit` of them at most (−1: all), under their ids."""
        left = [(path, info) for path, info in self.files if not is_done(path)]
        if len(left) < len(self.files):
            log.info(
                "%d of %d photos have their caption and are left out", len(self.files) - len(left), len(self.files)
            )
        return FileSource(left if limit < 0 else left[:limit], self.keep)

    def info(self) -> Iterator[dict[str, Any]]:
        return (info for _, info in self.files)

    def references(self) -> list[Reference]:
        return []  # files come without captions

    def identity(self, sizes: bool = True) -> str:
        return _digest(identity_of(path, sizes) for path, _ in self.files)


class SplitSource:
    """Some images of a dataset."""

    def __init__(self, dataset: Dataset, indices: np.ndarray, image_root: str) -> None:
        self.dataset, self.indices, self.image_root = dataset, indices, image_root

    def __len__(self) -> int:
        return len(self.indices)

    def batches(
        self, positions: Iterable[Sequence[int]], num_workers: int, image_mode: ImageMode = "squash"
    ) -> Iterator[Batch]:
        if self.dataset.image_mode != image_mode:
            log.warning(
                "%s holds pictures in the mode %s, but the model was trained on the mode %s (--image_mode)",
                self.dataset.h5_name,
                self.dataset.image_mode,
                image_mode,
            )
        return dataset_batches(self.dataset, self.indices, positions, num_workers)

    def picture(self, position: int) -> Path | np.ndarray:
        # The photo itself looks better than the squashed copy, where it is still to be had.
        index = int(self.indices[position])
        name = self.dataset.info[index].get("file_path")
        if self.image_root and name and os.path.isfile(path := Path(self.image_root) / name):
            return path
        return np.asarray(self.dataset.images[index])

    def info(self) -> Iterator[dict[str, Any]]:
        return (self.dataset.info[int(index)] for index in self.indices)

    def references(self) -> list[Reference]:
        known = []
        for position, index in enumerate(self.indices.tolist()):
            info = self.dataset.info[index]
            if captions := self.dataset.references_of(index):
                known.append(Reference(info.get("id", position + 1), info.get("file_path"), captions))
        return known

    def identity(self, sizes: bool = True) -> str:
        described = (json.dumps(self.dataset.info[int(index)], sort_keys=True) for index in self.indices)
        return _digest([*(identity_of(file.path) for file in self.dataset.files), *described])


def open_folder(folder: str, recursive: bool, limit: int) -> FileSource:
    """All image files of a folder in natural order, `limit` of them at most (−1: all); ids count from "1".

    Raises:
        InputError: no such folder, or no image in it.
    """
    paths = list_images(folder, recursive)
    deeper = None if recursive else find_in_subfolders(folder)
    if not paths:
        raise InputError(
            f"{folder}: no image files in this folder" + (f", but in its subfolders ({deeper})" if deeper else ""),
            remedy="give --recursive to take those" if deeper else "",
        )
    if deeper:
        log.info("%s: pictures in subfolders (%s) are left out; --recursive takes them, too", folder, deeper)
    files = [
        (path, {"id": str(number), "file_path": path.relative_to(folder).as_posix()})
        for number, path in enumerate(paths, start=1)
    ]
    return FileSource(files if limit < 0 else files[:limit])


def open_coco_list(list_file: str, folder: str, limit: int) -> FileSource:
    """The images that a COCO json lists ({"images": [{"id", "file_name"}, ..]}), with its ids, from a folder.

    Raises:
        InputError: the list cannot be read or has another form.
    """
    content = read_json(list_file)
    try:
        entries = content["images"]
        files = [
            (Path(folder) / entry["file_name"], {"id": _known_id(entry["id"]), "file_path": entry["file_name"]})
            for entry in (entries if limit < 0 else entries[:limit])
        ]
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"{list_file}: not a COCO image list ({type(error).__name__}: {error})",
            expected='{"images": [{"id": .., "file_name": ..}, ..]}',
        ) from error
    if not files:
        raise InputError(f"{list_file}: lists no images")
    return FileSource(files)


def _known_id(value: Any) -> int | str:
    if isinstance(value, bool) or not isinstance(value, int | str):
        raise TypeError(f"the id {value!r}")
    return value


def open_split(dataset: Dataset, split: str, image_root: str, limit: int) -> SplitSource:
    """The images of a split, `limit` of them at most (−1: all).

    Raises:
        InputError: the split has no images.
    """
    indices = dataset.split_indices(split)
    if not len(indices):
        known = sorted({str(info.get("split")) for info in dataset.info})
        raise InputError(f"--split {split}: the dataset has no such images", expected=f"one of {', '.join(known)}")
    return SplitSource(dataset, indices if limit < 0 else indices[:limit], image_root)


def _digest(names: Iterable[str]) -> str:
    digest = hashlib.blake2b(digest_size=10)
    for name in names:
        digest.update(name.encode("utf-8", "surrogatepass") + b"\0")
    return digest.hexdigest()
