"""Two systems' captions of the same pictures → files that the page shows side by side."""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from captioner.metrics.report import worst_by
from captioner.output.page import COMPARISON, VisWriter, sole_writer
from captioner.output.page_files import copy_page, write_data_script
from captioner.output.results import write_results
from captioner.runtime.files import atomic_write, read_json

Scored = tuple[str, Sequence[dict[str, Any]]]  # what the system is called, and its rows with their scores


def write_comparison(
    folder: Path, systems: Sequence[Scored], references: Sequence[Sequence[str]], overwrite: bool = False
) -> str:
    """Write one file per system into the page's folder, and the page if it is not there.

    Args:
        folder: of a page; the pictures that its vis.json names are shown with the captions.
        systems: two or three, with rows of the same images in the same order (`metrics.report.per_caption_rows`).
        references: known captions of these images.
        overwrite: whether files that are not ours may be replaced.

    Returns:
        The address of the comparison: a path with what follows #.

    Raises:
        InputError: a file cannot be written.
    """
    with sole_writer(folder):
        files = _write(folder, systems, references, overwrite)
    page = folder / "index.html"
    view = "&".join(f"{letter}={file}" for letter, file in zip("abc", files, strict=False))
    return f"{page}#{view}&sort=differing"


def _write(folder: Path, systems: Sequence[Scored], references: Sequence[Sequence[str]], overwrite: bool) -> list[str]:
    """All files; returns the names of those of the systems."""
    writer = VisWriter(folder, overwrite)  # refuses a folder that holds files of others where ours go
    pictures = _pictures(folder)
    by = worst_by(systems[0][1])
    files: list[str] = []
    for name, _ in systems:
        files.append(_file_name(name, files))
    writer.claim([name + ending for name in files for ending in ("", ".js")])
    for file, (_, rows) in zip(files, systems, strict=True):
        found = [
            {
                "image_id": first["image_id"],  # the same for all systems: the page joins them by it
                "file_name": first["file_name"] or "",
                "caption": row["caption"],
                "image": "",
                **({"score": row[by], "score_name": by} if by else {}),
                "references": list(known),
                **(pictures.get(first["file_name"]) or pictures.get(str(first["image_id"])) or {}),
            }
            for first, row, known in zip(systems[0][1], rows, references, strict=True)
        ]
        write_results(folder / file, found)
        write_data_script(folder / file)
    about, script = folder / "about.json", folder / "about.json.js"
    if not (about.exists() and script.exists()):
        writer.claim([about.name, script.name])  # ours, when the same is asked for again
        if not about.exists():
            with atomic_write(about, "w", encoding="utf-8") as stream:
                json.dump({"title": "Comparison"}, stream)
        write_data_script(about)
    copy_page(folder)
    return files


def _pictures(folder: Path) -> dict[str, dict[str, Any]]:
    """What the page's vis.json says about pictures, by file name and by id."""
    path = folder / "vis.json"
    if not path.is_file():
        return {}
    rows = read_json(path, remedy="write the page again with caption-eval")
    found: dict[str, dict[str, Any]] = {}
    for row in rows if isinstance(rows, list) else []:
        if isinstance(row, dict) and row.get("image"):
            picture = {key: row[key] for key in ("image", "width", "height") if key in row}
            found[str(row.get("image_id"))] = picture
            if isinstance(row.get("file_name"), str) and row["file_name"]:
                found[row["file_name"]] = picture
    return found


def _file_name(name: str, taken: Sequence[str]) -> str:
    stem = re.sub(r"[^A-Za-z0-9_.-]+", "-", Path(name).stem)[:80]
    # Results are often called alike, and told apart by their folders.
    folder = re.sub(r"[^A-Za-z0-9_.-]+", "-", Path(name).resolve().parent.name)[:80]
    for candidate in (f"{COMPARISON}{stem}.json", f"{COMPARISON}{folder}-{stem}.json", f"{COMPARISON}{stem}-2.json"):
        if candidate not in taken:
            return candidate
    return f"{COMPARISON}{stem}-3.json"
