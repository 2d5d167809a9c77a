"""What a model says about a picture, and what it thinks of a caption that it is given."""

import math
from dataclasses import dataclass
from typing import NamedTuple


class Word(NamedTuple):
    """A word of a caption and its natural log-probability after the words before it."""

    word: str
    logprob: float


@dataclass(frozen=True)
class Caption:
    """What a model says about one picture.

    Attributes:
        text: the caption; "" if the model says nothing, or is not sure enough (`abstained`).
        logprob: natural log of p(caption | image), summed over the words and END.
        confidence: geometric mean of the probabilities of words and END, 0 to 1: comparable between lengths.
        words: of the caption, also if it was withheld.
        alternatives: further captions, best first, where more than one was asked for.
        file_name: of the picture: the path as it was given, in a folder relative to it; "" for what is in memory.
        image_id: of the picture: what a dataset says, else its number as text, from "1".
        abstained: the confidence is below the least that was asked for.
        heat: where asked for, a map per word of where the model looked: 7×7 or 14×14 uint8 row by row, over the inner
            224×224 of the picture as 256×256; 255 is the hottest cell of that word.
        arithmetic: what it was computed with: "fp32", "bf16", "int8 convolutions + bf16", ...
    """

    text: str
    logprob: float
    confidence: float
    words: tuple[Word, ...]
    alternatives: "tuple[Caption, ...]" = ()
    file_name: str = ""
    image_id: int | str = ""
    abstained: bool = False
    heat: tuple[bytes, ...] = ()
    arithmetic: str = ""

    def __str__(self) -> str:
        return self.text


@dataclass(frozen=True)
class Likelihood:
    """What the model thinks of one caption.

    Attributes:
        words: as the model reads them; a word it does not know is UNK.
        word_logprobs: natural logarithms, one per word and one for END.
        unknown: the words it does not know.
        gain: log p(caption | image) − log of its mean probability with other pictures; None without other pictures or
            if the model can never say it. Below 0 it suits others better.
    """

    words: tuple[str, ...]
    word_logprobs: tuple[float, ...]
    unknown: tuple[str, ...]
    gain: float | None = None

    @property
    def logprob(self) -> float:
        """log p(caption | image), over the words and END; −inf if it has a word that the model can never say."""
        return sum(self.word_logprobs)

    @property
    def confidence(self) -> float:
        """Geometric mean of the probabilities: comparable between lengths, in 0..1."""
        return math.exp(self.logprob / len(self.word_logprobs))
