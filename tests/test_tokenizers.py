import string

import pytest
from hypothesis import given
from hypothesis import strategies as st

from captioner.data.tokenizers import joined, tokenise
from captioner.data.vocabulary import Vocab


def test_ascii_is_the_original_rule() -> None:
    assert tokenise("A man's T-shirt, red & blue... ") == ["a", "mans", "tshirt", "red", "blue"]
    assert tokenise("  .  !") == []


@given(st.text(alphabet=string.printable))
def test_ascii_equals_the_original_statement(caption: str) -> None:
    kept = "".join(character for character in caption.lower() if character not in string.punctuation)
    assert tokenise(caption) == kept.split()


@pytest.mark.parametrize(
    ("caption", "words"),
    [
        ("Ein großer Hund – „süß“!", ["ein", "grosser", "hund", "süß".casefold()]),
        ("L'été, c’est beau", ["lété", "cest", "beau"]),
        ("Собака бежит.", ["собака", "бежит"]),
        ("一只狗，在跑。", ["一", "只", "狗", "在", "跑"]),
        ("a 狗 runs", ["a", "狗", "runs"]),
        ("ＡＢＣ", ["abc"]),
        ("e\u0301tat", ["état"]),
        ("dog🐶cat", ["dog", "cat"]),
        ("हिन्दी भाषा", ["हिन्दी", "भाषा"]),
        ("¿Qué?", ["qué"]),
        ("zero\u200bwidth", ["zerowidth"]),
    ],
)
def test_unicode(caption: str, words: list[str]) -> None:
    assert tokenise(caption, "unicode") == words


@given(st.text())
def test_unicode_is_idempotent(caption: str) -> None:
    words = tokenise(caption, "unicode")
    assert tokenise(" ".join(words), "unicode") == words


@pytest.mark.parametrize(
    "caption, words",
    [
        ("A man's dog DOESN'T run.", "a man 's dog does n't run"),
        ("Don\u2019t stop\u2014now\u2026", "do n't stop now"),
        ("A t-shirt, black/white; 12:43 (p.m.)", "a t-shirt black/white 12:43 p.m."),
        ("the corner of St. John and 1,000 Main st", "the corner of st. john and 1,000 main st"),
        ("cannot", "can not"),
        ("  a \t b\r\nc\u2028d ", "a b c d"),
        ("...!? -- ''", ""),
        ("cafe\u0301", "caf\u00e9"),
        ("नमस्ते दुनिया।", "नमस्ते दुनिया"),
        ("一个人，在骑马。", "一 个 人 在 骑 马"),
        ("คน ride", "ค น ride"),
        ("개가 달린다", "개가 달린다"),
    ],
)
def test_ptb(caption: str, words: str) -> None:
    assert tokenise(caption, "ptb") == words.split()


@given(st.text(alphabet="abn'.s&-t 0…é", max_size=40))
def test_ptb_words_read_as_written_and_split_the_same_again(caption: str) -> None:
    words = tokenise(caption, "ptb")
    assert tokenise(joined(words, "ptb"), "ptb") == words


def test_a_vocabulary_writes_captions_by_its_rule() -> None:
    words = tokenise("The man's dog doesn't run.", "ptb")
    assert Vocab(words, "ptb").decode(range(1, 8)) == "the man's dog doesn't run"
    assert Vocab(words, "unicode").decode(range(1, 8)) == "the man 's dog does n't run"
