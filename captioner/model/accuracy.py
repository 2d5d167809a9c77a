"""How often the right next word is the likeliest, or among the five likeliest: beside the loss, what people grasp."""

import torch
from torch import Tensor
from torch.nn import functional as F

AMONG = (1, 5)
_BLOCK = 256  # rows of logits in hand at once


@torch.no_grad()
def hits(hidden: Tensor, weight: Tensor, bias: Tensor, columns: Tensor) -> Tensor:
    """Count the right answers among the likeliest of the logits hidden · weightᵀ + bias.

    Args:
        hidden: (P, H).
        weight: (C, H).
        bias: (C,).
        columns: (P,) int64 in 0..C-1, the right answers. Of equally likely ones the first counts as the likeliest.

    Returns:
        int64 (2,) on the device of `hidden`: how many of the P are the likeliest, and among the five likeliest.
    """
    found = torch.zeros(len(AMONG), dtype=torch.int64, device=hidden.device)
    places = torch.arange(len(weight), device=hidden.device)
    for start in range(0, len(hidden), _BLOCK):
        answers = columns[start : start + _BLOCK, None]
        logits = F.linear(hidden[start : start + _BLOCK], weight, bias)
        of_answer = logits.gather(1, answers)
        before = (logits > of_answer) | ((logits == of_answer) & (places < answers))
        rank = before.sum(1)
        found += torch.stack([(rank < among).sum() for among in AMONG])
    return found
