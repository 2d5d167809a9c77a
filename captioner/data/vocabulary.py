"""Words as ids."""

from collections.abc import Iterable, Mapping, Sequence

from captioner.data.tokenizers import TOKENIZERS, joined
from captioner.errors import InputError

UNK = "UNK"


def end_id_of(vocab_size: int) -> int:
    """V+1: END as a target, START as an input."""
    return vocab_size + 1


def _is_text(word: str) -> bool:
    """Half characters (JSON's "\\ud83d" alone) are none: no output can carry them."""
    return word.isascii() or not any("\ud800" <= character <= "\udfff" for character in word)


class Vocab:
    """The words a model knows. Ids are 1-based: word k is `words[k - 1]`; 0 is padding, V+1 is START and END.

    Args:
        words: V distinct words; at most one of them is "UNK", which stands for all other words.
        tokenizer: how captions were split (one of TOKENIZERS); it travels with the words.
    """

    def __init__(self, words: Sequence[str], tokenizer: str = "ascii") -> None:
        if not isinstance(tokenizer, str) or tokenizer not in TOKENIZERS:
            raise InputError(f"tokenizer {tokenizer!r} is unknown", expected=" or ".join(TOKENIZERS))
        self.words = tuple(words)
        self.tokenizer = tokenizer
        self._ids = {word: index for index, word in enumerate(self.words, start=1)}
        if len(self._ids) < len(self.words):
            twice = next(word for index, word in enumerate(self.words, start=1) if self._ids[word] != index)
            raise InputError(f"the vocabulary holds the word {twice!r} twice")
        self.unk_id = self._ids.get(UNK)

    @classmethod
    def build(cls, token_counts: Mapping[str, int], threshold: int, tokenizer: str = "ascii") -> "Vocab":
        """Words seen more than `threshold` times, by falling count, then by word; UNK last, only if needed."""
        kept = [word for word, count in token_counts.items() if count > threshold]
        kept.sort(key=lambda word: (-token_counts[word], word))
        if len(kept) < len(token_counts):
            kept.append(UNK)
        return cls(kept, tokenizer)

    @classmethod
    def from_ix_to_word(cls, mapping: object, tokenizer: str = "ascii", source: str = "ix_to_word") -> "Vocab":
        """The vocabulary of a dataset json or checkpoint: {"1": word, .., "V": word}.

        Raises:
            InputError: the keys are not 1..V, or the words are not distinct strings; `source` names the file.
        """
        if not isinstance(mapping, Mapping) or not mapping:
            raise InputError(f"{source}: the vocabulary is missing or empty", expected='{"1": word, "2": word, ..}')
        words = []
        for index in range(1, len(mapping) + 1):
            word = mapping.get(str(index))
            if not isinstance(word, str) or not _is_text(word):
                raise InputError(
                    f"{source}: the vocabulary has no word for id {index} of {len(mapping)}",
                    expected="a word for each id from 1 on",
                )
            words.append(word)
        try:
            return cls(words, tokenizer)
        except InputError as error:
            raise InputError(f"{source}: {error.problem}", expected=error.expected) from None

    @property
    def size(self) -> int:
        """V, the number of words (UNK included, START/END not)."""
        return len(self.words)

    @property
    def end_id(self) -> int:
        """V+1: END as a target, START as an input."""
        return end_id_of(len(self.words))

    @property
    def ix_to_word(self) -> dict[str, str]:
        """{"1": word, ..}, the form of the dataset json."""
        return {str(index): word for index, word in enumerate(self.words, start=1)}

    def word(self, word_id: int) -> str:
        """The word of an id in 1..V (KeyError otherwise)."""
        if not 1 <= word_id <= len(self.words):
            raise KeyError(word_id)
        return self.words[word_id - 1]

    def encode(self, tokens: Sequence[str], max_length: int) -> list[int]:
        """At most `max_length` word ids; unknown words become UNK.

        Raises:
            InputError: a word is unknown and the vocabulary has no UNK.
        """
        ids = []
        for token in tokens[:max_length]:
            word_id = self._ids.get(token, self.unk_id)
            if word_id is None:
                raise InputError(f"the word {token!r} is not in the vocabulary, and the vocabulary has no {UNK}")
            ids.append(word_id)
        return ids

    def covers(self, other: "Vocab") -> bool:
        """Whether it has all words of the other, split the same way."""
        return self.tokenizer == other.tokenizer and all(word in self for word in other.words)

    def grown_by(self, other: "Vocab") -> "Vocab":
        """These words under their ids, after them those that only the other has; captions split as the other's."""
        return Vocab(list(dict.fromkeys([*self.words, *other.words])), other.tokenizer)

    def decode(self, ids: Iterable[int]) -> str:
        """Words up to the first id without one (END, padding), as the tokenizer's captions are written."""
        words = []
        for word_id in ids:
            if not 1 <= word_id <= len(self.words):
                break
            words.append(self.words[word_id - 1])
        return joined(words, self.tokenizer)

    def __contains__(self, word: object) -> bool:
        return word in self._ids

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Vocab) and (self.words, self.tokenizer) == (other.words, other.tokenizer)

    def __hash__(self) -> int:
        return hash((self.words, self.tokenizer))

    def __repr__(self) -> str:
        return f"Vocab({self.size} words, tokenizer={self.tokenizer!r})"
