"""Beam search for captions that have to say certain words (Anderson et al. 2017, Post & Vilar 2018).

Beginnings compete only with those that lack as many words: each such bank has its own beams, so that a required word,
however unlikely, never has to win against what the model would rather say. A wide beam finds the likeliest of all
captions that say what is required; any beam finds one that does.

Letters: N images, W live beams of an image, B banks, k beams per bank, K words of the requirements, C candidates of a
beam among the other words, V words. Id i is column i-1.
"""

import math

import torch
from torch import Tensor

from captioner.kernels import topk
from captioner.search.candidates import Candidates, ends_of, join
from captioner.search.options import SearchOptions
from captioner.search.requirements import Progress


def extend_banks(
    scores: Tensor, logprobs: Tensor, progress: Progress, options: SearchOptions, words_left: int, last: bool
) -> tuple[Candidates, Candidates]:
    """Choose the beams of the next step, bank by bank, and those that end.

    Args:
        scores: (N, W) of the live beams.
        logprobs: (N, W, V+1) of the words after them, -inf for what may not be said.
        progress: of the live beams.
        words_left: after this step, at most.
        last: whether what lives on is cut off here.

    Returns:
        The beams that live on, fields (N, 1, B k), and those that end, fields (N, 1, k) or more.
    """
    num_images, beams, columns = logprobs.shape
    # Every word of the requirements is a candidate; among the others a bank has room for k, and END comes on top.
    special = progress.words - 1
    others = logprobs.index_fill(2, special, -math.inf)
    values, ids = topk(others, min(options.beam_size + 1, columns))  # (N, W, C)
    values = torch.cat([values, logprobs[:, :, special]], 2)
    ids = torch.cat([ids, special.expand(num_images, beams, -1)], 2)
    after_special, after_other = (part.view(num_images, beams, -1) for part in progress.missing_after())
    missing = torch.cat([after_other.expand(-1, -1, ids.shape[2] - len(special)), after_special], 2).flatten(1)
    totals = (scores.unsqueeze(2) + values).flatten(1)  # (N, W (C+K))
    totals = totals.masked_fill(missing > words_left, -math.inf)  # nothing could save them
    ends = (ids == columns - 1).flatten(1)
    count = min(options.beam_size, totals.shape[1])

    def candidates(totals: Tensor) -> tuple[Tensor, Candidates]:
        """Of totals (N, b, W (C+K)) the best of each b, side by side."""
        total, place = (part.flatten(1) for part in totals.topk(count))
        fields = (place // ids.shape[2], ids.flatten(1).gather(1, place) + 1, values.flatten(1).gather(1, place), total)
        return place, Candidates(*(field.unsqueeze(1) for field in fields))

    banks = torch.arange(progress.num_banks, device=totals.device).unsqueeze(1)
    of_bank = missing.unsqueeze(1) == banks  # (N, B, W (C+K))
    live = candidates(totals.masked_fill(ends, -math.inf).unsqueeze(1).masked_fill(~of_bank, -math.inf))[1]
    if options.every_end:
        found = ends_of(scores, logprobs)
        return live, join([found, live], 2) if last else found
    # END counts as found only if it is among the best of those that lack nothing, as in a search without requirements.
    place, done = candidates(totals.masked_fill(missing > 0, -math.inf).unsqueeze(1))
    if not last:
        done.score.masked_fill_(~ends.gather(1, place).unsqueeze(1), -math.inf)
    return live, done
