"""From records as they were found to records fit for a dataset: joined, and without empty captions and repeated ids."""

from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from captioner.data.caption_file import CaptionFile
from captioner.data.records import Record
from captioner.data.tokenizers import tokenise
from captioner.errors import InputError


@dataclass(frozen=True, slots=True)
class Picture:
    """What stays in memory of a record: all but its captions."""

    file_path: str
    id: int | str | None
    split: str | None


@dataclass
class Findings:
    """What was odd about the records; each entry names a picture by its file path."""

    same_file_twice: list[str] = field(default_factory=list)  # joined with the first
    duplicate_ids: list[str] = field(default_factory=list)  # kept without their id
    empty_captions: list[str] = field(default_factory=list)  # once per caption left out
    without_captions: list[str] = field(default_factory=list)  # left out

    def lines(self) -> list[str]:
        """One line for each kind of finding that occurred, with its count and the first name."""
        texts = {
            "same_file_twice": "named more than once; their captions were joined",
            "duplicate_ids": "with the id of another picture; they keep their place, but no id",
            "empty_captions": "captions without a word, left out",
            "without_captions": "pictures without a caption, left out",
        }
        return [
            f"{len(names):,} {'pictures ' if not text.startswith(('captions', 'pictures')) else ''}{text}"
            f" (first: {names[0]})"
            for kind, text in texts.items()
            if (names := getattr(self, kind))
        ]


def clean_records(
    records: Iterable[Record], tokenizer: str, folder: Path | None = None
) -> tuple[list[Picture], CaptionFile, Findings]:
    """Join records of one file, drop captions without words and pictures without captions.

    Args:
        folder: where captions are kept meanwhile (see CaptionFile).

    Returns:
        The pictures kept, the captions of each of them, and what was found.

    Raises:
        InputError: one file is in two splits.
    """
    findings = Findings()
    written = CaptionFile(folder)
    pictures, places, more = _joined(records, findings, written)
    kept: list[Picture] = []
    captions = CaptionFile(folder)
    ids: set[int | str] = set()
    for number, picture in enumerate(pictures):
        of_picture = [caption for place in (places[number], *more.get(number, ())) for caption in written[place]]
        with_words = [caption for caption in of_picture if tokenise(caption, tokenizer)]
        findings.empty_captions += [picture.file_path] * (len(of_picture) - len(with_words))
        if not with_words:
            findings.without_captions.append(picture.file_path)
            continue
        if picture.id is not None and picture.id in ids:
            findings.duplicate_ids.append(picture.file_path)
            picture = replace(picture, id=None)
        elif picture.id is not None:
            ids.add(picture.id)
        kept.append(picture)
        captions.append(with_words)
    written.close()
    return kept, captions, findings


def _joined(
    records: Iterable[Record], findings: Findings, written: CaptionFile
) -> tuple[list[Picture], Sequence[int], dict[int, list[int]]]:
    """One picture for each file, where in `written` its captions are, and where more of them are by picture."""
    pictures: list[Picture] = []
    places = array("q")
    more: dict[int, list[int]] = {}
    number_of: dict[str, int] = {}
    for place, record in enumerate(records):
        written.append(record.captions)
        number = number_of.setdefault(record.file_path, len(pictures))
        if number == len(pictures):
            pictures.append(Picture(record.file_path, record.id, record.split))
            places.append(place)
            continue
        findings.same_file_twice.append(record.file_path)
        first = pictures[number]
        if first.split != record.split:
            raise InputError(
                f"{record.file_path} is in the split {first.split!r} and in {record.split!r}",
                remedy="leave it in one of them",
            )
        more.setdefault(number, []).append(place)
    return pictures, places, more
