import string

import pytest
from hypothesis import given
from hypothesis import strategies as st

from captioner.data.vocabulary import Vocab, tokenise
from captioner.errors import InputError


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


def test_unknown_tokenizer() -> None:
    with pytest.raises(InputError, match="ascii or unicode"):
        tokenise("a", "klingon")


def test_vocabulary_order_and_unk() -> None:
    vocab = Vocab.build({"b": 7, "a": 7, "z": 9, "rare": 5}, threshold=5)
    assert vocab.words == ("z", "a", "b", "UNK")
    assert (vocab.size, vocab.unk_id, vocab.end_id) == (4, 4, 5)
    assert Vocab.build({"b": 7}, threshold=5).unk_id is None


def test_encode_and_decode() -> None:
    vocab = Vocab(["a", "dog", "UNK"])
    assert vocab.encode(["a", "cat", "dog"], max_length=2) == [1, 3]
    assert vocab.decode([2, 1, 0, 1]) == "dog a"
    assert vocab.decode([1, vocab.end_id, 2]) == "a"
    assert vocab.decode([]) == ""
    assert vocab.word(2) == "dog"
    with pytest.raises(KeyError):
        vocab.word(0)
    with pytest.raises(InputError, match="'cat'"):
        Vocab(["a"]).encode(["cat"], 5)


def test_ix_to_word_round_trip_and_its_mistakes() -> None:
    vocab = Vocab(["a", "b"], tokenizer="unicode")
    assert Vocab.from_ix_to_word(vocab.ix_to_word, "unicode") == vocab
    assert Vocab.from_ix_to_word(vocab.ix_to_word) != vocab
    for wrong in ({}, None, {"0": "a", "1": "b"}, {"1": "a", "3": "b"}, {"1": 5}, {"1": "a", "2": "a"}):
        with pytest.raises(InputError, match="some.json"):
            Vocab.from_ix_to_word(wrong, source="some.json")
