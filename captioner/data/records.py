"""Every accepted description of pictures and captions → one list of records, told apart by content.

original   [{"file_path": "a.jpg", "captions": ["..", ..], "id"?: 1, "split"?: "train"}, ..]
Karpathy   {"images": [{"filename", "filepath"?, "sentences": [{"raw"}], "split", "cocoid"?}, ..]}
COCO       {"images": [{"id", "file_name"}, ..], "annotations": [{"image_id", "caption"}, ..]}
JSONL      one entry per line; {"image": "a.jpg", "caption": ".."} will do as well
table      CSV, TSV or |-separated: image, caption, one caption per line, with or without a header
token      Flickr8k's and Flickr30k's "a.jpg#0<tab>caption"
folder     photo.jpg with its captions, one per line, in photo.txt
"""

import codecs
import csv
import io
import logging
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from captioner.data.images import read_file
from captioner.data.json_stream import JsonError, JsonStream
from captioner.data.listing import list_images
from captioner.errors import InputError

log = logging.getLogger(__name__)

SPLITS = ("train", "val", "test")
# Karpathy's "restval" are COCO's validation images that he adds to the training set.
_SPLIT_NAMES = {"train": "train", "restval": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}

_IMAGE_KEYS = ("file_path", "image", "file_name", "filename", "path", "file", "image_name")
_CAPTION_KEYS = ("caption", "captions", "comment", "sentence", "text")
_TOKEN_LINE = re.compile(r"(?P<name>[^\t]+)#\d+\t(?P<caption>.*)")
_HEAD_CHARACTERS = 2**16


@dataclass(frozen=True, slots=True)
class Record:
    """One picture with its captions; `file_path` is as written, relative to the images' root."""

    file_path: str
    captions: list[str]
    id: int | str | None = None
    split: str | None = None


def read_records(path: str | Path, images_root: str | Path = "") -> list[Record]:
    """`stream_records` as a list."""
    return list(stream_records(path, images_root))


def stream_records(path: str | Path, images_root: str | Path = "") -> Iterator[Record]:
    """Read a description of pictures and captions in any of the forms above, a list of entries one at a time.

    Lines of one picture in a table or JSONL are joined; otherwise records come as they stand in the file, also
    those without captions or with a picture that another one has too.

    Args:
        path: the file, or a folder of pictures with text files.
        images_root: where a folder's pictures are named from (default: the folder itself).

    Raises:
        InputError: naming the file, the entry or line, and the field at fault.
    """
    path = Path(path)
    if path.is_dir():
        yield from _checked(path, _read_folder(path, Path(images_root) if str(images_root) else path))
    else:
        try:
            with _open_text(path) as stream:
                yield from _checked(path, _read_file(path, stream))
        except OSError as error:
            raise InputError(f"{path}: cannot be read ({error.strerror or error})") from error
        except UnicodeDecodeError as error:
            line = _line_of_bad_text(path, error.encoding)
            raise InputError(
                f"{path}: line {line} is not {error.encoding.upper()} text", remedy="save the file as UTF-8"
            ) from None


def _checked(path: Path, records: Iterable[Record]) -> Iterator[Record]:
    """The same records; at their end the mistakes that no single one shows."""
    without: str | None = None
    some_have_one = False
    for record in records:
        if record.split is not None:
            some_have_one = True
        elif without is None:
            without = record.file_path
        yield record
    if without is None and not some_have_one:
        raise InputError(f"{path}: describes no pictures")
    if without is not None and some_have_one:
        raise InputError(
            f"{path}: {without} has no split, but others have", expected="a split for all of them, or for none"
        )


def find_images_root(path: str | Path, first: Iterable[str], images_root: str) -> Path:
    """The folder that file paths start from: `images_root`, else the folder given as input, else the working
    folder as in the original, else, where the `first` pictures are not there, the folder of the description."""
    path = Path(path)
    if images_root or not path.exists():
        return Path(images_root)
    if path.is_dir():
        return path
    probes = list(first)
    for root in (Path(), path.parent):
        if any(_is_file(root, probe) for probe in probes):
            return root
    return Path()


def _is_file(root: Path, name: str) -> bool:
    try:
        return Path(root, name).is_file()
    except (OSError, ValueError):  # a name that no file can have
        return False


def _open_text(path: Path) -> IO[str]:
    if path.exists() and not path.is_file():
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


def _read_file(path: Path, stream: IO[str]) -> Iterator[Record]:
    head = stream.read(_HEAD_CHARACTERS)
    stream.seek(0)
    start = head.lstrip()
    if not start:
        raise InputError(f"{path}: is empty", expected="pictures and captions")
    if "\0" in head:
        raise InputError(f"{path}: is not text", expected="JSON, JSONL, CSV, TSV or a folder")
    try:
        if start[0] == "[":
            yield from _entries(path, JsonStream(stream))
        elif start[0] == "{":
            yield from _group(_json_lines(path, stream)) if _is_jsonl(head) else _read_object(path, JsonStream(stream))
        elif _TOKEN_LINE.match(start):
            yield from _group(_token_lines(path, stream))
        else:
            yield from _group(_table_rows(path, stream, start))
    except JsonError as error:
        raise InputError(f"{path}: line {error.line} {error.problem}") from None


# JSON


def _is_jsonl(head: str) -> bool:
    """Is the first line a whole object that describes one picture?"""
    first = head.lstrip().split("\n", 1)[0]
    try:
        value = JsonStream(io.StringIO(first)).value()
    except JsonError:
        return False
    return isinstance(value, dict) and any(key in value for key in _IMAGE_KEYS)


def _entries(path: Path, json: JsonStream) -> Iterator[Record]:
    for index, entry in enumerate(json.elements()):
        yield _record(entry, f"{path}: entry {index} (line {json.line})")
    json.end()


def _json_lines(path: Path, stream: IO[str]) -> Iterator[Record]:
    for number, line in enumerate(stream, start=1):
        if not line.strip():
            continue
        source = f"{path}: line {number}"
        json = JsonStream(io.StringIO(line))
        try:
            entry = json.value()
            rest = json.peek()
        except JsonError as error:
            raise InputError(f"{source} {error.problem}") from None
        if rest:
            raise InputError(f"{source} goes on after its entry with {rest!r}", expected="one JSON object per line")
        yield _record(entry, source)


def _record(entry: object, source: str) -> Record:
    """An entry of the original's form, of Karpathy's, or with an image and one caption."""
    if not isinstance(entry, dict):
        raise InputError(f"{source} is {_short(entry)}", expected='{"file_path": .., "captions": [..]}')
    if "sentences" in entry:
        return _karpathy_record(entry, source)
    file_path = _text(entry, _IMAGE_KEYS, source)
    key = next((key for key in _CAPTION_KEYS if key in entry), None)
    if key is None:
        raise InputError(f"{source}: captions is missing", expected='"captions": ["..", ..]')
    captions = [entry[key]] if isinstance(entry[key], str) else entry[key]
    if not isinstance(captions, list):
        raise InputError(f"{source}: {key} is {_short(captions)}", expected="a list of sentences")
    for number, caption in enumerate(captions):
        if not isinstance(caption, str):
            raise InputError(f"{source}: {key}[{number}] is {_short(caption)}", expected="a sentence")
    return Record(file_path, captions, _id(entry, ("id",), source), _split(entry, source))


def _karpathy_record(entry: dict[str, Any], source: str) -> Record:
    name = _text(entry, ("filename", *_IMAGE_KEYS), source)
    folder = entry.get("filepath", "")
    if not isinstance(folder, str):
        raise InputError(f"{source}: filepath is {_short(folder)}", expected="a folder's name")
    sentences = entry["sentences"]
    if not isinstance(sentences, list):
        raise InputError(f"{source}: sentences is {_short(sentences)}", expected='[{"raw": ".."}, ..]')
    captions = []
    for number, sentence in enumerate(sentences):
        raw = sentence.get("raw") if isinstance(sentence, dict) else None
        if not isinstance(raw, str):
            raise InputError(f"{source}: sentences[{number}] has no raw", expected='{"raw": "a sentence"}')
        captions.append(raw)
    image_id = _id(entry, ("cocoid", "id", "imgid"), source)
    return Record(f"{folder}/{name}" if folder else name, captions, image_id, _split(entry, source))


def _read_object(path: Path, json: JsonStream) -> list[Record]:
    """Karpathy's or COCO's file: the arrays `images` and `annotations`, whichever comes first."""
    karpathy: list[Record] = []
    names: dict[int | str, str] = {}
    captions: dict[int | str, list[str]] = {}
    seen: list[str] = []
    for key in json.members():
        seen.append(key)
        if key not in ("images", "annotations") or json.peek() != "[":
            json.skip()
            continue
        for index, entry in enumerate(json.elements()):
            source = f"{path}: {key}[{index}] (line {json.line})"
            if not isinstance(entry, dict):
                raise InputError(f"{source} is {_short(entry)}", expected="an object")
            if key == "annotations":
                captions.setdefault(_required_id(entry, "image_id", source), []).append(
                    _text(entry, ("caption",), source, may_be_empty=True)
                )
            elif "sentences" in entry:
                karpathy.append(_karpathy_record(entry, source))
            else:
                image_id = _required_id(entry, "id", source)
                if image_id in names:
                    raise InputError(f"{source}: the id {image_id!r} was used before")
                names[image_id] = _text(entry, ("file_name", "filename", "file_path"), source)
    json.end()
    if karpathy:
        return karpathy
    if "images" not in seen or "annotations" not in seen:
        raise InputError(
            f"{path}: has no {'images' if 'images' not in seen else 'annotations'} (its keys: {', '.join(seen[:8])})",
            expected="COCO's images and annotations, Karpathy's images with sentences, or a list of entries",
        )
    stray = next((image_id for image_id in captions if image_id not in names), None)
    if stray is not None:
        raise InputError(f"{path}: annotations name the image_id {stray!r}, which no entry of images has")
    return [Record(name, captions.get(image_id, []), image_id) for image_id, name in names.items()]


def _text(entry: dict[str, Any], keys: tuple[str, ...], source: str, may_be_empty: bool = False) -> str:
    key = next((key for key in keys if key in entry), None)
    if key is None:
        raise InputError(f"{source}: {keys[0]} is missing")
    value = entry[key]
    if not isinstance(value, str) or not (value or may_be_empty):
        raise InputError(f"{source}: {key} is {_short(value)}", expected="text")
    return value


def _id(entry: dict[str, Any], keys: tuple[str, ...], source: str) -> int | str | None:
    for key in keys:
        value = entry.get(key)
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, int | str):
            raise InputError(f"{source}: {key} is {_short(value)}", expected="a whole number or text")
        return value
    return None


def _required_id(entry: dict[str, Any], key: str, source: str) -> int | str:
    value = _id(entry, (key,), source)
    if value is None:
        raise InputError(f"{source}: {key} is missing")
    return value


def _split(entry: dict[str, Any], source: str) -> str | None:
    value = entry.get("split")
    if value is None or value == "":
        return None
    split = _SPLIT_NAMES.get(value.strip().lower()) if isinstance(value, str) else None
    if split is None:
        raise InputError(f"{source}: split is {_short(value)}", expected=", ".join(_SPLIT_NAMES))
    return split


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


# Lines


def _token_lines(path: Path, stream: IO[str]) -> Iterator[Record]:
    for number, line in enumerate(stream, start=1):
        line = line.rstrip("\r\n")
        if not line.strip():
            continue
        match = _TOKEN_LINE.fullmatch(line)
        if match is None:
            raise InputError(f"{path}: line {number} is {_short(line)}", expected="photo.jpg#0, a tab, and a caption")
        yield Record(match["name"].strip(), [match["caption"]])


def _table_rows(path: Path, stream: IO[str], start: str) -> Iterator[Record]:
    first = start.split("\n", 1)[0].rstrip("\r")
    delimiter = next((mark for mark in "\t|,;" if mark in first), None)
    if delimiter is None:
        raise InputError(
            f"{path}: is no description of pictures and captions (it begins with {_short(first)})",
            expected="JSON, JSONL, a table with image and caption, Flickr8k's .token, or a folder",
        )
    # Spaces are only stripped where a quote hides behind one: they belong to captions that are not quoted.
    spaced = f'{delimiter} "' in start
    rows = csv.reader(stream, delimiter=delimiter, strict=True, skipinitialspace=spaced)
    columns: dict[str, int] | None = None
    width = 0
    try:
        for row in rows:
            source = f"{path}: line {rows.line_num}"
            if not any(cell.strip() for cell in row):
                continue
            if columns is None:
                columns, width, is_header = _columns(row, source)
                if is_header:
                    continue
            if len(row) > width == columns["caption"] + 1:
                # A caption with the delimiter in it, not quoted.
                row = [*row[: width - 1], delimiter.join(row[width - 1 :])]
            if len(row) != width:
                raise InputError(f"{source} has {len(row)} columns", expected=f"{width} as in the first line")
            entry: dict[str, Any] = {name: row[index].strip() for name, index in columns.items()}
            if not entry["image"]:
                raise InputError(f"{source}: image is empty", expected="the name of a picture")
            image_id = entry.get("id") or None
            if image_id is not None and re.fullmatch(r"-?[0-9]{1,18}", image_id):
                image_id = int(image_id)
            yield Record(entry["image"], [entry["caption"]], image_id, _split(entry, source))
    except csv.Error as error:
        raise InputError(f"{path}: line {rows.line_num} is not a proper table row ({error})") from None


def _columns(first: list[str], source: str) -> tuple[dict[str, int], int, bool]:
    """Which column holds what: by the header if there is one, else image first and caption last."""
    names = [cell.strip().lower() for cell in first]
    image = next((names.index(name) for name in _IMAGE_KEYS if name in names), None)
    caption = next((names.index(name) for name in _CAPTION_KEYS if name in names), None)
    if image is not None and caption is not None:
        columns = {"image": image, "caption": caption}
        columns.update((name, names.index(name)) for name in ("id", "split") if name in names)
        return columns, len(first), True
    if image is not None or caption is not None:
        raise InputError(f"{source}: the header is {_short(first)}", expected="columns image and caption")
    return {"image": 0, "caption": 1}, 2, False


def _group(rows: Iterable[Record]) -> list[Record]:
    """Join the rows of each picture, in the order of its first row."""
    grouped: dict[tuple[str, int | str | None, str | None], Record] = {}
    for row in rows:
        record = grouped.setdefault((row.file_path, row.id, row.split), row)
        if record is not row:
            record.captions.extend(row.captions)
    return list(grouped.values())


# A folder


def _read_folder(folder: Path, images_root: Path) -> list[Record]:
    images = list_images(folder, recursive=True)
    if not images:
        raise InputError(f"{folder}: holds no pictures")
    records = []
    for image in images:
        try:
            name = image.relative_to(images_root).as_posix()
        except ValueError:
            raise InputError(
                f"{folder} is not in the images' root {images_root}", remedy="leave --images_root out"
            ) from None
        records.append(Record(name, _read_captions_beside(image)))
    return records


def _read_captions_beside(image: Path) -> list[str]:
    for candidate in (image.with_suffix(".txt"), image.with_name(image.name + ".txt")):
        if not candidate.exists():
            continue
        try:
            text = read_file(candidate).decode("utf-8-sig")
        except InputError as error:
            log.warning("no captions taken from %s", error)
        except UnicodeDecodeError:
            log.warning("no captions taken from %s: it is not UTF-8 text", candidate)
        else:
            return [line.strip() for line in text.splitlines() if line.strip()]
    return []
