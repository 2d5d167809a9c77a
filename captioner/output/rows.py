"""The rows of result files and of the page's vis.json: one schema for everything that is written about a caption.

The first two keys of a row are the original's; `logprob` is always a natural logarithm.
"""

import base64
import math
from collections.abc import Sequence
from typing import TypedDict

from captioner.inference.caption import Caption, Likelihood


class _RequiredOfWordRow(TypedDict):
    word: str
    logprob: float | None


class WordRow(_RequiredOfWordRow, total=False):
    """A word of a caption; `logprob` is null for a word that the model can never say.

    `heat`, where asked for, says where the model looked: base64 of 7×7 or 14×14 bytes (see `captioner.Caption`).
    """

    heat: str


class RankedRow(TypedDict):
    """One of the n best captions of an image."""

    caption: str
    logprob: float
    confidence: float
    words: list[WordRow]


class PictureRow(TypedDict, total=False):
    """The part of a `CaptionRow` that is about the page's copy of the picture; `image` is "" where there is none."""

    image: str
    width: int
    height: int


class _RequiredOfCaptionRow(TypedDict):
    image_id: int | str
    caption: str
    logprob: float
    confidence: float
    words: list[WordRow]
    file_name: str


class CaptionRow(_RequiredOfCaptionRow, total=False):
    """What caption-eval writes about one image; see `captioner.Caption` for the values.

    `n_best` has all captions, best first, where more than one was asked for; `abstained` is there (true) where the
    caption was withheld; `image` is the path of the page's copy of the picture, relative to its folder, and `width` and
    `height` are that copy's, in pixels; `modified` is when the file was last changed (seconds since 1970), where a
    folder is watched; `arithmetic` is what the network was computed with.
    """

    arithmetic: str
    abstained: bool
    n_best: list[RankedRow]
    image: str
    width: int
    height: int
    modified: float


class LikelihoodRow(TypedDict):
    """What caption-score writes about one given caption; `rank` 1 is the likeliest of its image.

    What is impossible has the logprob null, for JSON knows no infinity.
    """

    image_id: int | str | None
    file_name: str | None
    caption: str
    logprob: float | None
    confidence: float
    gain: float | None
    rank: int
    words: list[WordRow]
    unknown_words: list[str]


def caption_row(caption: Caption) -> CaptionRow:
    """The row of one image."""
    words = _word_rows(caption.words)
    for word, heat in zip(words, caption.heat, strict=False):
        word["heat"] = base64.b64encode(heat).decode()
    row = CaptionRow(
        image_id=caption.image_id,
        caption=caption.text,
        logprob=caption.logprob,
        confidence=caption.confidence,
        words=words,
        file_name=caption.file_name,
    )
    if caption.arithmetic:
        row["arithmetic"] = caption.arithmetic
    if caption.abstained:
        row["abstained"] = True
    if caption.alternatives:
        row["n_best"] = [_ranked(caption), *map(_ranked, caption.alternatives)]
    return row


def likelihood_rows(
    image_id: int | str | None, file_name: str | None, captions: Sequence[str], judged: Sequence[Likelihood]
) -> list[LikelihoodRow]:
    """One row per given caption of an image."""
    ranking = sorted(range(len(judged)), key=lambda i: -judged[i].logprob)
    return [
        LikelihoodRow(
            image_id=image_id,
            file_name=file_name,
            caption=caption,
            logprob=_finite(found.logprob),
            confidence=found.confidence,
            gain=found.gain,
            rank=ranking.index(i) + 1,
            words=_word_rows(list(zip(found.words, found.word_logprobs, strict=False))),
            unknown_words=list(found.unknown),
        )
        for i, (caption, found) in enumerate(zip(captions, judged, strict=True))
    ]


def _ranked(caption: Caption) -> RankedRow:
    words = _word_rows(caption.words)
    text = " ".join(word["word"] for word in words)  # a withheld caption is among the n best all the same
    return RankedRow(caption=text, logprob=caption.logprob, confidence=caption.confidence, words=words)


def _word_rows(words: Sequence[tuple[str, float]]) -> list[WordRow]:
    return [WordRow(word=word, logprob=_finite(logprob)) for word, logprob in words]


def _finite(logprob: float) -> float | None:
    return logprob if math.isfinite(logprob) else None
