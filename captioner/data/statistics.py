"""Figures about the captions of a dataset."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from captioner.data.records import SPLITS
from captioner.data.vocabulary import Vocab

_THRESHOLDS = (0, 1, 2, 3, 5, 10, 20)
_NUM_TOP_WORDS = 20
_MUCH_UNK = 0.1


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
        "unk_share": _fraction(sum(count for word, count in counts.items() if word not in vocab), total),
        "unk_share_at_threshold": {
            str(threshold): _fraction(sum(count for count in counts.values() if count <= threshold), total)
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


def unk_hint(statistics: Mapping[str, Any], threshold: int) -> str:
    """What to say where UNK stands for more than a tenth of all words; else nothing."""
    shares = {int(at): share for at, share in statistics["unk_share_at_threshold"].items() if int(at) < threshold}
    if statistics["unk_share"] <= _MUCH_UNK or not shares:
        return ""
    best = max((at for at, share in shares.items() if share <= _MUCH_UNK), default=0)
    return (
        f"hint        UNK stands for {statistics['unk_share']:.0%} of all words. With --word_count_threshold {best}"
        f" it would be {shares[best]:.1%}, with {statistics['vocabulary_at_threshold'][str(best)]:,} words"
    )


def _fraction(part: int, total: int) -> float:
    return round(part / total, 6) if total else 0.0
