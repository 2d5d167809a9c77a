"""A folder of the page → one file to send: pictures and data inside, opened by double click, no foreign code in it.

The file is index.html with
    its style sheets and scripts inline, each allowed by its digest in the content policy, which allows no other code;
    <script type="application/json" data-name="vis.json">   the data; browsers do not run such blocks
    <script type="text/plain" data-picture="imgs/img1.jpg"> each picture, base64
"""

import base64
import html
import io
import logging
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from captioner.data.images import decode_for_display, read_file
from captioner.errors import InputError
from captioner.output.page_files import inlined, write_data
from captioner.runtime.files import atomic_write, read_json, require_writable_folder
from captioner.runtime.quantities import bytes_text

log = logging.getLogger(__name__)

LONGEST_SIDE = 512  # pixels: enough for a screen's share of a gallery, and small enough for a mail of some photos
JPEG_QUALITY = 75
BYTES_PER_PICTURE = 75_000  # a photo of that size in base64, with its row, and a quarter more for busy ones
AT_ONCE = 64


def require_album(target: Path, num_pictures: int) -> None:
    """Refuse a place where no album can be written, before the work starts, and say how large it will be.

    Raises:
        InputError: no .html file, or its folder cannot be written.
    """
    if target.suffix.lower() not in (".html", ".htm"):
        raise InputError(f"{target}: an album is a page", expected="a name that ends in .html")
    require_writable_folder(target.parent, "the album")
    size = bytes_text(expected_size(num_pictures))
    log.info("%s will have up to %s for %s pictures", target, size, f"{num_pictures:,}")


def expected_size(num_pictures: int) -> int:
    """About how many bytes an album will have at most."""
    return 150_000 + num_pictures * BYTES_PER_PICTURE


def write_album(folder: Path, target: Path) -> int:
    """Write the page in `folder` (as `VisWriter` leaves it) as one file.

    Returns:
        Its size in bytes.

    Raises:
        InputError: `folder` has no results, or the file cannot be written.
    """
    rows = _read_rows(folder)
    head, body = inlined("index.html")
    with atomic_write(target, "w", encoding="utf-8") as stream:
        stream.write(head)
        for picture in _pictures(folder, rows):
            stream.write(picture)
        for name in ("scores.json", "about.json"):
            if (folder / name).is_file():
                write_data(stream, name, read_json(folder / name))
        write_data(stream, "vis.json", rows)
        stream.write(body)
    return target.stat().st_size


def _read_rows(folder: Path) -> list[dict[str, Any]]:
    return read_json(folder / "vis.json", remedy="run caption-eval first")


def _pictures(folder: Path, rows: Iterable[dict[str, Any]]) -> Iterator[str]:
    """A block per picture, a few at a time: an album of thousands of photos does not have to fit into memory."""
    names = [row["image"] for row in rows if row.get("image")]  # written by VisWriter, below the folder
    with ThreadPoolExecutor() as pool:
        for first in range(0, len(names), AT_ONCE):
            some = names[first : first + AT_ONCE]
            for name, encoded in zip(some, pool.map(_thumbnail, [folder / name for name in some]), strict=True):
                if encoded:
                    yield f'<script type="text/plain" data-picture="{html.escape(name)}">{encoded}</script>\n'


def _thumbnail(path: Path) -> str:
    """base64 of a small JPEG without metadata; "" for a picture that is gone, which is logged."""
    try:
        small = decode_for_display(read_file(path), LONGEST_SIDE)
    except InputError as error:
        log.warning("no picture in the album: %s: %s", path, error)
        return ""
    encoded = io.BytesIO()
    small.save(encoded, "JPEG", quality=JPEG_QUALITY)
    return base64.b64encode(encoded.getvalue()).decode()
