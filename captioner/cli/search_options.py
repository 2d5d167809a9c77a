"""The options that say how captions are searched, for all commands that caption."""

import argparse
from typing import Any

from captioner.cli.options import (
    Parser,
    exponent,
    factor,
    flag,
    non_negative,
    positive_share,
    small_size,
    temperature,
    words,
)
from captioner.inference.wording import banned_of, requirements_of


def add_search_options(p: Parser, sampling: bool = True) -> None:
    """Options that say how captions are found; `sampling`: also by chance."""
    g = p.add_argument_group("search")
    if sampling:
        g.add_argument("--sample_max", type=flag, default="1", help="1: beam search; 0: draw words at random")
        g.add_argument("--temperature", type=temperature, default=1.0, help="sampling: below 1 safer, above 1 wilder")
        g.add_argument("--top_k", type=non_negative, default=0, help="sampling: among the k likeliest words; 0 all")
        g.add_argument(
            "--top_p", type=positive_share, default=1.0, help="sampling: among the likeliest words of this probability"
        )
    g.add_argument(
        "--beam_size", type=small_size, help="beams per image; 1 is greedy (default: as the model file says, else 2)"
    )
    g.add_argument("--n_best", type=small_size, default=1, help="captions per image, best first")
    g.add_argument(
        "--length_penalty",
        type=exponent,
        help="rank by logprob / length^this; 0 by probability alone (default: as the model file says, else 0)",
    )
    g.add_argument("--min_length", type=non_negative, default=0, help="least number of words")
    g.add_argument("--max_words", type=words, help="greatest number of words (default: what the model was trained for)")
    g.add_argument(
        "--require",
        type=requirements_of,
        default=[],
        metavar="WORDS",
        help="what every caption says: words or phrases, equally good forms side by side, as in dog/dogs,beach",
    )
    g.add_argument(
        "--ban",
        type=banned_of,
        default=[],
        metavar="WORDS",
        help="what no caption says, each form of it, as in man,men",
    )
    g.add_argument("--caption_prefix", default="", metavar="TEXT", help="what every caption begins with")
    g.add_argument("--no_repeat_ngram", type=non_negative, default=0, help="no n words occur twice in a caption; 0 off")
    g.add_argument(
        "--no_immediate_repeat", type=flag, help="no word follows itself (default: as the model file says, else 0)"
    )
    g.add_argument(
        "--repeatable",
        type=several_words,
        metavar="WORDS",
        help="the only words that may occur twice in a caption, as in a,the,of; '' for no rule (default: as the model "
        "file says, else none)",
    )
    g.add_argument(
        "--bad_endings",
        type=several_words,
        metavar="WORDS",
        help="words that end no caption, as in a,the,of; '' for none (default: as the model file says, else none)",
    )
    g.add_argument("--suppress_unk", type=flag, help="never say UNK (default: as the model file says)")
    g.add_argument("--diverse_groups", type=small_size, default=1, help="groups of beams that avoid each other's words")
    g.add_argument("--diversity", type=factor, default=0.5, help="how much they avoid them, in log-probability")
    g.add_argument(
        "--rerank",
        choices=("", "consensus", "models"),
        default="",
        help="order what was found (10 beams, or --beam_size) anew: by consensus the caption first that is most like "
        "the others (expected CIDEr), by models what the first --model found by the log p of all",
    )


def several_words(text: str) -> list[str]:
    """Words between commas or spaces."""
    return text.replace(",", " ").split()


def search_keywords(opt: argparse.Namespace) -> dict[str, Any]:
    """What the options ask for, as `captioner.Model` takes it."""
    sampling = (
        {"sample": not opt.sample_max, "temperature": opt.temperature, "top_k": opt.top_k, "top_p": opt.top_p}
        if "sample_max" in opt
        else {}
    )
    return {
        **sampling,
        "beam_size": opt.beam_size,
        "n_best": opt.n_best,
        "length_penalty": opt.length_penalty,
        "min_length": opt.min_length,
        "max_words": opt.max_words,
        "require": opt.require,
        "ban": opt.ban,
        "caption_prefix": opt.caption_prefix,
        "no_repeat_ngram": opt.no_repeat_ngram,
        "no_immediate_repeat": opt.no_immediate_repeat,
        "suppress_unk": opt.suppress_unk,
        "repeatable": opt.repeatable,
        "bad_endings": opt.bad_endings,
        "diverse_groups": opt.diverse_groups,
        "diversity": opt.diversity,
        "rerank": opt.rerank,
    }
