import pytest

from captioner.data.vocabulary import Vocab
from captioner.errors import InputError


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
    with pytest.raises(InputError, match="ascii or unicode or ptb"):
        Vocab(["a"], tokenizer="klingon")
    for wrong in ({}, None, {"0": "a", "1": "b"}, {"1": "a", "3": "b"}, {"1": 5}, {"1": "a", "2": "a"}):
        with pytest.raises(InputError, match="some.json"):
            Vocab.from_ix_to_word(wrong, source="some.json")
