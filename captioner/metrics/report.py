"""Scores for people (lines of a table) and for programs (what goes into JSON)."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from captioner.metrics.pairing import Joined, Pair
from captioner.metrics.scorer import Scores
from captioner.metrics.significance import CONFIDENCE, Comparison

_SHOWN = 5  # unmatched images named on the terminal; the JSON lists all
_WORST_BY = ("CIDEr", "METEOR", "ROUGE_L", "Bleu_4", "SPICE")  # the first of them that was computed


def unmatched_lines(joined: Joined, predictions: str, references: str) -> list[str]:
    """What was left out, by name; `predictions` and `references` are the files' names."""
    lines = []
    for rows, file, lacks in (
        (joined.unmatched_predictions, predictions, "have no references"),
        (joined.unmatched_references, references, "have no prediction"),
    ):
        if rows:
            names = ", ".join(row.label for row in rows[:_SHOWN]) + (", …" if len(rows) > _SHOWN else "")
            lines.append(f"{file}: {len(rows):,} of {len(rows) + len(joined.pairs):,} images {lacks}: {names}")
    if joined.num_repeated:
        lines.append(f"{predictions}: {joined.num_repeated:,} entries only repeat an earlier one")
    return lines


def score_lines(scores: Scores, intervals: Mapping[str, tuple[float, float]]) -> list[str]:
    """The table of corpus scores with their intervals, then what was skipped and why."""
    lines = [f"{'':9} score    {CONFIDENCE:.0%} interval"]
    for name, value in scores.corpus.items():
        low, high = intervals[name]
        lines.append(f"{name:8} {value:.4f}   {low:.4f} to {high:.4f}")
    lines += [f"{name:8} skipped because {reason}" for name, reason in scores.skipped.items()]
    return lines + [f"note: {note}" for note in scores.notes]


def comparison_lines(other: Scores, comparisons: Mapping[str, Comparison]) -> list[str]:
    """The table of differences to another system."""
    lines = [f"{'':9} other    difference   {CONFIDENCE:.0%} interval        p"]
    for name, found in comparisons.items():
        interval = f"{found.low:+.4f} to {found.high:+.4f}"
        lines.append(f"{name:8} {other.corpus[name]:.4f}   {found.difference:+.4f}      {interval}   {found.p:.4f}")
    return lines


def diversity_line(figures: Mapping[str, float]) -> str:
    """The figures of `captioner.metrics.diversity` in one line."""
    return ", ".join(f"{name.replace('_', ' ')} {value:,.4g}" for name, value in figures.items())


def per_caption_rows(pairs: Sequence[Pair], scores: Scores) -> list[dict[str, Any]]:
    """One row per prediction: image_id, file_name, caption and its scores."""
    columns = scores.per_caption
    return [
        {
            "image_id": prediction.image_id,
            "file_name": prediction.name or reference.name,
            "caption": prediction.caption,
            **{name: column[i] for name, column in columns.items()},
        }
        for i, (prediction, reference) in enumerate(pairs)
    ]


def worst_first(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows of `per_caption_rows` by rising CIDEr, or by what stands in for it."""
    by = worst_by(rows)
    assert by
    return sorted(rows, key=lambda row: row[by])


def worst_by(rows: Sequence[dict[str, Any]]) -> str | None:
    """The score by which single captions are best compared; None where there is none."""
    return next((name for name in _WORST_BY if rows and name in rows[0]), None)


def as_json(
    joined: Joined,
    scores: Scores,
    intervals: Mapping[str, tuple[float, float]],
    figures: Mapping[str, float],
) -> dict[str, Any]:
    """The scores under coco-caption's names; everything else under one key per subject."""
    return {
        **scores.corpus,
        "intervals": intervals,
        "skipped": scores.skipped,
        "notes": scores.notes,
        "diversity": figures,
        "images": {
            "scored": len(scores.tokenised),
            "joined_by": joined.by,
            "predictions_without_references": [prediction.label for prediction in joined.unmatched_predictions],
            "references_without_prediction": [reference.label for reference in joined.unmatched_references],
        },
    }


def comparison_as_json(other: Scores, comparisons: Mapping[str, Comparison]) -> dict[str, Any]:
    """What `as_json` has no place for when two systems are compared."""
    return {"scores": other.corpus, "differences": {name: asdict(found) for name, found in comparisons.items()}}


def by_image(rows: Sequence[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Rows of `per_caption_rows` keyed as coco-caption's imgToEval, by file name where there is no id."""
    return {str(row["file_name"] if row["image_id"] is None else row["image_id"]): row for row in rows}
