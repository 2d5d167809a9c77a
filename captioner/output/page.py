"""Results → a folder with the page, vis.json and the pictures, as the original's vis/ has them.

The folder:
    index.html, train.html, ..  the page's files, copied from the package
    vis.json                    the rows, a list: the original's [{"image_id", "caption"}, ..] with more keys
    scores.json                 {name: score}, {} where nothing was scored
    about.json                  what the rows are: title, model, date, ..
    *.json.js                   the same as scripts: browsers let a page opened by double click read nothing else
    imgs/img<image_id>.jpg      the pictures
"""

import contextlib
import filecmp
import hashlib
import io
import json
import logging
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from captioner.data.images import decode_for_display, read_file
from captioner.errors import InputError
from captioner.output.manifest import Manifest
from captioner.output.page_files import copy_page, is_same, page_files, write_data_script
from captioner.output.results import Row, write_results
from captioner.output.rows import PictureRow
from captioner.runtime.files import atomic_write, require_writable_folder
from captioner.runtime.locks import sole_run
from captioner.runtime.outputs import kind_of

log = logging.getLogger(__name__)

LONGEST_SIDE = 800  # pixels; what a page needs, and 100,000 of them still fit on a disk
JPEG_QUALITY = 85
COPIES_AT_ONCE = 8
DATA_FILES = ("vis.json", "scores.json", "about.json")
EXIF_ORIENTATION = 0x0112

COMPARISON = "compare-"  # how the files of a comparison begin (output/comparison.py)

_SAFE_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,99}")


@contextlib.contextmanager
def sole_writer(folder: str | Path) -> Iterator[None]:
    """Hold the page's folder: two commands in it at once would mix their pictures and rows.

    Raises:
        InputError: another command is at it, or the folder cannot be written.
    """
    with sole_run(require_writable_folder(folder, "the page") / ".lock", f"the page in {folder}"):
        yield


def fixed_names() -> list[str]:
    """The files of every page, but for its pictures."""
    return [*DATA_FILES, *(name + ".js" for name in DATA_FILES), *(path.name for path in page_files())]


class VisWriter:
    """Fills the page's folder: pictures as they come, the rows at the end. Holds nothing but the pictures' names.

    Args:
        folder: created if needed; files in it that are not ours stay.
        overwrite: whether files that are not ours may be replaced.

    Raises:
        InputError: the folder cannot be written, or has files of others where ours go.
    """

    def __init__(self, folder: str | Path, overwrite: bool = False) -> None:
        self.folder = require_writable_folder(folder, "the page")
        self._names: set[str] = set()
        self._claimed: list[str] = []
        self._manifest = Manifest(self.folder, overwrite)
        pictures = [path.name for path in (self.folder / "imgs").glob("*") if path.name.lower().startswith("img")]
        self._manifest.require_ours(name for name in fixed_names() if not self._is_page(name))
        self._manifest.require_ours(f"imgs/{name}" for name in sorted(pictures))

    def claim(self, names: Sequence[str]) -> None:
        """Take note of files that somebody else is about to write into the folder: they are ours.

        Raises:
            InputError: one is there and is not ours, or the list cannot be written.
        """
        self._manifest.require_ours(names)
        self._manifest.about_to_write(names)
        self._claimed += names

    def _is_page(self, name: str) -> bool:
        """Whether a file of the page, of this version or another, stands there: nothing of anybody is lost with it."""
        path = self.folder / name
        if not path.is_file():
            return False
        return kind_of(path) in ("page", "captions", "nothing") or any(
            source.name == name and filecmp.cmp(source, path, shallow=False) for source in page_files()
        )

    def add_pictures(self, pictures: Sequence[tuple[object, Path | np.ndarray]]) -> list[PictureRow]:
        """Copy pictures, each at most 800 pixels long, and return what their rows say about them.

        Args:
            pictures: image ids with files of any format that captioner reads, or uint8 RGB (3, height, width).

        Returns:
            {"image": "imgs/img<image_id>.jpg", "width": pixels, "height": pixels}, .., so that the page can lay
            pictures out before they are loaded; {"image": ""} for a file that cannot be read any more, which is logged.

        Raises:
            InputError: a copy cannot be written.
        """
        if not self._names:
            require_writable_folder(self.folder / "imgs", "the page's pictures")
        names = [self._new_name(image_id) for image_id, _ in pictures]
        self._manifest.about_to_write(f"imgs/{name}" for name in names)
        # Waiting for the disk takes most of the time, and threads can wait together.
        with ThreadPoolExecutor(COPIES_AT_ONCE) as pool:
            return list(pool.map(self._copy, names, pictures))

    def _copy(self, name: str, picture: tuple[object, Path | np.ndarray]) -> PictureRow:
        try:
            encoded, (width, height) = _display_jpeg(picture[1])
        except InputError as error:
            log.warning("no picture on the page for image %s: %s", picture[0], error)
            return {"image": ""}
        with atomic_write(self.folder / "imgs" / name, pictures=True) as stream:
            stream.write(encoded)
        return {"image": f"imgs/{name}", "width": width, "height": height}

    def _new_name(self, image_id: object) -> str:
        stem = safe_name(image_id)
        name, copies = f"{stem}.jpg", 1
        # Ids may occur twice, and some file systems do not tell "A" from "a".
        while name.lower() in self._names:
            copies += 1
            name = f"{stem}-{copies}.jpg"
        self._names.add(name.lower())
        return name

    def finish(
        self, rows: Iterable[Row], scores: Mapping[str, float] | None = None, about: Mapping[str, Any] | None = None
    ) -> Path:
        """Write vis.json row by row, the scores and the page.

        Args:
            about: what the page says about the rows, all of it optional: "title", "model", "date" (ISO 8601),
                "image_mode" (the model's), "pictures" (False: they were left out on purpose), "training" (True: there
                is a run for train.html to show).

        Returns:
            The path of index.html.

        Raises:
            InputError: a file cannot be written.
        """
        pages = [path for path in page_files() if not is_same(path, self.folder / path.name)]
        fixed = [*DATA_FILES, *(name + ".js" for name in DATA_FILES), *(path.name for path in pages)]
        self._manifest.about_to_write(fixed)
        shown: list[str] = []
        write_results(self.folder / "vis.json", _noting_pictures(rows, shown))
        for name, content in (("scores.json", scores), ("about.json", about)):
            with atomic_write(self.folder / name, "w", encoding="utf-8") as stream:
                json.dump(dict(content or {}), stream, ensure_ascii=False)
        for name in DATA_FILES:
            write_data_script(self.folder / name)
        page = copy_page(self.folder)
        comparisons = [name for name in self._manifest.names() if name.startswith(COMPARISON)]
        self._manifest.finish([*fixed, *shown, *self._claimed, *comparisons])
        return page


def _noting_pictures(rows: Iterable[Row], shown: list[str]) -> Iterator[Row]:
    for row in rows:
        if row.get("image"):
            shown.append(str(row["image"]))
        yield row


def safe_name(image_id: object) -> str:
    """A file name without suffix for any id: "img<id>" as the original has it, a digest where that is no plain name."""
    text = str(image_id)
    if _SAFE_ID.fullmatch(text):
        return f"img{text}"
    return "img-" + hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=10).hexdigest()


def _display_jpeg(picture: Path | np.ndarray) -> tuple[bytes, tuple[int, int]]:
    """A JPEG for the page, and its width and height."""
    if isinstance(picture, np.ndarray):
        image = Image.fromarray(np.ascontiguousarray(picture.transpose(1, 2, 0)))
    else:
        data = read_file(picture)
        size = _size_if_suitable(data)
        if size:
            return data, size
        try:
            image = decode_for_display(data, LONGEST_SIDE)
        except InputError as error:
            raise InputError(f"{picture}: {error}") from error
    encoded = io.BytesIO()
    image.save(encoded, "JPEG", quality=JPEG_QUALITY)
    return encoded.getvalue(), image.size


def _size_if_suitable(data: bytes) -> tuple[int, int] | None:
    """Small JPEGs go onto the page as they are: decoding and encoding them again would cost time and quality."""
    try:
        with Image.open(io.BytesIO(data), formats=["JPEG"]) as image:
            if max(image.size) > LONGEST_SIDE or image.mode not in ("RGB", "L"):
                return None
            turned = image.getexif().get(EXIF_ORIENTATION, 1) >= 5  # browsers show it turned by a quarter
            return image.size[::-1] if turned else image.size
    except Exception:  # damaged headers raise anything; decode_for_display finds the words for it
        return None
