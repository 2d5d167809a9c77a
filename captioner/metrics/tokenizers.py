"""Captions → the words that scores compare: one string per caption, words separated by single blanks.

coco-caption's scores are defined on the output of the Stanford PTB tokeniser, a Java program (`captioner.metrics.java`
runs it). The tokeniser here needs no Java and follows the same conventions; on COCO val2017 it differs for 14 of the
25,014 captions, on purpose:
  - a symbol that is no word is dropped: `&`, `#`, `/` and brackets (the Java program turns brackets into `-lrb-`, which
    coco-caption means to remove but does not, because the program lower-cases them first);
  - it knows fewer abbreviations, so `w. centre` loses its full stop;
  - `22 3/4` is two words everywhere (the Java program joins them by a no-break space).
Scripts without spaces (Han, Kana, Thai, ..) are split into characters, as models prepared with the tokeniser `unicode`
of `captioner.data.vocabulary` write them; the Java program takes a whole sentence for one word.
"""

import re
import unicodedata
from collections.abc import Sequence

from captioner.data.vocabulary import tokenise

# Written with a full stop that belongs to the word; forms such as u.s. are recognised by their shape.
_ABBREVIATIONS = frozenset(
    "st. ave. blvd. rd. mr. mrs. ms. dr. prof. jr. sr. ft. mt. co. corp. inc. ltd. vs. etc. "
    "gen. sgt. lt. capt. col. gov. sen. rep. rev. jan. feb. aug. sept. oct. nov. dec.".split()
)
# Words the Treebank splits although nothing in their spelling says so.
_SPLIT_WORDS = {
    "cannot": ("can", "not"),
    "gonna": ("gon", "na"),
    "gotta": ("got", "ta"),
    "wanna": ("wan", "na"),
    "gimme": ("gim", "me"),
    "lemme": ("lem", "me"),
}
_PLAIN_QUOTES = str.maketrans("‘’‛′`“”„″", "'''''\"\"\"\"")
# A word character is everything but white space and punctuation. (`\w` would break Hindi or Thai at every vowel sign.)
_CHARACTER = (
    r"[^\s!-/:-@\[-^`{-~\u00a1-\u00a9\u00ab-\u00b1\u00b4-\u00b8\u00bb-\u00bf\u060c\u061b\u061f\u0964\u0965"
    r"\u2010-\u2027\u2030-\u205e\u3000-\u3003\u3008-\u301f\uff01-\uff0f\uff1a-\uff20\uff3b-\uff40\uff5b-\uff65]"
)
_WORD = re.compile(
    rf"""
      (?:[a-z]\.){{2,}}(?!{_CHARACTER})                   # u.s.  t.v.
    | \d+(?:[.,:/]\d+)+                                   # 12:43  1,000  3/4
    | '\d\ds(?!{_CHARACTER})                              # '70s
    | {_CHARACTER}+(?:[-./&@+']{_CHARACTER}+)*            # t-shirt  black/white  don't
    | '(?:s|m|d|ll|re|ve)(?!{_CHARACTER})                 # 's standing alone
    """,
    re.VERBOSE,
)
_FIRST_UNSPACED = "\u0e00"  # Thai; no script before it is written without spaces
_CLITIC = re.compile(r"(.+?)(n't|'(?:s|m|d|ll|re|ve))$")


class _WordTable(dict[str, str]):
    """What stands between two white spaces → its tokens. Captions repeat few words: each is analysed once."""

    def __missing__(self, raw: str) -> str:
        plain = unicodedata.normalize("NFC", raw).translate(_PLAIN_QUOTES)
        tokens: list[str] = []
        for match in _WORD.finditer(plain):
            with_stop = plain[match.start() : match.end() + 1]
            if with_stop in _ABBREVIATIONS:
                tokens.append(with_stop)
            elif max(match[0]) >= _FIRST_UNSPACED:
                tokens += tokenise(match[0], "unicode")
            else:
                tokens += _split_clitics(match[0])
        self[raw] = joined = " ".join(tokens)
        return joined


def _split_clitics(token: str) -> tuple[str, ...]:
    if token in _SPLIT_WORDS:
        return _SPLIT_WORDS[token]
    match = _CLITIC.match(token)
    return (match[1], match[2]) if match else (token,)


def tokenise_python(captions: Sequence[str]) -> list[str]:
    """Lower case, contractions split as in the Penn Treebank (`do n't`, `man 's`), punctuation dropped."""
    table = _WordTable()
    return [" ".join(filter(None, map(table.__getitem__, caption.lower().split()))) for caption in captions]
