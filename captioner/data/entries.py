"""Lists of captions in any form → entries, one at a time: the one reader for preparing, scoring and comparing.

JSON      a list of objects, one object, or one on each line (JSON lines)
object    COCO's and Karpathy's files, whose entries stand in the arrays `images` and `annotations`
table     CSV, TSV or |-separated, UTF-8 or UTF-16, with or without a header
labels    "photos/a.jpg dog" per line
token     Flickr8k's and Flickr30k's "a.jpg#0<tab>caption"

The form is told by content. What the fields mean is for `records` and for `captioner.metrics.pairing` to say.
"""

import codecs
import csv
import io
import math
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from captioner.data.json_stream import JsonError, JsonStream
from captioner.errors import InputError

# Names of fields and columns, the first one that is there counts.
NAME_KEYS = ("file_path", "image", "file_name", "filename", "path", "file", "image_name")
CAPTION_KEYS = ("caption", "captions", "comment", "sentence", "text")
ID_KEYS = ("image_id", "id")

_TOKEN_LINE = re.compile(r"(?P<name>[^\t]+)#\d+\t(?P<caption>.*)")
_LABEL_LINE = re.compile(r"(?P<name>[^\t|,;]+?\.(?:jpe?g|png|webp|bmp|gif|tiff?|ppm|pgm)) +(?P<label>\S.*)", re.I)
_HEAD_CHARACTERS = 2**16


@dataclass(frozen=True, slots=True)
class Entry:
    """The fields of one entry, where it stands, and what kind of line or array that is."""

    fields: dict[str, Any]
    source: str  # for messages: file, and entry or line
    kind: str  # "entry", "row" (of JSON lines, a table or .token), "label", or the array's name in an object


def read_entries(path: Path) -> Iterator[Entry]:
    """Every entry of a file, in order.

    Raises:
        InputError: naming the file, the line and what is wrong.
    """
    try:
        with _open_text(path) as stream:
            yield from _read(path, stream)
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror or error})") from error
    except JsonError as error:
        raise InputError(f"{path}: line {error.line} {error.problem}") from None
    except UnicodeDecodeError as error:
        line = _line_of_bad_text(path, error.encoding)
        raise InputError(
            f"{path}: line {line} is not {error.encoding.upper()} text", remedy="save the file as UTF-8"
        ) from None


def short(value: object) -> str:
    """A value of a file, for messages."""
    text = "NaN" if isinstance(value, float) and math.isnan(value) else repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def whole(text: str) -> str:
    r"""Replace half characters (JSON's "\ud83d" alone), which no output can carry."""
    return text if text.isascii() else text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def text_of(fields: dict[str, Any], keys: tuple[str, ...], source: str) -> str | None:
    """The text under the first of `keys` that is there; None if none is."""
    key = next((key for key in keys if fields.get(key) is not None), None)
    if key is None:
        return None
    if not isinstance(fields[key], str) or not fields[key]:
        raise InputError(f"{source}: {key} is {short(fields[key])}", expected="text")
    return fields[key]


def id_of(fields: dict[str, Any], keys: tuple[str, ...], source: str) -> int | str | None:
    """The id under the first of `keys` that is there; None if none is. 5.0 is 5: tables make such numbers of ids."""
    key = next((key for key in keys if fields.get(key) is not None), None)
    if key is None:
        return None
    value = fields[key]
    if isinstance(value, float) and math.isfinite(value) and value == int(value):
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, int | str):
        raise InputError(f"{source}: {key} is {short(value)}", expected="a whole number or text")
    return whole(value) if isinstance(value, str) else value


def caption_of(value: object, source: str) -> str:
    """A caption under the name and place that `source` says."""
    if not isinstance(value, str):
        problem = "is missing" if value is None else f"is {short(value)}"
        raise InputError(f"{source} {problem}", expected='a sentence (an empty caption is "")')
    return whole(value)


def _open_text(path: Path) -> IO[str]:
    if os.path.exists(path) and not os.path.isfile(path):
        raise InputError(f"{path}: is neither a file nor a folder")
    with open(path, "rb") as stream:
        start = stream.read(4)
    if start.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return open(path, encoding="utf-16", newline="")
    return open(path, encoding="utf-8-sig", newline="")


def _line_of_bad_text(path: Path, encoding: str) -> int:
    decoder = codecs.getincrementaldecoder(encoding)()
    with open(path, "rb") as stream:
        for number, line in enumerate(stream, start=1):
            try:
                decoder.decode(line)
            except UnicodeDecodeError:
                return number
    return 1


def _read(path: Path, stream: IO[str]) -> Iterator[Entry]:
    head = stream.read(_HEAD_CHARACTERS)
    stream.seek(0)
    start = head.lstrip()
    if not start:
        raise InputError(f"{path}: is empty", expected="pictures and captions")
    if "\0" in head:
        raise InputError(f"{path}: is not text", expected="JSON, JSONL, CSV, TSV or a folder")
    if start[0] == "[":
        return _json_list(path, JsonStream(stream))
    if start[0] == "{" and _is_entry(start.split("\n", 1)[0]):
        return _json_lines(path, stream)
    if start[0] == "{" and _is_entry(start):
        return _json_entry(path, JsonStream(stream))
    if start[0] == "{":
        return _json_object(path, JsonStream(stream))
    if _TOKEN_LINE.match(start):
        return _lines(path, stream, _TOKEN_LINE, "photo.jpg#0, a tab, and a caption", "row")
    if _LABEL_LINE.match(start):
        return _lines(path, stream, _LABEL_LINE, "photo.jpg, a space, and a label", "label")
    return _table(path, stream, start)


def _is_entry(text: str) -> bool:
    """Does the text begin with a whole object that describes one picture?"""
    try:
        value = JsonStream(io.StringIO(text)).value()
    except JsonError:
        return False
    return isinstance(value, dict) and not {*NAME_KEYS, *ID_KEYS}.isdisjoint(value)


def _object(value: object, source: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise InputError(f"{source} is {short(value)}", expected='{"file_path": .., "captions": [..]}')
    return value


def _json_list(path: Path, json: JsonStream) -> Iterator[Entry]:
    for index, value in enumerate(json.elements()):
        source = f"{path}: entry {index} (line {json.line})"
        yield Entry(_object(value, source), source, "entry")
    json.end()


def _json_lines(path: Path, stream: IO[str]) -> Iterator[Entry]:
    for number, line in enumerate(stream, start=1):
        if not line.strip():
            continue
        source = f"{path}: line {number}"
        json = JsonStream(io.StringIO(line))
        try:
            value = json.value()
            rest = json.peek()
        except JsonError as error:
            raise InputError(f"{source} {error.problem}") from None
        if rest:
            raise InputError(f"{source} goes on after its entry with {rest!r}", expected="one JSON object per line")
        yield Entry(_object(value, source), source, "row")


def _json_entry(path: Path, json: JsonStream) -> Iterator[Entry]:
    """A single entry over many lines."""
    value = json.value()
    json.end()
    yield Entry(_object(value, f"{path}: line 1"), f"{path}: line 1", "entry")


def _json_object(path: Path, json: JsonStream) -> Iterator[Entry]:
    """Karpathy's or COCO's file: the arrays `images` and `annotations`, whichever comes first."""
    seen: list[str] = []
    whole_in_images = False
    for key in json.members():
        seen.append(key)
        if key not in ("images", "annotations") or json.peek() != "[":
            json.skip()
            continue
        for index, value in enumerate(json.elements()):
            source = f"{path}: {key}[{index}] (line {json.line})"
            entry = Entry(_object(value, source), source, key)
            whole_in_images |= "sentences" in entry.fields
            yield entry
    json.end()
    missing = [key for key in ("images", "annotations") if key not in seen and not whole_in_images]
    if missing:
        raise InputError(
            f"{path}: has no {missing[0]} (its keys: {', '.join(seen[:8])})",
            expected="COCO's images and annotations, Karpathy's images with sentences, or a list of entries",
        )


def _lines(path: Path, stream: IO[str], form: re.Pattern[str], expected: str, kind: str) -> Iterator[Entry]:
    for number, line in enumerate(stream, start=1):
        line = line.rstrip("\r\n")
        if not line.strip():
            continue
        match = form.fullmatch(line.strip() if kind == "label" else line)
        if match is None:
            raise InputError(f"{path}: line {number} is {short(line)}", expected=expected)
        name, text = match.groups()
        yield Entry({"file_path": name.strip(), "caption": text}, f"{path}: line {number}", kind)


def _table(path: Path, stream: IO[str], start: str) -> Iterator[Entry]:
    first = start.split("\n", 1)[0].rstrip("\r")
    delimiter = next((mark for mark in "\t|,;" if mark in first), None)
    if delimiter is None:
        raise InputError(
            f"{path}: is no description of pictures and captions (it begins with {short(first)})",
            expected="JSON, JSONL, a table with image and caption, Flickr8k's .token, or a folder",
        )
    # Spaces are only stripped where a quote hides behind one: they belong to captions that are not quoted.
    spaced = f'{delimiter} "' in start
    rows = csv.reader(stream, delimiter=delimiter, strict=True, skipinitialspace=spaced)
    columns: dict[str, int] = {}
    width = 0
    try:
        for row in rows:
            source = f"{path}: line {rows.line_num}"
            if not any(cell.strip() for cell in row):
                continue
            if not columns:
                columns, width, is_header = _columns(row, source)
                if is_header:
                    continue
            if len(row) > width == columns["caption"] + 1:
                # A caption with the delimiter in it, not quoted.
                row = [*row[: width - 1], delimiter.join(row[width - 1 :])]
            if len(row) != width:
                raise InputError(f"{source} has {len(row)} columns", expected=f"{width} as in the first line")
            yield Entry(_cells(row, columns), source, "row")
    except csv.Error as error:
        raise InputError(f"{path}: line {rows.line_num} is not a proper table row ({error})") from None


def _columns(first: list[str], source: str) -> tuple[dict[str, int], int, bool]:
    """Which column holds what: by the header if there is one, else the name first and the caption last."""
    names = [cell.strip().lower() for cell in first]
    caption = next((names.index(name) for name in CAPTION_KEYS if name in names), None)
    columns = {name: names.index(name) for name in (*NAME_KEYS, *ID_KEYS, "split") if name in names}
    if caption is not None and not columns.keys() <= {"split"}:
        return {**columns, "caption": caption}, len(first), True
    if caption is not None or not columns.keys().isdisjoint(NAME_KEYS):
        raise InputError(f"{source}: the header is {short(first)}", expected="columns image and caption")
    return {"file_path": 0, "caption": 1}, 2, False


def _cells(row: list[str], columns: dict[str, int]) -> dict[str, Any]:
    """An empty cell is a missing value, but for the caption. Ids that are written as numbers are numbers."""
    fields: dict[str, Any] = {}
    for name, index in columns.items():
        cell = row[index].strip()
        if re.match(r"'[=+\-@\t\r]", cell):
            cell = cell[1:]  # the apostrophe that keeps spreadsheets from computing it (output/results.py)
        if name in ID_KEYS and re.fullmatch(r"-?[0-9]{1,18}", cell):
            fields[name] = int(cell)
        elif cell or name == "caption":
            fields[name] = cell
    return fields
