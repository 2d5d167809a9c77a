"""Captions → words, and words → captions, by three rules; the rule's name travels with a vocabulary.

ascii    the original's prepro.py: lower case, ASCII punctuation removed (not replaced: "t-shirt" is "tshirt"), split
         on white space
unicode  for any language: NFKC, case folded, every character of the Unicode categories P* and S* separates words (but
         an apostrophe inside a word is dropped: "don't" is "dont"), combining marks stay with their letter, and each
         character of a script without spaces (Han, Kana, Thai, ..) is a word
ptb      as scores read captions: lower case, contractions split as in the Penn Treebank ("do n't", "man 's"),
         punctuation dropped, but not within a word ("t-shirt")

coco-caption's scores are defined on the output of the Stanford PTB tokeniser, a Java program (`captioner.metrics.java`
runs it). `ptb` needs no Java and follows the same conventions; on COCO val2017 it differs for 14 of the 25,014
captions, on purpose:
  - a symbol that is no word is dropped: `&`, `#`, `/` and brackets (the Java program turns brackets into `-lrb-`, which
    coco-caption means to remove but does not, because the program lower-cases them first);
  - it knows fewer abbreviations, so `w. centre` loses its full stop;
  - `22 3/4` is two words everywhere (the Java program joins them by a no-break space).
Scripts without spaces are split into characters as by `unicode`; the Java program takes a whole sentence for one word.
"""

import functools
import re
import string
import unicodedata
from collections.abc import Sequence

TOKENIZERS = ("ascii", "unicode", "ptb")

_NO_ASCII_PUNCTUATION = str.maketrans("", "", string.punctuation)

# Scripts written without spaces between words: each character becomes a token of its own.
# First and last code point of each block (The Unicode Standard, Blocks.txt).
_UNSPACED_BLOCKS = (
    (0x0E00, 0x0EFF),  # Thai, Lao
    (0x1000, 0x109F),  # Myanmar
    (0x1780, 0x17FF),  # Khmer
    (0x3005, 0x3007),  # ideographic iteration mark, closing mark, zero
    (0x3040, 0x30FF),  # Hiragana, Katakana
    (0x31F0, 0x31FF),  # Katakana extensions
    (0x3400, 0x4DBF),  # Han, extension A
    (0x4E00, 0x9FFF),  # Han
    (0xF900, 0xFAFF),  # Han, compatibility
    (0x20000, 0x3FFFF),  # Han, further extensions
)

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
_SPLIT_OFF = re.compile(r"(?<!\S)([^\s']+) (n't|'(?:s|m|d|ll|re|ve))(?!\S)")


def tokenise(caption: str, tokenizer: str = "ascii") -> list[str]:
    """Split a caption into words by one of the rules above (`Vocab` makes sure that its rule is one of them)."""
    if tokenizer == "ascii":
        return caption.lower().translate(_NO_ASCII_PUNCTUATION).split()
    if tokenizer == "unicode":
        return _tokenise_unicode(caption)
    assert tokenizer == "ptb", tokenizer
    return [word for raw in caption.lower().split() for word in _ptb_words(raw)]


def joined(words: Sequence[str], tokenizer: str) -> str:
    """Words as a caption to read: with one space between them, but `ptb`'s "man 's" and "do n't" are "man's", "don't".

    The same rule splits it into the same words again.
    """
    text = " ".join(words)
    return _SPLIT_OFF.sub(r"\1\2", text) if tokenizer == "ptb" and "'" in text else text


def _tokenise_unicode(caption: str) -> list[str]:
    # Folding can undo the normal form ("ŉ" becomes two characters), hence the second pass.
    text = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", caption).casefold())
    pieces: list[str] = []
    unspaced = False  # does the last piece belong to a script without spaces?
    for character in text:
        category = unicodedata.category(character)
        if character in "'’" or category == "Cf":
            continue  # an apostrophe, or an invisible joiner
        if category[0] in "PSZC":
            pieces.append(" ")
            unspaced = False
        elif category[0] == "M":
            pieces.append(character)
        elif any(first <= ord(character) <= last for first, last in _UNSPACED_BLOCKS):
            pieces.append(" " + character)
            unspaced = True
        else:
            pieces.append(" " + character if unspaced else character)
            unspaced = False
    return "".join(pieces).split()


@functools.lru_cache(2**16)  # captions repeat few words: each is analysed once
def _ptb_words(raw: str) -> tuple[str, ...]:
    """What stands between two white spaces, in lower case → its words."""
    plain = unicodedata.normalize("NFC", raw).translate(_PLAIN_QUOTES)
    words: list[str] = []
    for match in _WORD.finditer(plain):
        with_stop = plain[match.start() : match.end() + 1]
        if with_stop in _ABBREVIATIONS:
            words.append(with_stop)
        elif max(match[0]) >= _FIRST_UNSPACED:
            words += _tokenise_unicode(match[0])
        else:
            words += _split_clitics(match[0])
    return tuple(words)


def _split_clitics(token: str) -> tuple[str, ...]:
    if token in _SPLIT_WORDS:
        return _SPLIT_WORDS[token]
    match = _CLITIC.match(token)
    return (match[1], match[2]) if match else (token,)
