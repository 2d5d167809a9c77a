"""How captions are searched, as people say it → `SearchOptions` of a model."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypedDict

from captioner.data.vocabulary import Vocab
from captioner.errors import InputError
from captioner.inference.wording import banned_ids, prefix_ids, require_sayable, required_ids
from captioner.model.decoding import in_force
from captioner.search import SearchOptions, require_possible

RERANK_BEAMS = 10  # to choose from, where the user does not say how many


class SearchKeywords(TypedDict, total=False):
    """How captions are searched: caption-eval's options of the same names, with the same defaults.

    What is None is as the model's file says, else the value in brackets.

    beam_size: beams per image, None (2); 1 is greedy. n_best: captions per image, 1. sample: draw words at random,
    False; then temperature (1.0), top_k (0: all), top_p (1.0). length_penalty: rank by logprob / length^this, None
    (0.0). min_length: least number of words, 0. max_words: greatest, None (what the model was trained for). require:
    words or phrases that every caption says, none; each is a text, or several that are equally good, as the forms of a
    word. ban: words that none says, none. caption_prefix: what every caption begins with, "". no_repeat_ngram: no so
    many words occur twice, 0. no_immediate_repeat: no word follows itself, None (False). repeatable: the
    only words that may occur twice in a caption, None (all). suppress_unk: never say UNK,
    None (False). bad_endings: words that end no caption, None (none). diverse_groups, diversity: groups of beams that
    avoid each other's words (1; 0.5). rerank: put what was found (10 beams, where beam_size is None) into another
    order, "" (none): by "consensus" the one first that is most like the others (by expected CIDEr); by "models" what
    the first of several models found by the log p of all.
    """

    beam_size: int | None
    n_best: int
    sample: bool
    temperature: float
    top_k: int
    top_p: float
    length_penalty: float | None
    min_length: int
    max_words: int | None
    require: str | Sequence[str | Sequence[str]]
    ban: str | Sequence[str]
    caption_prefix: str
    no_repeat_ngram: int
    no_immediate_repeat: bool | None
    repeatable: Sequence[str] | None
    suppress_unk: bool | None
    bad_endings: Sequence[str] | None
    diverse_groups: int
    diversity: float
    rerank: Literal["", "consensus", "models"]


def search_options_of(
    vocab: Vocab,
    longest: int,
    decoding: Mapping[str, Any],
    *,
    beam_size: int | None = None,
    n_best: int = 1,
    sample: bool = False,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    length_penalty: float | None = None,
    min_length: int = 0,
    max_words: int | None = None,
    require: str | Sequence[str | Sequence[str]] = (),
    ban: str | Sequence[str] = (),
    caption_prefix: str = "",
    no_repeat_ngram: int = 0,
    no_immediate_repeat: bool | None = None,
    repeatable: Sequence[str] | None = None,
    suppress_unk: bool | None = None,
    bad_endings: Sequence[str] | None = None,
    diverse_groups: int = 1,
    diversity: float = 0.5,
    rerank: Literal["", "consensus", "models"] = "",
) -> SearchOptions:
    """How to search: what is asked for, else what suits the model; see `SearchKeywords`.

    Args:
        longest: no caption of the model has more words.
        decoding: what the model's file says.

    Raises:
        InputError: a value is out of range, the model does not know a word, or no caption can say what is required.
    """
    beams = in_force("beam_size", beam_size, decoding)
    if rerank not in ("", "consensus", "models"):
        raise InputError(f"rerank {rerank!r}", expected="'consensus' or 'models'")
    if rerank and beam_size is None:
        beams = RERANK_BEAMS
    beams = n_best if 0 < beams < n_best else beams
    candidates = beams if rerank and not sample else n_best
    if rerank and candidates < 2:
        raise InputError("rerank orders more than one caption", remedy="raise n_best" if sample else "raise beam_size")
    suppress = in_force("suppress_unk", suppress_unk, decoding)
    endings = [word for word in in_force("bad_endings", bad_endings, decoding) if word in vocab]
    twice = [word for word in in_force("repeatable", repeatable, decoding) if word in vocab]
    if max_words is not None and max_words < 1:
        raise InputError(f"max_words {max_words}", expected="1 or more")
    required, banned, prefix = required_ids(require, vocab), banned_ids(ban, vocab), prefix_ids(caption_prefix, vocab)
    require_sayable(required, banned, prefix, vocab)
    unk = (vocab.unk_id,) if suppress and vocab.unk_id else ()
    options = SearchOptions(
        beam_size=beams,
        sample=sample,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        length_penalty=in_force("length_penalty", length_penalty, decoding),
        min_length=min_length,
        max_words=max_words or 0,
        prefix=prefix,
        require=required,
        no_repeat_ngram=no_repeat_ngram,
        no_immediate_repeat=bool(in_force("no_immediate_repeat", no_immediate_repeat, decoding)),
        repeatable=tuple(vocab.encode(twice, len(twice))),
        suppress=(*unk, *banned),
        bad_endings=tuple(vocab.encode(endings, len(endings))),
        n_best=candidates,
        rerank=rerank,
        kept=n_best,
        groups=diverse_groups,
        group_penalty=diversity,
    )
    require_possible(options, vocab.size, longest)
    return options
