"""Every accepted description of pictures and captions → one record per picture, told apart by content.

original   [{"file_path": "a.jpg", "captions": ["..", ..], "id"?: 1, "split"?: "train"}, ..]
Karpathy   {"images": [{"filename", "filepath"?, "sentences": [{"raw"}], "split", "cocoid"?}, ..]}
COCO       {"images": [{"id", "file_name"}, ..], "annotations": [{"image_id", "caption"}, ..]}
JSONL      one entry per line; {"image": "a.jpg", "caption": ".."} will do as well
table      CSV, TSV or |-separated: image, caption, one caption per line, with or without a header
token      Flickr8k's and Flickr30k's "a.jpg#0<tab>caption"
labels     "photos/a.jpg dog" per line: the label becomes the caption
folder     photo.jpg with its captions, one per line, in photo.txt
classes    a folder with one folder per class and no text: the class's name becomes the caption
shard      a tar archive as WebDataset and img2dataset write them: 0001.jpg (.png, .webp) with 0001.txt or 0001.json;
           a Parquet file with pictures' bytes in a column (image, jpg, ..) and texts in another (caption, text, ..)
"""

import contextlib
import json
import logging
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from captioner.data.entries import (
    CAPTION_KEYS,
    ID_KEYS,
    NAME_KEYS,
    Entry,
    caption_of,
    id_of,
    read_entries,
    short,
    text_of,
)
from captioner.data.images import read_file
from captioner.data.listing import SHARD_SUFFIXES, is_shard, list_images, list_shard
from captioner.data.parquet_files import is_parquet, read_rows
from captioner.data.tar_files import list_members, why_no_shard
from captioner.errors import InputError
from captioner.runtime.files import protect
from captioner.runtime.regular_files import open_regular

log = logging.getLogger(__name__)

SPLITS = ("train", "val", "test")
# Karpathy's "restval" are COCO's validation images that he adds to the training set.
_SPLIT_NAMES = {"train": "train", "restval": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}

_LABEL_FILES = ("labels.txt", "classes.txt", "names.txt")  # beside a list of numbered labels: line k names label k


@dataclass(frozen=True, slots=True)
class Record:
    """One picture with its captions; `file_path` is as written, relative to the images' root."""

    file_path: str  # "" where the picture is known by its id alone
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
    without: str | None = None
    some_have_one = False
    for record in known_captions(path, images_root):
        if not record.file_path:
            raise InputError(f"{path}: the picture with the id {record.id!r} has no {NAME_KEYS[0]}")
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


def known_captions(path: Path, images_root: str | Path = "") -> Iterator[Record]:
    """The same of pictures that need no file: an id will do, and some may have a split and others not."""
    if is_parquet(path):
        yield from _read_parquet(path, Path(images_root) if str(images_root) else path)
    elif is_shard(path):
        yield from _read_shard(path, Path(images_root) if str(images_root) else path)
    elif os.path.isdir(path):  # Path.is_dir fails for names that are too long
        yield from _read_folder(path, Path(images_root) if str(images_root) else path)
    elif path.name.lower().endswith((*SHARD_SUFFIXES, ".tar.gz", ".tgz")) and path.exists():
        reason = ""
        with contextlib.suppress(OSError), open_regular(path) as stream:
            reason = why_no_shard(stream.read(6))
        raise InputError(f"{path}: {reason or f'is no {path.suffix} file, or a damaged one'}")
    else:
        yield from _records(path)


def find_images_root(path: str | Path, first: Iterable[str], images_root: str) -> Path:
    """The folder that file paths start from: `images_root`, else the folder or shard given as input, else the working
    folder as in the original, else, where the `first` pictures are not there, the folder of the description."""
    path = Path(path)
    if images_root or not os.path.exists(path):
        return Path(images_root)
    if path.is_dir() or is_shard(path):
        return path
    probes = list(first)
    for root in (Path(), path.parent):
        if any(_is_file(root, probe) for probe in probes):
            return root
    return Path()


def _is_file(root: Path, name: str) -> bool:
    return os.path.isfile(os.path.join(root, name))


def _records(path: Path) -> Iterator[Record]:
    """Entries as records; what is one picture over several of them is put together."""
    lists: dict[str, list[Record]] = {"row": [], "label": []}  # the entries that may be of one picture
    names: dict[int | str, str] = {}
    captions: dict[int | str, list[str]] = {}
    for entry in read_entries(path):
        if "sentences" in entry.fields:
            yield _karpathy_record(entry)
        elif entry.kind == "images":
            _name_picture(entry, names)
        elif entry.kind == "annotations":
            caption = caption_of(entry.fields.get("caption"), f"{entry.source}: caption")
            captions.setdefault(_required_id(entry, "image_id"), []).append(caption)
        elif entry.kind in lists:
            lists[entry.kind].append(record_of(entry))
        else:
            yield record_of(entry)
    stray = next((image_id for image_id in captions if image_id not in names), None)
    if stray is not None:
        raise InputError(f"{path}: annotations name the image_id {stray!r}, which no entry of images has")
    yield from (Record(name, captions.get(image_id, []), image_id) for image_id, name in names.items())
    yield from _group(lists["row"])
    yield from _group(_named_labels(path, lists["label"]))


def record_of(entry: Entry) -> Record:
    """An entry of the original's form, or with an image and one caption; one of the two, name or id, will do.

    Raises:
        InputError: naming the field at fault.
    """
    fields, source = entry.fields, entry.source
    key = next((key for key in CAPTION_KEYS if key in fields), None)
    file_path, image_id = text_of(fields, NAME_KEYS, source), id_of(fields, ID_KEYS, source)
    if file_path is None and image_id is None:
        raise InputError(f"{source}: {NAME_KEYS[0]} is missing (its keys: {', '.join(map(str, fields))})")
    if key is None:
        raise InputError(f"{source}: captions is missing", expected='"captions": ["..", ..]')
    if key == "captions" and not isinstance(fields[key], list):
        raise InputError(f"{source}: {key} is {short(fields[key])}", expected="a list of sentences")
    if isinstance(fields[key], list):
        captions = [caption_of(caption, f"{source}: {key}[{i}]") for i, caption in enumerate(fields[key])]
    else:
        captions = [caption_of(fields[key], f"{source}: {key}")]
    return Record(file_path or "", captions, image_id, _split(fields, source))


def _karpathy_record(entry: Entry) -> Record:
    fields, source = entry.fields, entry.source
    name = text_of(fields, ("filename", *NAME_KEYS), source)
    if name is None:
        raise InputError(f"{source}: filename is missing")
    folder = fields.get("filepath", "")
    if not isinstance(folder, str):
        raise InputError(f"{source}: filepath is {short(folder)}", expected="a folder's name")
    sentences = fields["sentences"]
    if not isinstance(sentences, list):
        raise InputError(f"{source}: sentences is {short(sentences)}", expected='[{"raw": ".."}, ..]')
    captions = []
    for number, sentence in enumerate(sentences):
        raw = sentence.get("raw") if isinstance(sentence, dict) else None
        if not isinstance(raw, str):
            raise InputError(f"{source}: sentences[{number}] has no raw", expected='{"raw": "a sentence"}')
        captions.append(caption_of(raw, source))
    image_id = id_of(fields, ("cocoid", "id", "imgid"), source)
    return Record(f"{folder}/{name}" if folder else name, captions, image_id, _split(fields, source))


def _name_picture(entry: Entry, names: dict[int | str, str]) -> None:
    """An entry of COCO's `images`."""
    image_id = _required_id(entry, "id")
    if image_id in names:
        raise InputError(f"{entry.source}: the id {image_id!r} was used before")
    name = text_of(entry.fields, ("file_name", "filename", "file_path"), entry.source)
    if name is None:
        raise InputError(f"{entry.source}: file_name is missing")
    names[image_id] = name


def _required_id(entry: Entry, key: str) -> int | str:
    value = id_of(entry.fields, (key,), entry.source)
    if value is None:
        raise InputError(f"{entry.source}: {key} is missing")
    return value


def _split(fields: dict[str, Any], source: str) -> str | None:
    value = fields.get("split")
    if value is None or value == "":
        return None
    split = _SPLIT_NAMES.get(value.strip().lower()) if isinstance(value, str) else None
    if split is None:
        raise InputError(f"{source}: split is {short(value)}", expected=", ".join(_SPLIT_NAMES))
    return split


def _group(rows: Iterable[Record]) -> Iterable[Record]:
    """Join the rows of each picture, in the order of its first row."""
    grouped: dict[tuple[str, int | str | None, str | None], Record] = {}
    for row in rows:
        record = grouped.setdefault((row.file_path, row.id, row.split), row)
        if record is not row:
            record.captions.extend(row.captions)
    return grouped.values()


# Labels


def _named_labels(path: Path, rows: list[Record]) -> list[Record]:
    """Labels as captions; where they are numbers and a file beside the list names them, the names."""
    labels = Counter(row.captions[0].strip() for row in rows)
    names: list[str] = []
    if rows and all(re.fullmatch(r"[0-9]{1,9}", label) for label in labels):
        beside = next((path.with_name(name) for name in _LABEL_FILES if path.with_name(name).is_file()), None)
        if beside is None:
            log.warning(
                "%s: its labels are numbers, which make poor captions; put their names, one a line, into %s beside it",
                path,
                _LABEL_FILES[0],
            )
        else:
            names = _text_lines(beside)
            if max(map(int, labels)) >= len(names):
                raise InputError(
                    f"{path}: has the label {max(map(int, labels))}, but {beside} has {len(names)} lines",
                    expected="the name of label 0 in the first line, and so on",
                )
    if rows:
        captions = {label: _caption_of_class(names[int(label)] if names else label) for label in labels}
        _say_labels(path, "labels", captions)
        rows = [Record(row.file_path, [captions[row.captions[0].strip()]]) for row in rows]
    return rows


def _caption_of_class(name: str) -> str:
    """The name of a class or its folder as a caption."""
    return " ".join(name.replace("_", " ").split())


def _say_labels(path: Path, what: str, captions: dict[str, str]) -> None:
    shown = ", ".join(repr(caption) for caption in sorted(set(captions.values()))[:5])
    more = ", .." if len(captions) > 5 else ""
    log.info("%s: %d %s become captions: %s%s", path, len(captions), what, shown, more)


# A folder


def _read_folder(folder: Path, images_root: Path) -> list[Record]:
    images = list_images(folder, recursive=True)
    if not images:
        raise InputError(f"{folder}: holds no pictures")
    captions = [_read_captions_beside(image) for image in images]
    splits: list[str | None] = [None] * len(images)
    if not any(captions):
        captions, splits = _classes(folder, images)
    return [
        Record(_name_from(folder, image, images_root), of_image, None, split)
        for image, of_image, split in zip(images, captions, splits, strict=True)
    ]


def _name_from(source: Path, image: Path, images_root: Path) -> str:
    try:
        return image.relative_to(images_root).as_posix()
    except ValueError:
        raise InputError(
            f"{source} is not in the images' root {images_root}", remedy="leave --images_root out"
        ) from None


def _classes(folder: Path, images: list[Path]) -> tuple[list[list[str]], list[str | None]]:
    """Captions and splits of pictures in folders of classes (dog/a.jpg), or of splits with such (val/dog/a.jpg).

    Pictures directly in the folder have no class.
    """
    parts = [image.relative_to(folder).parts[:-1] for image in images]
    in_splits = all(len(names) > 1 and names[0].lower() in _SPLIT_NAMES for names in parts)
    captions = {names[-1]: _caption_of_class(names[-1]) for names in parts if names}
    if captions:
        _say_labels(folder, "names of folders", captions)
    return (
        [[captions[names[-1]]] if names else [] for names in parts],
        [_SPLIT_NAMES[names[0].lower()] if in_splits else None for names in parts],
    )


def _read_captions_beside(image: Path) -> list[str]:
    for candidate in (image.with_suffix(".txt"), image.with_name(image.name + ".txt")):
        if os.path.exists(candidate):  # Path.exists fails for names that are too long
            return _lines_or_warning(candidate)
    return []


def _text_lines(path: Path) -> list[str]:
    protect(path)
    try:
        text = read_file(path).decode("utf-8-sig")
    except UnicodeDecodeError:
        raise InputError(f"{path}: it is not UTF-8 text") from None
    return [line.strip() for line in text.splitlines() if line.strip()]


# A shard


def _read_shard(path: Path, images_root: Path) -> Iterator[Record]:
    """Pictures of a tar archive with the text of the same name: as far as the archive is whole."""
    pictures = list_shard(str(path))
    members = list_members(str(path))
    for picture in pictures:
        name = picture[len(str(path)) + 1 :]
        folder, slash, last = name.rpartition("/")
        stem = folder + slash + last.partition(".")[0]  # WebDataset's rule: a sample's name ends at the first dot
        file_path = _name_from(path, path / name, images_root)
        described = _described_member(path / f"{stem}.json", file_path) if f"{stem}.json" in members else None
        if described is None:
            text = path / f"{stem}.txt"
            described = Record(file_path, _lines_or_warning(text) if f"{stem}.txt" in members else [])
        yield described


def _read_parquet(path: Path, images_root: Path) -> Iterator[Record]:
    """The rows of a Parquet file; the pictures are read later, one by one."""
    try:
        with path.open("rb") as stream:
            rows = read_rows(stream, (*CAPTION_KEYS, *ID_KEYS, "split"), with_pictures=False)
            for number, (_, problem, fields) in enumerate(rows):
                source = f"{path}: row {number}"
                if problem:  # pictures were not asked for
                    log.warning("no captions taken from %s: %s", source, problem)
                named = {NAME_KEYS[0]: _name_from(path, path / str(number), images_root)}
                given = {key: value for key, value in fields.items() if value is not None}
                if not given.keys().isdisjoint(CAPTION_KEYS):
                    yield record_of(Entry({**given, **named}, source, "entry"))
                else:
                    yield Record(named[NAME_KEYS[0]], [])
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror or error})") from error


def _described_member(path: Path, file_path: str) -> Record | None:
    """img2dataset's json beside a picture; None if it has no caption: a text beside it may."""
    try:
        fields = json.loads(read_file(path))
        if not isinstance(fields, dict):
            raise InputError(f"{path}: is {short(fields)}", expected="an object")
        if all(fields.get(key) is None for key in CAPTION_KEYS):
            return None
        return record_of(Entry({**fields, NAME_KEYS[0]: file_path}, str(path), "entry"))
    except (ValueError, RecursionError, InputError) as error:
        log.warning("no captions taken from %s", error if isinstance(error, InputError) else f"{path}: {error}")
        return None


def _lines_or_warning(path: Path) -> list[str]:
    try:
        return _text_lines(path)
    except InputError as error:
        log.warning("no captions taken from %s", error)
        return []
