"""What a search is asked for, and what it finds."""

import math
from dataclasses import dataclass
from typing import Literal

from captioner.errors import InputError


@dataclass(frozen=True)
class SearchOptions:
    """How to search.

    Args:
        beam_size: beams per image; 1 is greedy search.
        sample: draw words at random instead; `beam_size` is then without meaning.
        temperature: sampling divides the log-probabilities by it.
        top_k: sampling draws among the k likeliest words only; 0: all.
        top_p: sampling draws among the likeliest words that together reach this probability; 1.0: all.
        length_penalty: finished captions are ranked by logprob / length**length_penalty, length counting the
            words and END; 0.0 ranks by probability alone, 1.0 by the mean log-probability. Where it ranks, the end of
            every beam competes; without it only those that are among the best continuations of all beams, as in
            neuraltalk2.
        min_length: END is out of question before so many words, unless nothing else is left.
        max_words: END comes after so many words at the latest; 0: no rule.
        prefix: ids of the words that every caption begins with, whatever the rules below say of them.
        require: what every caption says: for each requirement the forms that meet it, each the ids of a word or of a
            phrase. Where it cannot be had otherwise, `min_length` and the rules on repetition and endings give way.
        no_repeat_ngram: no sequence of so many words occurs twice in a caption; 0: no rule.
        no_immediate_repeat: no word follows itself.
        repeatable: ids of the only words that may occur twice in a caption; (): no rule.
        suppress: ids of words that are never chosen.
        bad_endings: ids of words that end no caption, neither before END nor at the greatest length.
        n_best: captions per image, best first; there may be fewer where the vocabulary is tiny.
        rerank, kept: nothing to the search itself: by what its captions are put into another order afterwards, and how
            many of them are kept (see `inference.rerank`); "": they are returned as found.
        groups: beams are split into so many groups; each avoids the words the groups before it chose at the same
            step (diverse beam search, Vijayakumar et al. 2016).
        group_penalty: what a group subtracts from a log-probability for each such choice; 0.0: independent groups.
        keep_finished: for comparison with neuraltalk2: finished beams keep their slots and are continued.
    """

    beam_size: int = 2
    sample: bool = False
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    length_penalty: float = 0.0
    min_length: int = 0
    max_words: int = 0
    prefix: tuple[int, ...] = ()
    require: tuple[tuple[tuple[int, ...], ...], ...] = ()
    no_repeat_ngram: int = 0
    no_immediate_repeat: bool = False
    repeatable: tuple[int, ...] = ()
    suppress: tuple[int, ...] = ()
    bad_endings: tuple[int, ...] = ()
    n_best: int = 1
    rerank: Literal["", "consensus", "models"] = ""
    kept: int = 1
    groups: int = 1
    group_penalty: float = 0.5
    keep_finished: bool = False

    @property
    def every_end(self) -> bool:
        """Whether the end of every beam competes: where lengths are ranked, END may be right though it is unlikely.

        One beam is greedy search, though, and the groups of a diverse search would avoid END as others' choice.
        """
        return self.length_penalty > 0 and self.beam_size > 1 and self.groups == 1 and not self.keep_finished

    def __post_init__(self) -> None:
        for name in ("beam_size", "n_best", "groups"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} {getattr(self, name)}", expected="1 or more")
        for name in ("top_k", "length_penalty", "min_length", "max_words", "no_repeat_ngram", "group_penalty"):
            if not getattr(self, name) >= 0:
                raise InputError(f"{name} {getattr(self, name)}", expected="0 or more")
        if not self.temperature > 0:
            raise InputError(f"temperature {self.temperature}", expected="more than 0")
        if not 0 < self.top_p <= 1:
            raise InputError(f"top_p {self.top_p}", expected="more than 0, at most 1")
        if 0 < self.max_words < self.min_length:
            raise InputError(
                f"min_length {self.min_length} with max_words {self.max_words}", expected="no more than that"
            )
        if self.require and (self.sample or self.groups > 1 or self.keep_finished):
            raise InputError("required words take a plain beam search", expected="neither sampling nor groups of beams")
        if self.sample:
            return
        if self.beam_size % self.groups:
            raise InputError(
                f"groups {self.groups} does not divide beam_size {self.beam_size}",
                remedy="choose a beam_size that is a multiple of groups",
            )
        if self.n_best > self.beam_size:
            raise InputError(
                f"n_best {self.n_best} with beam_size {self.beam_size}", remedy=f"raise beam_size to {self.n_best}"
            )


@dataclass(frozen=True)
class Hypothesis:
    """One caption found by a search.

    Args:
        tokens: word ids, without END.
        word_logprobs: the model's log-probability of each word, and of END if the caption reached it.
        logprob: their sum (natural logarithm).
        finished: it ends with END; False: it was cut off at the greatest length.
    """

    tokens: tuple[int, ...]
    word_logprobs: tuple[float, ...]
    logprob: float
    finished: bool

    @property
    def confidence(self) -> float:
        """Geometric mean of the probabilities of its words and END: comparable between lengths, in 0..1."""
        return math.exp(self.logprob / max(1, len(self.word_logprobs)))
