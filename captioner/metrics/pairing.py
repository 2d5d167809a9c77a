"""Which prediction belongs to which references: reading both, and joining them by image id or file name.

Predictions  [{"image_id": 5, "caption": ".."}, ..] as coco-caption's result files, with "file_name" as caption-eval
             writes it, or with "file_name" alone; JSON, JSON lines, or CSV with these columns.
References   [{"image_id" | "id" | "file_path": .., "captions": [".."]}, ..] or one {"image_id", "caption"} per entry,
             JSON or JSON lines; or any description of pictures and captions that caption-prepro reads (COCO,
             Karpathy, tables, Flickr's .token, folders with text files).
"""

import csv
import io
import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from captioner.data.records import read_records
from captioner.errors import InputError

_NAME_KEYS = ("file_path", "file_name", "filename", "image")
_HEAD_CHARACTERS = 2**16  # enough to tell a file's form
_PREDICTION_NAME_KEYS = ("file_name", "file_path", "filename")  # not "image": the page's own copy of the picture


@dataclass(frozen=True)
class Prediction:
    """One caption; `source` says where it stands, for messages."""

    image_id: int | str | None
    name: str | None
    caption: str
    source: str

    @property
    def label(self) -> str:
        """What a person calls the image."""
        return _label(self.image_id, self.name)


@dataclass(frozen=True)
class Reference:
    """The captions that people gave one image."""

    image_id: int | str | None
    name: str | None
    captions: list[str] = field(default_factory=list)

    @property
    def label(self) -> str:
        """What a person calls the image."""
        return _label(self.image_id, self.name)


Pair = tuple[Prediction, Reference]


def _label(image_id: int | str | None, name: str | None) -> str:
    return name or str(image_id)


@dataclass(frozen=True)
class Joined:
    """Predictions with their references, in the predictions' order.

    Attributes:
        pairs: prediction and reference of each image that has both.
        by: what they were joined by, in words.
        unmatched_predictions, unmatched_references: what is left over.
        num_repeated: predictions that only repeat an earlier one of the same image, left out.
    """

    pairs: list[Pair]
    by: str
    unmatched_predictions: list[Prediction]
    unmatched_references: list[Reference]
    num_repeated: int


def read_predictions(path: str | Path) -> list[Prediction]:
    """Read captions to score.

    Raises:
        InputError: naming the file, the first entry at fault and what it should be.
    """
    path = Path(path)
    predictions = []
    for source, entry in _entries(path, '[{"image_id": .., "caption": ".."}, ..]'):
        image_id, name = _identity(entry, ("image_id", "id"), _PREDICTION_NAME_KEYS, source)
        predictions.append(Prediction(image_id, name, _caption(entry.get("caption"), f"{source}: caption"), source))
    if not predictions:
        raise InputError(f"{path}: holds no captions")
    return predictions


def read_references(path: str | Path) -> list[Reference]:
    """Read known captions; images without any are left out, entries of one image are put together.

    Raises:
        InputError: naming the file, the first entry at fault and what it should be.
    """
    path = Path(path)
    read = _listed_references(path) if _is_list(path) else _described_references(path)
    merged: dict[tuple[int | str | None, str | None], Reference] = {}
    for reference in read:
        known = merged.setdefault((reference.image_id, reference.name), reference)
        if known is not reference:
            known.captions.extend(reference.captions)
    references = [reference for reference in merged.values() if reference.captions]
    if not references:
        raise InputError(f"{path}: holds no captions")
    return references


def _is_list(path: Path) -> bool:
    """Is it a list of entries, JSON or JSON lines, rather than a form that only `records` knows?"""
    if path.is_dir():
        return False
    start = _read_text(path, _HEAD_CHARACTERS).lstrip()
    if start.startswith("{"):
        first = start.split("\n", 1)[0]
        try:
            return not {"images", "annotations"} & json.loads(first).keys()
        except (ValueError, RecursionError):
            return False
    return start.startswith("[") and '"sentences"' not in start


def _listed_references(path: Path) -> Iterator[Reference]:
    for source, entry in _entries(path, '[{"image_id": .., "captions": ["..", ..]}, ..]'):
        image_id, name = _identity(entry, ("image_id", "id"), _NAME_KEYS, source)
        captions = entry["captions"] if "captions" in entry else [entry.get("caption")]
        if not isinstance(captions, list):
            raise InputError(f"{source}: captions is {_short(captions)}", expected="a list of sentences")
        where = "captions[{}]" if "captions" in entry else "caption"
        sentences = [_caption(caption, f"{source}: {where.format(i)}") for i, caption in enumerate(captions)]
        yield Reference(image_id, name, sentences)


def _described_references(path: Path) -> Iterator[Reference]:
    for record in read_records(path):
        image_id = _whole(record.id) if isinstance(record.id, str) else record.id
        yield Reference(image_id, _whole(record.file_path), [_whole(caption) for caption in record.captions])


def _read_text(path: Path, size: int = -1) -> str:
    try:
        with path.open(encoding="utf-8-sig") as stream:
            return stream.read(size)
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror or error})") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: is not UTF-8 text") from error


def _entries(path: Path, expected: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """The entries of a JSON list, of JSON lines or of a CSV table, each with where it stands."""
    text = _read_text(path)
    start = text.lstrip()
    if not start:
        raise InputError(f"{path}: is empty", expected=expected)
    if start[0] not in "[{":
        yield from _table(path, text, expected)
        return
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        if start[0] == "{" and "\n" in start.strip():
            yield from _json_lines(path, text, expected)
            return
        line = error.lineno if isinstance(error, json.JSONDecodeError) else 1
        raise _no_json(f"{path}: line {line}", error, expected) from None
    if isinstance(value, dict):
        if not {"image_id", "id", *_NAME_KEYS} & value.keys():
            raise InputError(f"{path}: is an object with {_short(sorted(value))}", expected=expected)
        value = [value]
    for index, entry in enumerate(value):
        yield _checked(entry, f"{path}: entry {index}", expected)


def _json_lines(path: Path, text: str, expected: str) -> Iterator[tuple[str, dict[str, Any]]]:
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            try:
                entry = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise _no_json(f"{path}: line {number}", error, expected) from None
            yield _checked(entry, f"{path}: line {number}", expected)


def _no_json(source: str, error: ValueError | RecursionError, expected: str) -> InputError:
    # Besides bad syntax: numbers of thousands of digits, and lists nested thousands deep.
    return InputError(f"{source} is not JSON ({getattr(error, 'msg', error)})", expected=expected)


def _table(path: Path, text: str, expected: str) -> Iterator[tuple[str, dict[str, Any]]]:
    rows = csv.DictReader(io.StringIO(text, newline=""), strict=True, restval="")
    try:
        columns = rows.fieldnames or []
        if "caption" not in columns or not {"image_id", "id", *_PREDICTION_NAME_KEYS} & set(columns):
            form = f"{expected}, or CSV with these columns"
            raise InputError(f"{path}: begins with {_short(text[:40])}", expected=form)
        for row in rows:
            # An empty cell is a missing value, but for the caption.
            entry = {key: value for key, value in row.items() if key and (value or key == "caption")}
            yield f"{path}: line {rows.line_num}", entry
    except csv.Error as error:
        raise InputError(f"{path}: line {rows.line_num} is not a proper table row ({error})") from None


def _checked(entry: object, source: str, expected: str) -> tuple[str, dict[str, Any]]:
    if not isinstance(entry, dict):
        raise InputError(f"{source} is {_short(entry)}", expected=expected)
    return source, entry


def _identity(
    entry: dict[str, Any], id_keys: Sequence[str], name_keys: Sequence[str], source: str
) -> tuple[int | str | None, str | None]:
    image_id = next((entry[key] for key in id_keys if entry.get(key) is not None), None)
    if isinstance(image_id, float) and math.isfinite(image_id) and image_id == int(image_id):
        image_id = int(image_id)  # 5.0: tables turn whole numbers into these
    if image_id is not None and (isinstance(image_id, bool) or not isinstance(image_id, int | str)):
        raise InputError(f"{source}: image_id is {_short(image_id)}", expected="a whole number or text")
    name = next((entry[key] for key in name_keys if entry.get(key) is not None), None)
    if name is not None and not isinstance(name, str):
        raise InputError(f"{source}: file_name is {_short(name)}", expected="text")
    if image_id is None and not name:
        raise InputError(f"{source}: has neither image_id nor file_name (its keys: {', '.join(map(str, entry))})")
    return _whole(image_id) if isinstance(image_id, str) else image_id, _whole(name) if name else None


def _caption(value: object, source: str) -> str:
    if not isinstance(value, str):
        problem = "is missing" if value is None else f"is {_short(value)}"
        raise InputError(f"{source} {problem}", expected='text (an empty caption is "")')
    return _whole(value)


def _whole(text: str) -> str:
    r"""Replace half characters (JSON's "\ud83d" alone), which no output can carry."""
    return text if text.isascii() else text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _short(value: object) -> str:
    text = "NaN" if isinstance(value, float) and math.isnan(value) else repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


# Joining. 5 and "5" are one id; a\b.jpg and ./a/b.jpg are one name.

_Key = Callable[[Prediction | Reference], str | None]


def _by_id(row: Prediction | Reference) -> str | None:
    return None if row.image_id is None else str(row.image_id).strip()


def _by_name(row: Prediction | Reference) -> str | None:
    name = row.name or (row.image_id if isinstance(row.image_id, str) else None)
    return str(PurePosixPath(name.replace("\\", "/"))) if name else None


def _by_last_name(row: Prediction | Reference) -> str | None:
    name = _by_name(row)
    return PurePosixPath(name).name if name else None


_KEYS: tuple[tuple[str, _Key], ...] = (
    ("file name", _by_name),
    ("file name without folder", _by_last_name),
    ("image id", _by_id),
)


def join(predictions: Sequence[Prediction], references: Sequence[Reference]) -> Joined:
    """Join by file name, by file name without its folder or by image id: by whichever matches most images.

    With equal counts the names win, because ids that count the pictures of a folder fit some of any numbered set by
    accident. Ids that fit less than half of the predictions, while all names disagree, are taken for such an accident.

    Raises:
        InputError: no image has both, or two different captions claim the same image.
    """
    tries = [(by, key, _match(predictions, references, key)) for by, key in _KEYS]
    by, key, places = max(tries, key=lambda found: len({place for place in found[2] if place is not None}))
    pairs: dict[int, Pair] = {}
    unmatched = []
    num_repeated = 0
    for prediction, place in zip(predictions, places, strict=True):
        if place is None:
            unmatched.append(prediction)
        elif place not in pairs:
            pairs[place] = prediction, references[place]
        elif pairs[place][0].caption == prediction.caption:
            num_repeated += 1
        else:
            raise InputError(
                f"{prediction.source}: a second, different caption for image {prediction.label}"
                f" (the first: {pairs[place][0].source.rsplit(': ', 1)[-1]})",
                expected="one caption per image",
            )
    if not pairs or (key is _by_id and 2 * len(pairs) < len(predictions) and all(map(_names_differ, pairs.values()))):
        raise InputError(
            "no prediction belongs to any reference: the first prediction is of "
            f"{_both(predictions[0])}, the first reference of {_both(references[0])}",
            expected="the same image_id or file_name on both sides",
        )
    left_over = [reference for place, reference in enumerate(references) if place not in pairs]
    return Joined(list(pairs.values()), by, unmatched, left_over, num_repeated)


def _match(predictions: Sequence[Prediction], references: Sequence[Reference], key: _Key) -> list[int | None]:
    """The place of each prediction's reference; a key that two references share leads nowhere."""
    places: dict[str | None, int | None] = {}
    for place, reference in enumerate(references):
        name = key(reference)
        places[name] = None if name in places else place
    places.pop(None, None)
    return [places.get(key(prediction)) for prediction in predictions]


def _names_differ(pair: Pair) -> bool:
    first, second = _by_last_name(pair[0]), _by_last_name(pair[1])
    return bool(pair[0].name and first and second and first != second)


def _both(row: Prediction | Reference) -> str:
    parts = [f"image_id {row.image_id!r}"] if row.image_id is not None else []
    return " with ".join([*parts, *([f"file_name {row.name!r}"] if row.name else [])])
