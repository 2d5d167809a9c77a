"""What a caption has to say, as an automaton over its words (Anderson et al. 2017).

Its state knows which requirements a beginning has met and how much of a further phrase its last words are. Where each
state leads, and how many words it lacks, is worked out once for all captions.

Letters: S states, K distinct words of all requirements, R rows of the network. Ids are 1-based, END = V+1.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from captioner.errors import InputError
from captioner.runtime.transfers import upload

MOST = 8  # requirements at once: states double with each

Form = tuple[int, ...]  # the ids of a word, or of a phrase
_State = tuple[frozenset[int], Form]  # requirements met; the longest beginning of a further form that the text ends in


@dataclass(frozen=True)
class Automaton:
    """Every caption begins in state 0.

    Attributes:
        words: (K,) ids that matter, rising.
        next: (S, K+1) the state after each of them, and after any other word in the last column.
        missing: (S,) the least number of words that lead to a state in which all requirements are met; 0 there.
    """

    words: np.ndarray
    next: np.ndarray
    missing: np.ndarray

    def after(self, words: Sequence[int]) -> int:
        """The state of a beginning."""
        state, column = 0, {word: place for place, word in enumerate(self.words.tolist())}
        for word in words:
            state = int(self.next[state, column.get(word, -1)])
        return state


@functools.lru_cache(maxsize=64)
def automaton_of(require: tuple[tuple[Form, ...], ...], suppress: tuple[int, ...]) -> Automaton:
    """The automaton of requirements, each of which any of its forms meets.

    Args:
        suppress: words that are never said, and so no form with one of them.

    Raises:
        InputError: too many requirements, an empty form, or one that cannot be met.
    """
    if len(require) > MOST:
        raise InputError(f"{len(require)} requirements at once", expected=f"at most {MOST}")
    if not all(require) or not all(form for forms in require for form in forms):
        raise InputError("a requirement without words", expected="at least one word each")
    possible = [[form for form in forms if not set(suppress) & set(form)] for forms in require]
    if not all(possible):
        raise InputError("a requirement has only forms with words that are never said")
    words = sorted({word for forms in possible for form in forms for word in form})

    def follow(state: _State, word: int) -> _State:
        met, begun = state
        text = (*begun, word)
        met |= {i for i, forms in enumerate(possible) if any(text[-len(form) :] == form for form in forms)}
        further = {
            form[:n] for i, forms in enumerate(possible) if i not in met for form in forms for n in range(len(form))
        }
        return met, next(
            text[start:] for start in range(len(text) + 1) if text[start:] in further or start == len(text)
        )

    numbers: dict[_State, int] = {(frozenset(), ()): 0}
    rows: list[list[int]] = []
    for state in (queue := list(numbers)):  # it grows while it is gone through
        row = []
        for following in [*(follow(state, word) for word in words), (state[0], ())]:
            if following not in numbers:
                numbers[following] = len(numbers)
                queue.append(following)
            row.append(numbers[following])
        rows.append(row)
    table = np.array(rows)
    # Backwards from the states in which all is met, a word at a time.
    missing = np.array([0 if len(met) == len(possible) else -1 for met, _ in numbers])
    for distance in range(1, len(missing) + 1):
        reached = (missing < 0) & (missing[table] == distance - 1).any(1)
        if not reached.any():
            break
        missing[reached] = distance
    return Automaton(np.array(words), table, missing)


class Progress:
    """How far each row of a running search has met the requirements."""

    def __init__(self, automaton: Automaton, num_rows: int, vocab_size: int, device: torch.device) -> None:
        self.words, self.next, self.missing = (
            upload(torch.from_numpy(table), device) for table in (automaton.words, automaton.next, automaton.missing)
        )
        self.num_banks = int(automaton.missing.max()) + 1
        self.state = torch.zeros(num_rows, dtype=torch.long, device=device)  # (R,)
        # Of each id up to END: its column of `next`; the last one for words without meaning here.
        self._column = torch.full((vocab_size + 2,), len(self.words), device=device)
        self._column[self.words] = torch.arange(len(self.words), device=device)

    def select(self, rows: Tensor) -> None:
        self.state = self.state[rows]

    def append(self, tokens: Tensor) -> None:
        self.state = self.next[self.state, self._column[tokens]]

    @property
    def unmet(self) -> Tensor:
        """(R,) whether a row may not end yet."""
        return self.missing[self.state] > 0

    def missing_after(self) -> tuple[Tensor, Tensor]:
        """How many words rows lack after each word of the requirements (R, K), and after any other word (R, 1)."""
        after = self.missing[self.next[self.state]]
        return after[:, :-1], after[:, -1:]
