"""What the search steps of all decoders share: products may be in half precision, sums are not."""

import torch
from torch import Tensor
from torch.nn import functional as F


def lstm_cell(gates: Tensor, cell: Tensor) -> tuple[Tensor, Tensor]:
    """Hidden state, in the gates' format, and cell (R, H), from gates (R, 4H) in torch's order and the cell before."""
    i, f, g, o = widen(gates).chunk(4, dim=1)
    cell = f.sigmoid() * cell + i.sigmoid() * g.tanh()
    return (o.sigmoid() * cell.tanh()).to(gates.dtype), cell


def widen(values: Tensor) -> Tensor:
    """To float32 at least: half precision is not enough for sums over the vocabulary or over time."""
    return values.to(torch.promote_types(values.dtype, torch.float32))


def log_softmax(logits: Tensor) -> Tensor:
    """Log-probabilities along the last dimension, float32 or wider."""
    return F.log_softmax(logits, dim=-1, dtype=torch.promote_types(logits.dtype, torch.float32))
