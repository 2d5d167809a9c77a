"""What a step of a beam search may go on with.

Shapes: N images, W live beams, k beams at most, V words. Ids are 1-based, END = V+1; id i is column i-1.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class Candidates:
    """k continuations per image (and group), best first; every field (N, k) or (N, G, k)."""

    parent: Tensor  # live beam they continue
    token: Tensor
    logprob: Tensor  # of the token
    score: Tensor  # sum over the caption, -inf for an empty slot


def join(parts: Sequence[Candidates], dim: int) -> Candidates:
    """Side by side along the groups (1) or along the beams (2)."""
    return Candidates(*(torch.cat([getattr(p, name) for p in parts], dim) for name in Candidates.__annotations__))


def ends_of(scores: Tensor, logprobs: Tensor) -> Candidates:
    """The ends of all live beams, for scores (N, W) and logprobs (N, W, V+1)."""
    num_images, beams, columns = logprobs.shape
    parent = torch.arange(beams, device=scores.device).expand(num_images, beams)
    end = logprobs[:, :, -1]
    fields = (parent, torch.full_like(parent, columns), end, scores + end)
    return Candidates(*(field.unsqueeze(1) for field in fields))
