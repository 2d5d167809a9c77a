"""Beam search, for all images and all their beams at once; diverse groups of beams (Vijayakumar et al. 2016).

Shapes: N images still running, G groups of beams, W live beams per group (1 at first, then k), k beams per group
at most, R = N * G * W rows of the network, V words. Ids are 1-based, END = START = V+1; id i is column i-1.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from captioner.data.vocabulary import end_id_of
from captioner.kernels import topk
from captioner.runtime.transfers import download, upload
from captioner.search.banks import extend_banks
from captioner.search.candidates import Candidates, ends_of, join
from captioner.search.options import Hypothesis, SearchOptions
from captioner.search.rules import Rules, State, Step, make_hypothesis


@dataclass
class _BeamStep:
    """What one step decided: who lives on, and who ended here (score -inf: not ended). Every field (N, G, k)."""

    images: np.ndarray
    live: Candidates
    done: Candidates


def beam_search(
    step: Step, state: State, num_images: int, vocab_size: int, max_length: int, options: SearchOptions
) -> list[list[Hypothesis]]:
    end_id, groups, per_group = end_id_of(vocab_size), options.groups, options.beam_size // options.groups
    wanted = min(options.n_best, per_group)
    device = state.device
    tokens = torch.full((num_images,), end_id, device=device)
    images = np.arange(num_images)
    scores = torch.zeros(num_images, groups, 1, device=device)
    best = torch.full((num_images, groups, wanted), -math.inf, device=device)  # finished captions so far, ranked
    rules = Rules(options, num_images, vocab_size, max_length, device)
    # In units of one group's beams: where each group's rows begin.
    begins = first_row = torch.arange(num_images * groups, device=device).view(num_images, groups, 1)
    beams = 1
    most_words = min(max_length, options.max_words or max_length)
    trace: list[_BeamStep] = []
    ranked_by_length = options.length_penalty != 0  # else a GPU is spared two divisions by 1
    for t in range(max_length):
        logprobs, state = step(tokens, state)
        logprobs = rules(logprobs, t)
        # The first step has one row per image, which all groups share.
        shape = (len(images), -1, scores.shape[2], end_id)
        last = t == max_length - 1
        if rules.progress:
            live, done = extend_banks(
                scores[:, 0], logprobs.view(shape)[:, 0], rules.progress, options, max(most_words - t - 1, 0), last
            )
        else:
            live, done = _extend(scores, logprobs.view(shape).expand(-1, groups, -1, -1), options, last)
        trace.append(_BeamStep(images, live, done))
        if last:
            break

        # A log-probability only falls, so an image is certain once the worst caption it may return beats the best
        # that a live beam can still become, which is the longest one without further loss.
        ended, bound = done.score, live.score.amax(2)
        if ranked_by_length:
            ended, bound = ended / (t + 1) ** options.length_penalty, bound / max_length**options.length_penalty
        best = torch.cat([best, ended], 2).topk(wanted).values
        certain = best[..., -1] >= bound
        if per_group == 1 and not rules.progress:  # a single path has ended when it ends, however lengths are ranked
            certain |= done.score[..., 0] > -math.inf
        if groups > 1:  # a group that is certain waits for the others without adding to their penalties
            live.score.masked_fill_(certain.unsqueeze(2), -math.inf)
        running = ~(certain.all(1) if groups > 1 else certain[:, 0]).cpu().numpy()
        if not running.any():
            break
        if scores.shape[2] != beams:
            beams = scores.shape[2]
            begins = first_row * beams
        # The first step had one row per image.
        rows = begins[: len(images)] + live.parent if t else first_row // groups
        rows = rows.expand(live.token.shape)
        scores, tokens = live.score, live.token
        if not running.all():
            images = images[running]
            kept = upload(torch.from_numpy(running.nonzero()[0]), device)
            best, scores, tokens, rows = best[kept], scores[kept], tokens[kept], rows[kept]
        per_image, tokens, rows = rows[0].numel(), tokens.flatten(), rows.flatten()
        state = state.select(rows, per_image)
        rules.select(rows)
        rules.append(tokens)
    return _collect(trace, num_images, end_id, options)


def _extend(scores: Tensor, logprobs: Tensor, options: SearchOptions, last: bool) -> tuple[Candidates, Candidates]:
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
    return join([live for live, _ in pairs], 1), join([done for _, done in pairs], 1)


def _extend_group(
    scores: Tensor, logprobs: Tensor, chosen: Tensor | None, options: SearchOptions, last: bool
) -> tuple[Candidates, Candidates]:
    """As `_extend` for one group: scores (N, W), logprobs (N, W, V+1), chosen (N, 1, V+1)."""
    per_group, columns = options.beam_size // options.groups, logprobs.shape[2]
    ranked = logprobs if chosen is None else logprobs - options.group_penalty * chosen
    # One more than needed per beam: END may be among them and does not live on.
    values, ids = topk(ranked, min(per_group + 1, columns))  # (N, W, C)
    width, ids = ids.shape[2], (ids + 1).flatten(1)  # from 1 on
    totals = (scores.unsqueeze(2) + values).flatten(1)

    def candidates(totals: Tensor, count: int) -> Candidates:
        total, place = totals.topk(count)
        parent, token = place // width, ids.gather(1, place)
        logprob = values.flatten(1).gather(1, place)
        score = total
        if chosen is not None:  # the penalty steers the choice only; scores stay the model's
            logprob = logprobs.flatten(1).gather(1, parent * columns + token - 1)
            score = torch.where(total > -math.inf, scores.gather(1, parent) + logprob, total)
        return Candidates(*(x.unsqueeze(1) for x in (parent, token, logprob, score)))

    done = candidates(totals, min(per_group, totals.shape[1]))
    if options.keep_finished:
        live = done
    else:
        goes_on = totals.masked_fill(ids == columns, -math.inf)
        live = candidates(goes_on, min(per_group, len(scores[0]) * (width - 1)))
    if options.every_end:
        found = ends_of(scores, logprobs)
        return live, join([found, live], 2) if last else found
    # END counts as found only if it is among the best k continuations, as in the original: else every empty or cut
    # caption would compete, and one beam would not be greedy search.
    if not last:
        score = done.score.masked_fill(done.token != columns, -math.inf)
        done = Candidates(done.parent, done.token, done.logprob, score)
    return live, done


def _collect(trace: list[_BeamStep], num_images: int, end_id: int, options: SearchOptions) -> list[list[Hypothesis]]:
    """Walk back from every end, best first, until each image has its captions."""
    places = np.full((len(trace), num_images), -1)
    for t, one in enumerate(trace):
        places[t, one.images] = np.arange(len(one.images))
    row_of = places.tolist()  # lists are what Python is quickest to look up in
    parts = [(part.parent, part.token, part.logprob, part.score) for one in trace for part in (one.live, one.done)]
    fetched = iter(download([field for part in parts for field in part]))
    decided = [([next(fetched) for _ in range(4)], [next(fetched) for _ in range(4)]) for _ in trace]
    live = [[field.tolist() for field in fields[:3]] for fields, _ in decided]
    ends: list[list[tuple[float, int, int, int, int, float]]] = [[] for _ in range(num_images)]
    for t, (one, (_, done)) in enumerate(zip(trace, decided, strict=True)):
        score = done[3].numpy()
        found = (score > -math.inf).nonzero()
        fields = [field.numpy()[found].tolist() for field in done[:3]]
        ranks = (score[found] / (t + 1) ** options.length_penalty).tolist()
        for image, rank, group, *end in zip(
            one.images[found[0]].tolist(), ranks, found[1].tolist(), *fields, strict=True
        ):
            ends[image].append((rank, t, group, *end))

    def walk(image: int, t: int, group: int, parent: int, token: int, logprob: float) -> Hypothesis:
        tokens, logprobs = [token], [logprob]
        for s in range(t - 1, -1, -1):
            place, (parents, ids, values) = row_of[s][image], live[s]
            tokens.append(ids[place][group][parent])
            logprobs.append(values[place][group][parent])
            parent = parents[place][group][parent]
        return make_hypothesis(tokens[::-1], logprobs[::-1], end_id)

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
