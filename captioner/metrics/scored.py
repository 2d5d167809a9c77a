"""Predictions and references, as files or as Python values → every figure about them."""

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, Literal, Protocol, TypeAlias

from captioner.data.entries import Entry, short
from captioner.data.records import record_of
from captioner.errors import InputError
from captioner.metrics.diversity import diversity
from captioner.metrics.pairing import (
    Joined,
    Pair,
    Prediction,
    Reference,
    join,
    prediction_of,
    read_predictions,
    read_references,
    references_of,
)
from captioner.metrics.report import as_json, per_caption_rows
from captioner.metrics.scorer import METRICS, WITHOUT_JAVA, Scores, tokenise_groups
from captioner.metrics.scorer import score as score_texts
from captioner.metrics.significance import NUM_BOOTSTRAP, bootstrap_intervals


class Captioned(Protocol):
    """What a model returned: a `captioner.Caption`."""

    @property
    def text(self) -> str: ...
    @property
    def file_name(self) -> str: ...
    @property
    def image_id(self) -> int | str: ...


# The path of a file that caption-score reads; rows as such files hold them; the captions a model returned; or texts.
Predictions: TypeAlias = str | os.PathLike[str] | Iterable[Mapping[str, Any] | Captioned | str]
References: TypeAlias = str | os.PathLike[str] | Iterable[Mapping[str, Any] | Sequence[str]]


@dataclass(frozen=True)
class Scored:
    """What a set of captions is worth.

    Attributes:
        scores: of the whole set and of each caption; with what was skipped, and why.
        intervals: 95 % interval of each score of the whole set.
        diversity: how varied the captions are.
        pairs: the predictions that were scored, each with its references.
        joined: which prediction met which references, and what was left over.
    """

    scores: Scores
    intervals: dict[str, tuple[float, float]]
    diversity: dict[str, float]
    pairs: Sequence[Pair]
    joined: Joined

    @property
    def corpus(self) -> dict[str, float]:
        """Scores of the whole set under coco-caption's names: Bleu_1 .. Bleu_4, METEOR, ROUGE_L, CIDEr, SPICE."""
        return self.scores.corpus

    @property
    def per_caption(self) -> list[dict[str, Any]]:
        """One row per prediction: image_id, file_name, caption and its scores."""
        return per_caption_rows(self.pairs, self.scores)

    def as_json(self) -> dict[str, Any]:
        """What `caption-score --output` writes."""
        return as_json(self.joined, self.scores, self.intervals, self.diversity)


def score(
    predictions: Predictions,
    references: References,
    *,
    metrics: Literal["all"] | Sequence[str] = WITHOUT_JAVA,
    tokenizer: Literal["python", "ptb"] = "python",
    bootstrap: int = NUM_BOOTSTRAP,
    seed: int = 123,
) -> Scored:
    """Score captions against what people said.

    Args:
        predictions: a file that caption-score reads, rows as such files have them ({"image_id" or "file_name",
            "caption"}), captions that a model returned, or texts.
        references: a file, or rows ({"image_id", "id" or "file_path", "captions"}); for predictions that are texts a
            list of captions for each of them.
        metrics: some of Bleu, METEOR, ROUGE_L, CIDEr, SPICE, or "all"; METEOR and SPICE need Java, and are skipped
            where they cannot run.
        tokenizer: "ptb" is coco-caption's own, and needs Java.
        bootstrap: resamples for the intervals.
        seed: of the resamples.

    Raises:
        InputError: a file or row cannot be used, no prediction has references, or the tokeniser cannot run.
    """
    wanted = METRICS if metrics == "all" else tuple(metrics)
    unknown = [name for name in wanted if name not in METRICS]
    if unknown:
        raise InputError(f"metrics: {unknown[0]!r} is unknown", expected=f"some of {', '.join(METRICS)}")
    joined = join(_predictions(predictions), _references(references))
    scores = score_pairs(joined.pairs, metrics=wanted, tokenizer=tokenizer)
    return describe_scores(scores, joined.pairs, joined, tokenizer=tokenizer, bootstrap=bootstrap, seed=seed)


def score_pairs(
    pairs: Sequence[Pair],
    *,
    metrics: Sequence[str],
    tokenizer: str,
    df_references: Sequence[Sequence[str]] | None = None,
) -> Scores:
    """Scores of joined predictions; arguments as those of `captioner.metrics.scorer.score`."""
    return score_texts(
        [prediction.caption for prediction, _ in pairs],
        [reference.captions for _, reference in pairs],
        metrics=metrics,
        tokenizer=tokenizer,
        df_references=df_references,
    )


def describe_scores(
    scores: Scores,
    pairs: Sequence[Pair],
    joined: Joined,
    *,
    tokenizer: str,
    bootstrap: int,
    seed: int,
    training: Sequence[Sequence[str]] | None = None,
) -> Scored:
    """Add to the scores of some pairs how sure they are, and how varied the captions.

    Args:
        training: captions trained on, as lists; a caption that is none of them is novel.
    """
    known = chain.from_iterable(tokenise_groups(training, tokenizer)) if training else None
    intervals = bootstrap_intervals(scores.measures, num_samples=bootstrap, seed=seed)
    return Scored(scores, intervals, diversity(scores.tokenised, known), pairs, joined)


def _predictions(given: Predictions) -> list[Prediction]:
    if isinstance(given, str | os.PathLike):
        return read_predictions(Path(given))
    predictions = [prediction_of(_entry(one, number, "prediction")) for number, one in enumerate(given, start=1)]
    if not predictions:
        raise InputError("there are no captions to score")
    return predictions


def _references(given: References) -> list[Reference]:
    if isinstance(given, str | os.PathLike):
        return read_references(Path(given))
    entries = (_entry(one, number, "reference") for number, one in enumerate(given, start=1))
    return references_of(map(record_of, entries), "references")


def _entry(given: Any, number: int, what: str) -> Entry:
    """A value as an entry of a file would be; texts and lists of them are known by their number."""
    if isinstance(given, Mapping):
        fields = dict(given)
    elif isinstance(given, str) and what == "prediction":
        fields = {"image_id": number, "caption": given}
    elif isinstance(given, list | tuple) and what == "reference":
        fields = {"image_id": number, "captions": list(given)}
    elif what == "prediction" and all(hasattr(given, name) for name in ("text", "file_name", "image_id")):
        fields = {"image_id": given.image_id, "file_name": given.file_name or None, "caption": given.text}
    else:
        expected = {"prediction": "a row, a Caption or a text", "reference": "a row, or a list of captions"}
        raise InputError(f"{what} {number} is {short(given)}", expected=expected[what])
    return Entry(fields, f"{what} {number}", "entry")
