"""Greedy search and sampling: captions that grow word by word, one path each.

Shapes: R paths still running, V words. Ids are 1-based, END = START = V+1; id i is column i-1.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from captioner.data.vocabulary import end_id_of
from captioner.kernels import topk
from captioner.runtime.device import widest_float
from captioner.runtime.transfers import download, upload
from captioner.search.options import Hypothesis, SearchOptions
from captioner.search.rules import Rules, State, Step, make_hypothesis


def follow_paths(
    step: Step,
    state: State,
    num_images: int,
    vocab_size: int,
    max_length: int,
    options: SearchOptions,
    seeds: Sequence[int] | None,
) -> list[list[Hypothesis]]:
    """One caption per image, of the likeliest words; or `n_best` drawn at random, for which there are `seeds`."""
    end_id, copies = end_id_of(vocab_size), 1 if seeds is None else options.n_best
    device = state.device
    tokens = torch.full((num_images,), end_id, device=device)
    if seeds is not None:
        # One number per caption and step, turned into a word by the inverse of the cumulative distribution: what an
        # image draws depends neither on its batch nor on the device.
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        uniform = torch.stack([torch.rand(copies, max_length, dtype=torch.float64, generator=g) for g in generators])
        uniform = uniform.view(-1, max_length).to(widest_float(device)).to(device)
    rows = np.arange(num_images * copies)
    rules = Rules(options, num_images, vocab_size, max_length, device)
    trace: list[tuple[np.ndarray, Tensor, Tensor]] = []
    for t in range(max_length):
        logprobs, state = step(tokens, state)
        logprobs = rules(logprobs, t)
        if t == 0 and copies > 1:
            parents = torch.arange(num_images, device=device).repeat_interleave(copies)
            logprobs, state = logprobs[parents], state.select(parents, copies)
            rules.select(parents)
        chosen, ids = topk(logprobs, 1) if seeds is None else _draw(logprobs, uniform[:, t], options)
        tokens = ids.squeeze(1) + 1
        trace.append((rows, tokens, chosen.squeeze(1)))
        rules.append(tokens)
        running = (tokens != end_id).cpu().numpy()
        if not running.any():
            break
        if not running.all():
            rows = rows[running]
            kept = upload(torch.from_numpy(running.nonzero()[0]), device)
            tokens, state = tokens[kept], state.select(kept, 1 if copies == 1 else None)
            rules.select(kept)
            if seeds is not None:
                uniform = uniform[kept]
    paths: list[tuple[list[int], list[float]]] = [([], []) for _ in range(num_images * copies)]
    fetched = iter(download([field for _, *fields in trace for field in fields]))
    for at, _, _ in trace:
        for row, token, logprob in zip(at.tolist(), next(fetched).tolist(), next(fetched).tolist(), strict=True):
            paths[row][0].append(token)
            paths[row][1].append(logprob)
    captions = [make_hypothesis(ids, values, end_id) for ids, values in paths]
    return [
        sorted(captions[i : i + copies], key=lambda h: h.logprob, reverse=True) for i in range(0, len(captions), copies)
    ]


def _draw(logprobs: Tensor, uniform: Tensor, options: SearchOptions) -> tuple[Tensor, Tensor]:
    """Columns (R, 1) drawn from logprobs (R, V+1) with uniform numbers (R,) in [0, 1), after their logprobs."""
    weights, order = (logprobs / options.temperature).to(uniform.dtype), None
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
    place = place.clamp(max=cumulative.shape[1] - 1)  # in float32 a number below 1 may have become 1
    columns = place if order is None else order.gather(1, place)
    return logprobs.gather(1, columns), columns
