"""From records as they were found to records fit for a dataset: joined, tokenised, split, counted."""

import random
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from captioner.errors import InputError
from captioner.rawdata import SPLITS, Record
from captioner.text import Vocab, tokenise

_THRESHOLDS = (0, 1, 2, 3, 5, 10, 20)
_NUM_TOP_WORDS = 20


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


def curate(records: Sequence[Record], tokenizer: str) -> tuple[list[Record], list[list[tuple[str, ...]]], Findings]:
    """Join records of one file, drop captions without words and pictures without captions.

    Returns:
        The records kept, the words of each of their captions, and what was found.

    Raises:
        InputError: one file is in two splits.
    """
    findings = Findings()
    kept: list[Record] = []
    captions: list[list[tuple[str, ...]]] = []
    ids: set[int | str] = set()
    for record in _joined(records, findings):
        words = [[sys.intern(token) for token in tokenise(caption, tokenizer)] for caption in record.captions]
        findings.empty_captions += [record.file_path] * words.count([])
        if not any(words):
            findings.without_captions.append(record.file_path)
            continue
        image_id = record.id
        if image_id is not None:
            if image_id in ids:
                findings.duplicate_ids.append(record.file_path)
                image_id = None
            else:
                ids.add(image_id)
        if image_id != record.id or not all(words):  # else the record stays as it is, and is not there twice
            written = [caption for caption, tokens in zip(record.captions, words, strict=True) if tokens]
            record = replace(record, captions=written, id=image_id)
        kept.append(record)
        captions.append([tuple(tokens) for tokens in words if tokens])
    return kept, captions, findings


def _joined(records: Sequence[Record], findings: Findings) -> list[Record]:
    by_path: dict[str, Record] = {}
    for record in records:
        first = by_path.setdefault(record.file_path, record)
        if first is record:
            continue
        findings.same_file_twice.append(record.file_path)
        if first.split != record.split:
            raise InputError(
                f"{record.file_path} is in the split {first.split!r} and in {record.split!r}",
                remedy="leave it in one of them",
            )
        by_path[record.file_path] = replace(first, captions=first.captions + record.captions)
    return list(by_path.values())


def assign_splits(records: Sequence[Record], num_val: int, num_test: int, seed: int) -> list[str]:
    """The split of each record: its own, else shuffled with the seed num_val, then num_test, the rest train.

    Raises:
        InputError: there are fewer records than asked for.
    """
    if records and records[0].split is not None:
        return [record.split or "train" for record in records]
    if num_val + num_test > len(records):
        raise InputError(
            f"--num_val {num_val} and --num_test {num_test} ask for {num_val + num_test} images,"
            f" but there are {len(records)}",
            remedy="ask for fewer",
        )
    order = list(range(len(records)))
    random.Random(seed).shuffle(order)
    splits = ["train"] * len(records)
    for place, index in enumerate(order[: num_val + num_test]):
        splits[index] = "val" if place < num_val else "test"
    return splits


def count_words(captions: Sequence[Sequence[Sequence[str]]]) -> Counter[str]:
    """How often each word occurs in all captions."""
    return Counter(token for of_image in captions for tokens in of_image for token in tokens)


def statistics(
    captions: Sequence[Sequence[Sequence[str]]],
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
