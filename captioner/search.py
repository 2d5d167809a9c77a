"""Greedy, sampling and beam search over `step(tokens, state) -> (logprobs, state)`; knows no images and no words.

All images and all their beams go through the network as one batch per step. Images whose result is certain leave the
batch. Nothing in a step loops over images or beams.

Shapes: N images still running, G groups of beams, W live beams per group (1 at first, then k), k beams per group
at most, R = N * G * W rows of the network, V words. Ids are 1-based, END = START = V+1; id i is column i-1.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from captioner.errors import InputError

# step(tokens (R,) int64, state) -> (logprobs (R, V+1), state); the tensors of a state have their rows in dimension 1
# and may be nested in tuples.
Step = Callable[[Tensor, Any], tuple[Tensor, Any]]

# Words per block of `_topk`: near the square root of a vocabulary of 10,000.
TOPK_BLOCK = 64


@dataclass(frozen=True)
class SearchOptions:
    """How to search.

    Args:
        beam_size: beams per image; 1 is greedy search.
        sample: draw words at random instead; `beam_size` is then without meaning.
        temperature: sampling divides the log-probabilities by it.
        top_k: sampling draws among the k likeliest words only; 0: all.
        top_p: sampling draws among the likeliest words that together reach this probability; 1.0: all.
        length_penalty: finished captions are ranked by logprob / length**length_penalty, length counting the
            words and END; 0.0 ranks by probability alone, 1.0 by the mean log-probability.
        min_length: END is out of question before so many words, unless nothing else is left.
        no_repeat_ngram: no sequence of so many words occurs twice in a caption; 0: no rule.
        suppress: ids of words that are never chosen.
        n_best: captions per image, best first; there may be fewer where the vocabulary is tiny.
        groups: beams are split into so many groups; each avoids the words the groups before it chose at the same
            step (diverse beam search, Vijayakumar et al. 2016).
        group_penalty: what a group subtracts from a log-probability for each such choice; 0.0: independent groups.
        keep_finished: for comparison with neuraltalk2: finished beams keep their slots and are continued.
    """

    beam_size: int = 2
    sample: bool = False
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    length_penalty: float = 0.0
    min_length: int = 0
    no_repeat_ngram: int = 0
    suppress: tuple[int, ...] = ()
    n_best: int = 1
    groups: int = 1
    group_penalty: float = 0.5
    keep_finished: bool = False

    def __post_init__(self) -> None:
        for name in ("beam_size", "n_best", "groups"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} {getattr(self, name)}", expected="1 or more")
        for name in ("top_k", "length_penalty", "min_length", "no_repeat_ngram", "group_penalty"):
            if not getattr(self, name) >= 0:
                raise InputError(f"{name} {getattr(self, name)}", expected="0 or more")
        if not self.temperature > 0:
            raise InputError(f"temperature {self.temperature}", expected="more than 0")
        if not 0 < self.top_p <= 1:
            raise InputError(f"top_p {self.top_p}", expected="more than 0, at most 1")
        if self.sample:
            return
        if self.beam_size % self.groups:
            raise InputError(
                f"groups {self.groups} does not divide beam_size {self.beam_size}",
                remedy="choose a beam_size that is a multiple of groups",
            )
        if self.n_best > self.beam_size:
            raise InputError(
                f"n_best {self.n_best} with beam_size {self.beam_size}", remedy=f"raise beam_size to {self.n_best}"
            )


@dataclass(frozen=True)
class Hypothesis:
    """One caption found by a search.

    Args:
        tokens: word ids, without END.
        word_logprobs: the model's log-probability of each word, and of END if the caption reached it.
        logprob: their sum (natural logarithm).
        finished: it ends with END; False: it was cut off at the greatest length.
    """

    tokens: tuple[int, ...]
    word_logprobs: tuple[float, ...]
    logprob: float
    finished: bool

    @property
    def confidence(self) -> float:
        """Geometric mean of the probabilities of its words and END: comparable between lengths, in 0..1."""
        return math.exp(self.logprob / max(1, len(self.word_logprobs)))


@torch.inference_mode()
def search(
    step: Step,
    state: Any,
    *,
    num_images: int,
    vocab_size: int,
    max_length: int,
    options: SearchOptions,
    seeds: Sequence[int] | None = None,
) -> list[list[Hypothesis]]:
    """Find captions for a batch of images.

    Args:
        step: the network; it is fed START first.
        state: its state after the image step, one row per image.
        num_images: rows of `state`.
        vocab_size: V.
        max_length: no caption has more tokens, END counting as one.
        options: how to search.
        seeds: one per image, for sampling: an image and its seed alone decide what is drawn. Without them they are
            drawn from torch's generator.

    Returns:
        For each image its hypotheses, best first: `n_best` of them, different from each other (samples may repeat).

    Raises:
        InputError: an id to suppress is no word.
    """
    for word in options.suppress:
        if not 1 <= word <= vocab_size:
            raise InputError(f"suppress {word}", expected=f"word ids from 1 to {vocab_size}")
    if num_images == 0:
        return []
    if options.beam_size > 1 and not options.sample:
        return _beam_search(step, state, num_images, vocab_size, max_length, options)
    if not options.sample:
        seeds = None  # a greedy search draws nothing, whatever the caller offers
    elif seeds is None:
        seeds = torch.randint(2**62, (num_images,)).tolist()
    return _follow_paths(step, state, num_images, vocab_size, max_length, options, seeds)


def ensemble_step(steps: Sequence[Step]) -> Step:
    """One step that averages the probabilities of several networks; its state is the tuple of theirs."""

    def step(tokens: Tensor, state: Sequence[Any]) -> tuple[Tensor, tuple[Any, ...]]:
        results = [one(tokens, own) for one, own in zip(steps, state, strict=True)]
        mean = torch.stack([logprobs for logprobs, _ in results]).logsumexp(0) - math.log(len(steps))
        return mean, tuple(own for _, own in results)

    return step


# ---------------------------------------------------------------------------------------------------------------------
# Beam search
# ---------------------------------------------------------------------------------------------------------------------


@dataclass
class _Candidates:
    """k continuations per image (and group), best first; every field (N, k)."""

    parent: Tensor  # live beam they continue
    token: Tensor
    logprob: Tensor  # of the token
    score: Tensor  # sum over the caption, -inf for an empty slot


@dataclass
class _BeamStep:
    """What one step decided: who lives on, and who ended here (score -inf: not ended). Every field (N, G, k)."""

    images: np.ndarray
    live: _Candidates
    done: _Candidates


def _beam_search(
    step: Step, state: Any, num_images: int, vocab_size: int, max_length: int, options: SearchOptions
) -> list[list[Hypothesis]]:
    end_id, groups, per_group = vocab_size + 1, options.groups, options.beam_size // options.groups
    wanted = min(options.n_best, per_group)
    tokens = _first_tensor(state).new_full((num_images,), end_id, dtype=torch.long)
    device = tokens.device
    images = np.arange(num_images)
    scores = torch.zeros(num_images, groups, 1, device=device)
    best = torch.full((num_images, groups, wanted), -math.inf, device=device)  # finished captions so far, ranked
    history = _History(options, tokens)
    # In units of one group's beams: where each group's rows begin.
    first_row = torch.arange(num_images * groups, device=device).view(num_images, groups, 1)
    trace: list[_BeamStep] = []
    for t in range(max_length):
        logprobs, state = step(tokens, state)
        logprobs = _constrain(logprobs, t, vocab_size, options, history)
        # The first step has one row per image, which all groups share.
        shape = (len(images), -1, scores.shape[2], end_id)
        live, done = _extend(scores, logprobs.view(shape).expand(-1, groups, -1, -1), options, t == max_length - 1)
        trace.append(_BeamStep(images, live, done))
        if t == max_length - 1:
            break

        # A log-probability only falls, so an image is certain once the worst caption it may return beats the best
        # that a live beam can still become, which is the longest one without further loss.
        best = torch.cat([best, done.score / (t + 1) ** options.length_penalty], 2).topk(wanted).values
        bound = live.score[..., 0] / max_length**options.length_penalty
        certain = best[..., -1] >= bound
        if per_group == 1:  # a single path has ended when it ends, whatever the ranking of lengths
            certain |= done.score[..., 0] > -math.inf
        if groups > 1:  # a group that is certain waits for the others without adding to their penalties
            live.score.masked_fill_(certain.unsqueeze(2), -math.inf)
        running = ~certain.all(1).cpu().numpy()
        if not running.any():
            break
        # The first step had one row per image.
        rows = first_row[: len(images)] * scores.shape[2] + live.parent if t else first_row // groups
        rows = rows.expand(live.token.shape)
        scores, tokens = live.score, live.token
        if not running.all():
            images = images[running]
            kept = torch.from_numpy(running.nonzero()[0]).to(device)
            best, scores, tokens, rows = best[kept], scores[kept], tokens[kept], rows[kept]
        tokens, rows = tokens.flatten(), rows.flatten()
        state = _select_rows(state, rows)
        history.select(rows)
        history.append(tokens)
    return _collect(trace, num_images, end_id, options)


def _extend(scores: Tensor, logprobs: Tensor, options: SearchOptions, last: bool) -> tuple[_Candidates, _Candidates]:
    """Choose the beams of the next step and those that end, for scores (N, G, W) and logprobs (N, G, W, V+1)."""
    if scores.shape[1] == 1:
        return _extend_group(scores[:, 0], logprobs[:, 0], None, options, last)
    chosen = torch.zeros_like(logprobs[:, 0, :1])  # (N, 1, V+1) how often earlier groups chose each word
    pairs = []
    for group in range(scores.shape[1]):
        live, done = _extend_group(scores[:, group], logprobs[:, group], chosen, options, last)
        for choice in (done,) if last else (live, done):
            made = (choice.score > -math.inf).to(chosen.dtype)
            chosen.scatter_add_(2, choice.token - 1, made)
        pairs.append((live, done))
    return _join([live for live, _ in pairs]), _join([done for _, done in pairs])


def _extend_group(
    scores: Tensor, logprobs: Tensor, chosen: Tensor | None, options: SearchOptions, last: bool
) -> tuple[_Candidates, _Candidates]:
    """As `_extend` for one group: scores (N, W), logprobs (N, W, V+1), chosen (N, 1, V+1)."""
    per_group, columns = options.beam_size // options.groups, logprobs.shape[2]
    ranked = logprobs if chosen is None else logprobs - options.group_penalty * chosen
    # One more than needed per beam: END may be among them and does not live on.
    values, ids = _topk(ranked, min(per_group + 1, columns))  # (N, W, C)
    width = ids.shape[2]
    totals = (scores.unsqueeze(2) + values).flatten(1)
    ends = (ids == columns - 1).flatten(1)

    def candidates(totals: Tensor, count: int) -> tuple[Tensor, _Candidates]:
        total, place = totals.topk(count)
        parent, token = place // width, ids.flatten(1).gather(1, place) + 1
        logprob = values.flatten(1).gather(1, place)
        score = total
        if chosen is not None:  # the penalty steers the choice only; scores stay the model's
            logprob = logprobs.flatten(1).gather(1, parent * columns + token - 1)
            score = torch.where(total > -math.inf, scores.gather(1, parent) + logprob, total)
        return place, _Candidates(*(x.unsqueeze(1) for x in (parent, token, logprob, score)))

    # END counts as found only if it is among the best k continuations, as in the original: else every empty or cut
    # caption would compete, and one beam would not be greedy search.
    place, done = candidates(totals, min(per_group, totals.shape[1]))
    if options.keep_finished:
        live = done
    else:
        live = candidates(totals.masked_fill(ends, -math.inf), min(per_group, len(scores[0]) * (width - 1)))[1]
    if not last:
        ended = ends.gather(1, place).unsqueeze(1)
        done = _Candidates(done.parent, done.token, done.logprob, done.score.masked_fill(~ended, -math.inf))
    return live, done


def _topk(values: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """`values.topk(count)` along the last dimension, for a small count and a large dimension.

    The greatest elements lie in the blocks with the greatest maxima, and maxima are quickly found: on a CPU four
    times as fast as topk itself.
    """
    size = values.shape[-1]
    whole = size // TOPK_BLOCK * TOPK_BLOCK
    if whole < 2 * count * TOPK_BLOCK:
        few = values.topk(count)
        return few.values, few.indices
    maxima = values[..., :whole].unflatten(-1, (-1, TOPK_BLOCK)).amax(-1)
    places = torch.arange(TOPK_BLOCK, device=values.device) + TOPK_BLOCK * maxima.topk(count).indices.unsqueeze(-1)
    places = places.flatten(-2)
    if whole < size:
        rest = torch.arange(whole, size, device=values.device).expand(*places.shape[:-1], -1)
        places = torch.cat([places, rest], -1)
    top, index = values.gather(-1, places).topk(count)
    return top, places.gather(-1, index)


def _join(groups: list[_Candidates]) -> _Candidates:
    return _Candidates(*(torch.cat([getattr(g, name) for g in groups], 1) for name in _Candidates.__annotations__))


def _collect(trace: list[_BeamStep], num_images: int, end_id: int, options: SearchOptions) -> list[list[Hypothesis]]:
    """Walk back from every end, best first, until each image has its captions."""
    places = np.full((len(trace), num_images), -1)
    for t, record in enumerate(trace):
        places[t, record.images] = np.arange(len(record.images))
    live = [[getattr(record.live, name).tolist() for name in ("parent", "token", "logprob")] for record in trace]
    ends: list[list[tuple[float, int, int, int, int, float]]] = [[] for _ in range(num_images)]
    for t, record in enumerate(trace):
        score = record.done.score.cpu().numpy()
        found = (score > -math.inf).nonzero()
        fields = [getattr(record.done, name).cpu().numpy()[found].tolist() for name in ("parent", "token", "logprob")]
        ranks = (score[found] / (t + 1) ** options.length_penalty).tolist()
        for image, rank, group, *end in zip(
            record.images[found[0]].tolist(), ranks, found[1].tolist(), *fields, strict=True
        ):
            ends[image].append((rank, t, group, *end))

    def walk(image: int, t: int, group: int, parent: int, token: int, logprob: float) -> Hypothesis:
        tokens, logprobs = [token], [logprob]
        for s in range(t - 1, -1, -1):
            parents, ids, values = (field[places[s, image]][group] for field in live[s])
            tokens.append(ids[parent])
            logprobs.append(values[parent])
            parent = parents[parent]
        return _hypothesis(tokens[::-1], logprobs[::-1], end_id)

    results = []
    for image, candidates in enumerate(ends):
        captions: dict[tuple[int, ...], Hypothesis] = {}
        for _, t, group, parent, token, logprob in sorted(candidates, reverse=True):
            hypothesis = walk(image, t, group, parent, token, logprob)
            if end_id not in hypothesis.tokens:  # a beam kept after its END has already been counted
                captions.setdefault(hypothesis.tokens, hypothesis)
            if len(captions) == options.n_best:
                break
        results.append(list(captions.values()))
    return results


# ---------------------------------------------------------------------------------------------------------------------
# Greedy search and sampling
# ---------------------------------------------------------------------------------------------------------------------


def _follow_paths(
    step: Step,
    state: Any,
    num_images: int,
    vocab_size: int,
    max_length: int,
    options: SearchOptions,
    seeds: Sequence[int] | None,
) -> list[list[Hypothesis]]:
    """One caption per image, of the likeliest words; or `n_best` drawn at random, for which there are `seeds`."""
    end_id, copies = vocab_size + 1, 1 if seeds is None else options.n_best
    tokens = _first_tensor(state).new_full((num_images,), end_id, dtype=torch.long)
    device = tokens.device
    if seeds is not None:
        # One number per caption and step, turned into a word by the inverse of the cumulative distribution: what an
        # image draws depends neither on its batch nor on the device.
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        uniform = torch.stack([torch.rand(copies, max_length, dtype=torch.float64, generator=g) for g in generators])
        uniform = uniform.view(-1, max_length).to(device)
    rows = np.arange(num_images * copies)
    history = _History(options, tokens)
    trace: list[tuple[np.ndarray, Tensor, Tensor]] = []
    for t in range(max_length):
        logprobs, state = step(tokens, state)
        logprobs = _constrain(logprobs, t, vocab_size, options, history)
        if t == 0 and copies > 1:
            parents = torch.arange(num_images, device=device).repeat_interleave(copies)
            logprobs, state = logprobs[parents], _select_rows(state, parents)
            history.select(parents)
        chosen, ids = _topk(logprobs, 1) if seeds is None else _draw(logprobs, uniform[:, t], options)
        tokens = ids.squeeze(1) + 1
        trace.append((rows, tokens, chosen.squeeze(1)))
        history.append(tokens)
        running = (tokens != end_id).cpu().numpy()
        if not running.any():
            break
        if not running.all():
            rows = rows[running]
            kept = torch.from_numpy(running.nonzero()[0]).to(device)
            tokens, state = tokens[kept], _select_rows(state, kept)
            history.select(kept)
            if seeds is not None:
                uniform = uniform[kept]
    paths: list[tuple[list[int], list[float]]] = [([], []) for _ in range(num_images * copies)]
    for at, ids, values in trace:
        for row, token, logprob in zip(at.tolist(), ids.tolist(), values.tolist(), strict=True):
            paths[row][0].append(token)
            paths[row][1].append(logprob)
    captions = [_hypothesis(ids, values, end_id) for ids, values in paths]
    return [
        sorted(captions[i : i + copies], key=lambda h: h.logprob, reverse=True) for i in range(0, len(captions), copies)
    ]


def _draw(logprobs: Tensor, uniform: Tensor, options: SearchOptions) -> tuple[Tensor, Tensor]:
    """Columns (R, 1) drawn from logprobs (R, V+1) with uniform numbers (R,) in [0, 1), after their logprobs."""
    weights, order = (logprobs / options.temperature).double(), None
    if options.top_k or options.top_p < 1:
        weights, order = weights.sort(descending=True)
    weights = weights.softmax(1)
    if options.top_k:
        weights[:, options.top_k :] = 0
        weights /= weights.sum(1, keepdim=True)
    if options.top_p < 1:
        weights.masked_fill_(weights.cumsum(1) - weights >= options.top_p, 0)
    cumulative = weights.cumsum(1)
    place = torch.searchsorted(cumulative, (uniform * cumulative[:, -1]).unsqueeze(1), right=True)
    columns = place if order is None else order.gather(1, place)
    return logprobs.gather(1, columns), columns


# ---------------------------------------------------------------------------------------------------------------------
# What all searches share
# ---------------------------------------------------------------------------------------------------------------------


class _History:
    """The ids each row has chosen so far (R, t), kept only if a rule looks back."""

    def __init__(self, options: SearchOptions, tokens: Tensor) -> None:
        self.ids = tokens.new_empty(len(tokens), 0) if options.no_repeat_ngram else None

    def select(self, rows: Tensor) -> None:
        if self.ids is not None:
            self.ids = self.ids[rows]

    def append(self, tokens: Tensor) -> None:
        if self.ids is not None:
            self.ids = torch.cat([self.ids, tokens.unsqueeze(1)], 1)


def _constrain(logprobs: Tensor, t: int, vocab_size: int, options: SearchOptions, history: _History) -> Tensor:
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


def _hypothesis(tokens: list[int], logprobs: list[float], end_id: int) -> Hypothesis:
    finished = tokens[-1] == end_id
    return Hypothesis(tuple(tokens[:-1] if finished else tokens), tuple(logprobs), math.fsum(logprobs), finished)


def _select_rows(state: Any, rows: Tensor) -> Any:
    if isinstance(state, Tensor):
        return state.index_select(1, rows)
    return tuple(_select_rows(part, rows) for part in state)


def _first_tensor(state: Any) -> Tensor:
    while not isinstance(state, Tensor):
        state = state[0]
    return state
