"""From records as they were found to records fit for a dataset: joined, tokenised, split, counted."""

import random
from array import array
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from captioner.data.caption_file import CaptionFile
from captioner.data.records import SPLITS, Record
from captioner.data.vocabulary import Vocab, tokenise
from captioner.errors import InputError

_THRESHOLDS = (0, 1, 2, 3, 5, 10, 20)
_NUM_TOP_WORDS = 20


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


def curate(
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


def assign_splits(pictures: Sequence[Picture], num_val: int, num_test: int, seed: int) -> list[str]:
    """The split of each picture: its own, else shuffled with the seed num_val, then num_test, the rest train.

    Raises:
        InputError: there are fewer pictures than asked for.
    """
    if pictures and pictures[0].split is not None:
        return [picture.split or "train" for picture in pictures]
    if num_val + num_test > len(pictures):
        raise InputError(
            f"--num_val {num_val} and --num_test {num_test} ask for {num_val + num_test} images,"
            f" but there are {len(pictures)}",
            remedy="ask for fewer",
        )
    order = list(range(len(pictures)))
    random.Random(seed).shuffle(order)
    splits = ["train"] * len(pictures)
    for place, index in enumerate(order[: num_val + num_test]):
        splits[index] = "val" if place < num_val else "test"
    return splits


def count_words(captions: Iterable[Sequence[Sequence[str]]]) -> Counter[str]:
    """How often each word occurs in all captions."""
    return Counter(token for of_image in captions for tokens in of_image for token in tokens)


def statistics(
    captions: Iterable[Sequence[Sequence[str]]],
    splits: Sequence[str],
    counts: Mapping[str, int],
    vocab: Vocab,
    max_length: int,
) -> dict[str, Any]:
    """Figures about the captions, for people and for the json; shares are fractions of all words."""
    lengths = Counter(len(tokens) for of_image in captions for tokens in of_image)
    num_captions = sum(lengths.values())
    total = sum(counts.values())
    return {
        "images": {split: splits.count(split) for split in SPLITS},
        "captions": num_captions,
        "words": total,
        "distinct_words": len(counts),
        "vocabulary": vocab.size,
        "unk_share": _share(sum(count for word, count in counts.items() if word not in vocab), total),
        "unk_share_at_threshold": {
            str(threshold): _share(sum(count for count in counts.values() if count <= threshold), total)
            for threshold in _THRESHOLDS
        },
        "vocabulary_at_threshold": {
            str(threshold): sum(count > threshold for count in counts.values()) for threshold in _THRESHOLDS
        },
        "top_words": [
            [word, count]
            for word, count in sorted(counts.items(), key=lambda item: (-item[1], item[0]))[:_NUM_TOP_WORDS]
        ],
        "caption_lengths": {str(length): lengths[length] for length in sorted(lengths)},
        "captions_cut": sum(number for length, number in lengths.items() if length > max_length),
        "mean_length": round(total / max(1, num_captions), 2),
    }


def describe(statistics: Mapping[str, Any], max_length: int) -> str:
    """The statistics as text to read."""
    figures = statistics
    images = ", ".join(f"{number:,} {split}" for split, number in figures["images"].items() if number)
    lines = [
        f"images      {sum(figures['images'].values()):,} ({images})",
        f"captions    {figures['captions']:,}, {figures['mean_length']} words on average;"
        f" {figures['captions_cut']:,} longer than {max_length} were cut",
        f"vocabulary  {figures['vocabulary']:,} of {figures['distinct_words']:,} words;"
        f" UNK stands for {figures['unk_share']:.2%} of all words",
        "top words   " + ", ".join(f"{word} {count:,}" for word, count in figures["top_words"][:10]),
        "lengths",
    ]
    lengths = {int(length): number for length, number in figures["caption_lengths"].items()}
    most = max(lengths.values(), default=1)
    shown = {length: number for length, number in lengths.items() if length <= 2 * max_length}
    for length, number in shown.items():
        bar = "#" * round(40 * number / most)
        lines.append(f"  {length:3d} words  {number:8,} {number / figures['captions']:6.1%}  {bar}".rstrip())
    rest = sum(lengths.values()) - sum(shown.values())
    if rest:
        lines.append(f"  longer     {rest:8,} {rest / figures['captions']:6.1%}  (up to {max(lengths)} words)")
    return "\n".join(lines)


def _share(part: int, total: int) -> float:
    return round(part / total, 6) if total else 0.0
