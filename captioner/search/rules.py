"""What all searches share: which words may be chosen, the likeliest of them, and the rows of a running batch.

Shapes: R rows of the network, t words chosen so far, V words. Ids are 1-based, END = START = V+1; id i is column i-1.
"""

import math
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor

from captioner.runtime.transfers import upload
from captioner.search.options import Hypothesis, SearchOptions
from captioner.search.requirements import Progress, automaton_of


class State(Protocol):
    """What a network knows of its rows between two steps."""

    @property
    def device(self) -> torch.device: ...

    def select(self, rows: Tensor, per_image: int | None = None) -> Any:
        """The state whose row i goes on from row rows[i] of this one, for rows int64 of any length.

        Rows of one image stay together, and images in their order: what belongs to an image need not be copied for its
        rows, and may be forgotten when it has none left. Where each image that is left has as many rows, `per_image`
        says how many: it need not be counted.
        """
        ...


# step(tokens (R,) int64, state) -> (logprobs (R, V+1), state)
Step = Callable[[Tensor, Any], tuple[Tensor, Any]]


class Rules:
    """Which words each row of a running search may choose; remembers what rows have chosen if a rule looks back.

    Args:
        num_rows: rows of the first step.
        max_length: no caption has more tokens.
    """

    def __init__(
        self, options: SearchOptions, num_rows: int, vocab_size: int, max_length: int, device: torch.device
    ) -> None:
        self.options, self.vocab_size, self.max_length = options, vocab_size, max_length
        looks_back = (options.no_repeat_ngram, options.no_immediate_repeat, options.repeatable, options.bad_endings)
        self.chosen = None  # (R, t)
        if any(looks_back):
            self.chosen = torch.empty(num_rows, 0, dtype=torch.long, device=device)
        self.suppress, self.bad_endings = (
            upload(torch.tensor(ids, dtype=torch.long), device) for ids in (options.suppress, options.bad_endings)
        )
        self.once = None  # (V+1,), for each column whether a caption may have it once at most
        if options.repeatable:
            self.once = torch.ones(vocab_size + 1, dtype=torch.bool)
            self.once[[*(word - 1 for word in options.repeatable), vocab_size]] = False
            self.once = upload(self.once, device)
        self.progress = None
        if options.require:
            automaton = automaton_of(options.require, options.suppress)
            self.progress = Progress(automaton, num_rows, vocab_size, device)

    def select(self, rows: Tensor) -> None:
        """Go on with these rows, as the network's state does."""
        if self.chosen is not None:
            self.chosen = self.chosen[rows]
        if self.progress:
            self.progress.select(rows)

    def append(self, tokens: Tensor) -> None:
        """Remember what the rows chose, tokens (R,)."""
        if self.chosen is not None:
            self.chosen = torch.cat([self.chosen, tokens.unsqueeze(1)], 1)
        if self.progress:
            self.progress.append(tokens)

    def __call__(self, logprobs: Tensor, t: int) -> Tensor:
        """Log-probabilities (R, V+1) with -inf for what may not be chosen as word t (0-based)."""
        options, end = self.options, self.vocab_size
        if t < len(options.prefix):
            given = options.prefix[t] - 1
            only = torch.full_like(logprobs, -math.inf)
            only[:, given] = logprobs[:, given]
            return only
        full = 0 < options.max_words <= t
        if not (options.suppress or self.chosen is not None or t < options.min_length or full or self.progress):
            return logprobs
        allowed = logprobs.clone()
        allowed[:, self.suppress - 1] = -math.inf
        if self.chosen is not None and t > 0:
            last = self.chosen[:, -1:]
            if options.no_immediate_repeat:
                allowed.scatter_(1, last - 1, -math.inf)
            if self.once is not None:
                self._forbid(allowed, self.chosen - 1, self.once[self.chosen - 1])
            if 0 < options.no_repeat_ngram <= t:
                self._forbid_ngrams(allowed, t)
            if options.bad_endings:
                allowed[:, end].masked_fill_(torch.isin(last[:, 0], self.bad_endings), -math.inf)
        if t + 1 in (self.max_length, options.max_words):
            allowed[:, self.bad_endings - 1] = -math.inf
        if t < options.min_length:
            allowed[:, end] = -math.inf
        if full:
            allowed[:, :end] = -math.inf
        # Where nothing may be chosen, the caption has to end.
        stuck = allowed.amax(1) == -math.inf
        allowed[:, end] = torch.where(stuck, logprobs[:, end], allowed[:, end])
        if self.progress:
            allowed[:, end].masked_fill_(self.progress.unmet, -math.inf)
        return allowed

    def _forbid_ngrams(self, allowed: Tensor, t: int) -> None:
        assert self.chosen is not None
        n = self.options.no_repeat_ngram
        ngrams = self.chosen.unfold(1, n, 1)  # (R, t-n+1, n)
        repeated = (ngrams[..., : n - 1] == self.chosen[:, None, t - n + 1 :]).all(2)
        self._forbid(allowed, ngrams[..., n - 1] - 1, repeated)

    @staticmethod
    def _forbid(allowed: Tensor, columns: Tensor, where: Tensor) -> None:
        """-inf in those columns (R, K) of `allowed` for which `where` (R, K) holds."""
        ceiling = torch.where(where, -math.inf, math.inf).to(allowed.dtype)
        allowed.scatter_reduce_(1, columns, ceiling, "amin")


def make_hypothesis(tokens: list[int], logprobs: list[float], end_id: int) -> Hypothesis:
    finished = tokens[-1] == end_id
    return Hypothesis(tuple(tokens[:-1] if finished else tokens), tuple(logprobs), math.fsum(logprobs), finished)
