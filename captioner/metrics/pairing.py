"""Which prediction belongs to which references: reading both, and joining them by image id or file name.

Predictions  [{"image_id": 5, "caption": ".."}, ..] as coco-caption's result files, with "file_name" as caption-eval
             writes it, or with "file_name" alone; JSON, JSON lines, or CSV with these columns.
References   [{"image_id" | "id" | "file_path": .., "captions": [".."]}, ..] or one {"image_id", "caption"} per entry,
             JSON or JSON lines; or any description of pictures and captions that caption-prepro reads (COCO,
             Karpathy, tables, Flickr's .token, folders with text files).
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from captioner.data.entries import ID_KEYS, Entry, caption_of, id_of, read_entries, text_of, whole
from captioner.data.records import Record, known_captions
from captioner.errors import InputError

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
    predictions = [prediction_of(entry) for entry in read_entries(path)]
    if not predictions:
        raise InputError(f"{path}: holds no captions")
    return predictions


def prediction_of(entry: Entry) -> Prediction:
    """An entry as a prediction.

    Raises:
        InputError: naming the field at fault.
    """
    fields, source = entry.fields, entry.source
    image_id, name = id_of(fields, ID_KEYS, source), text_of(fields, _PREDICTION_NAME_KEYS, source)
    if image_id is None and not name:
        raise InputError(f"{source}: has neither image_id nor file_name (its keys: {', '.join(map(str, fields))})")
    caption = caption_of(fields.get("caption"), f"{source}: caption")
    return Prediction(image_id, whole(name) if name else None, caption, source)


def read_references(path: str | Path) -> list[Reference]:
    """Read known captions; images without any are left out, entries of one image are put together.

    Raises:
        InputError: naming the file, the first entry at fault and what it should be.
    """
    return references_of(known_captions(Path(path)), str(path))


def references_of(records: Iterable[Record], source: str) -> list[Reference]:
    """Records as references; `source` says where they come from.

    Raises:
        InputError: none of them has a caption.
    """
    merged: dict[tuple[int | str | None, str | None], Reference] = {}
    for record in records:
        reference = Reference(record.id, whole(record.file_path) or None, record.captions)
        known = merged.setdefault((reference.image_id, reference.name), reference)
        if known is not reference:
            known.captions.extend(reference.captions)
    references = [reference for reference in merged.values() if reference.captions]
    if not references:
        raise InputError(f"{source}: holds no captions")
    return references


def require_references(images: Iterable[Mapping[str, object]], references: Sequence[Reference]) -> None:
    """Make sure that images can be scored, before there are captions of them.

    Args:
        images: "id" and "file_path" of each, as far as it has them.

    Raises:
        InputError: no image belongs to any of the references, or two to the same one.
    """
    if not references:
        raise InputError("the images have no known captions", remedy="leave out --language_eval")
    rows = []
    for number, image in enumerate(images, start=1):
        image_id, name = str(image.get("id", number)), str(image.get("file_path") or "") or None
        # Each with a caption of its own, so that two of one reference are found out.
        rows.append(Prediction(image_id, name, str(number), name or image_id))
    if rows:
        join(rows, references)


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
