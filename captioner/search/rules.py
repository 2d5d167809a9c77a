"""What all searches share: which words may be chosen, the likeliest of them, and the rows of a running batch.

Shapes: R rows of the network, t words chosen so far, V words. Ids are 1-based, END = START = V+1; id i is column i-1.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from captioner.search.options import Hypothesis, SearchOptions

# step(tokens (R,) int64, state) -> (logprobs (R, V+1), state); the tensors of a state have their rows in dimension 1
# and may be nested in tuples.
Step = Callable[[Tensor, Any], tuple[Tensor, Any]]


class History:
    """The ids each row has chosen so far (R, t), kept only if a rule looks back."""

    def __init__(self, options: SearchOptions, tokens: Tensor) -> None:
        self.ids = tokens.new_empty(len(tokens), 0) if options.no_repeat_ngram else None

    def select(self, rows: Tensor) -> None:
        if self.ids is not None:
            self.ids = self.ids[rows]

    def append(self, tokens: Tensor) -> None:
        if self.ids is not None:
            self.ids = torch.cat([self.ids, tokens.unsqueeze(1)], 1)


def constrain(logprobs: Tensor, t: int, vocab_size: int, options: SearchOptions, history: History) -> Tensor:
    """Log-probabilities (R, V+1) with -inf for what may not be chosen as word t (0-based)."""
    repeats = history.ids is not None and t >= options.no_repeat_ngram
    early = t < options.min_length
    if not (repeats or early or options.suppress):
        return logprobs
    allowed = logprobs.clone()
    if options.suppress:
        allowed[:, torch.tensor(options.suppress, device=logprobs.device) - 1] = -math.inf
    if repeats and history.ids is not None:
        n = options.no_repeat_ngram
        ngrams = history.ids.unfold(1, n, 1)  # (R, t-n+1, n)
        repeated = (ngrams[..., : n - 1] == history.ids[:, None, t - n + 1 :]).all(2)
        ceiling = torch.where(repeated, -math.inf, math.inf).to(allowed.dtype)
        allowed.scatter_reduce_(1, ngrams[..., n - 1] - 1, ceiling, "amin")
    if early:
        allowed[:, vocab_size] = -math.inf
    # Where nothing may be chosen, the caption has to end.
    stuck = allowed.amax(1) == -math.inf
    allowed[:, vocab_size] = torch.where(stuck, logprobs[:, vocab_size], allowed[:, vocab_size])
    return allowed


def select_rows(state: Any, rows: Tensor) -> Any:
    if isinstance(state, Tensor):
        return state.index_select(1, rows)
    return tuple(select_rows(part, rows) for part in state)


def first_tensor(state: Any) -> Tensor:
    while not isinstance(state, Tensor):
        state = state[0]
    return state


def make_hypothesis(tokens: list[int], logprobs: list[float], end_id: int) -> Hypothesis:
    finished = tokens[-1] == end_id
    return Hypothesis(tuple(tokens[:-1] if finished else tokens), tuple(logprobs), math.fsum(logprobs), finished)
