"""Results → a folder with the page, vis.json and the pictures, as the original's vis/ has them.

The folder:
    index.html, train.html, ..  the page's files, copied from the package
    vis.json                    the rows, a list: the original's [{"image_id", "caption"}, ..] with more keys
    scores.json                 {name: score}, {} where nothing was scored
    imgs/img<image_id>.jpg      the pictures
"""

import hashlib
import io
import json
import logging
import re
import shutil
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image

from captioner.data.images import decode_for_display, read_file
from captioner.errors import InputError
from captioner.output.results import Row, write_results
from captioner.runtime.files import atomic_write, require_writable_folder

log = logging.getLogger(__name__)

LONGEST_SIDE = 800  # pixels; what a page needs, and 100,000 of them still fit on a disk
JPEG_QUALITY = 85
COPIES_AT_ONCE = 8

_SAFE_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,99}")
_PACKAGE = Path(__file__).parents[1]


def page_files() -> list[Path]:
    """The files of the page: inside the installed package, or beside it in a working copy."""
    folders = (_PACKAGE / "page", _PACKAGE.parent / "vis")
    folder = next(folder for folder in folders if (folder / "index.html").is_file())
    return sorted(path for path in folder.iterdir() if path.suffix in (".html", ".css", ".js"))


class VisWriter:
    """Fills the page's folder: pictures as they come, the rows at the end. Holds nothing but the pictures' names.

    Args:
        folder: created if needed; other files in it stay.

    Raises:
        InputError: the folder cannot be written.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = require_writable_folder(folder, "the page")
        self._names: set[str] = set()

    def add_pictures(self, pictures: Sequence[tuple[object, Path | np.ndarray]]) -> list[str]:
        """Copy pictures, each at most 800 pixels long, and return their paths relative to the folder.

        Args:
            pictures: image ids with files of any format that captioner reads, or uint8 RGB (3, height, width).

        Returns:
            "imgs/img<image_id>.jpg", ..; "" for a file that cannot be read any more, which is logged.

        Raises:
            InputError: a copy cannot be written.
        """
        if not self._names:
            require_writable_folder(self.folder / "imgs", "the page's pictures")
        names = [self._new_name(image_id) for image_id, _ in pictures]
        # Waiting for the disk takes most of the time, and threads can wait together.
        with ThreadPoolExecutor(COPIES_AT_ONCE) as pool:
            written = list(pool.map(self._copy, names, pictures))
        return [f"imgs/{name}" if done else "" for name, done in zip(names, written, strict=True)]

    def _copy(self, name: str, picture: tuple[object, Path | np.ndarray]) -> bool:
        try:
            encoded = _display_jpeg(picture[1])
        except InputError as error:
            log.warning("no picture on the page for image %s: %s", picture[0], error)
            return False
        with atomic_write(self.folder / "imgs" / name) as stream:
            stream.write(encoded)
        return True

    def _new_name(self, image_id: object) -> str:
        stem = safe_name(image_id)
        name, copies = f"{stem}.jpg", 1
        # Ids may occur twice, and some file systems do not tell "A" from "a".
        while name.lower() in self._names:
            copies += 1
            name = f"{stem}-{copies}.jpg"
        self._names.add(name.lower())
        return name

    def finish(self, rows: Iterable[Row], scores: Mapping[str, float] | None = None) -> Path:
        """Write vis.json row by row, the scores and the page.

        Returns:
            The path of index.html.

        Raises:
            InputError: a file cannot be written.
        """
        write_results(self.folder / "vis.json", rows)
        with atomic_write(self.folder / "scores.json", "w", encoding="utf-8") as stream:
            json.dump(dict(scores or {}), stream)
        for source in page_files():
            target = self.folder / source.name
            if target.exists() and target.samefile(source):
                continue  # a working copy's own vis/
            with source.open("rb") as read, atomic_write(target) as written:
                shutil.copyfileobj(read, written)
        return self.folder / "index.html"


def safe_name(image_id: object) -> str:
    """A file name without suffix for any id: "img<id>" as the original has it, a digest where that is no plain name."""
    text = str(image_id)
    if _SAFE_ID.fullmatch(text):
        return f"img{text}"
    return "img-" + hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=10).hexdigest()


def _display_jpeg(picture: Path | np.ndarray) -> bytes:
    if isinstance(picture, np.ndarray):
        image = Image.fromarray(np.ascontiguousarray(picture.transpose(1, 2, 0)))
    else:
        data = read_file(picture)
        if _suits_page(data):
            return data
        try:
            image = decode_for_display(data, LONGEST_SIDE)
        except InputError as error:
            raise InputError(f"{picture}: {error}") from error
    encoded = io.BytesIO()
    image.save(encoded, "JPEG", quality=JPEG_QUALITY)
    return encoded.getvalue()


def _suits_page(data: bytes) -> bool:
    """Small JPEGs go onto the page as they are: decoding and encoding them again would cost time and quality."""
    try:
        with Image.open(io.BytesIO(data), formats=["JPEG"]) as image:
            return max(image.size) <= LONGEST_SIDE and image.mode in ("RGB", "L")
    except Exception:  # damaged headers raise anything; decode_for_display finds the words for it
        return False
