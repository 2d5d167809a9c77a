"""What the search steps of all decoders share: products may be in half precision, sums are not."""

import torch
from torch import Tensor
from torch.nn import functional as F


def lstm_cell(gates: Tensor, cell: Tensor) -> tuple[Tensor, Tensor]:
    """Hidden state, in the gates' format, and cell (R, H), from gates (R, 4H) in torch's order and the cell before."""
    i_and_f, g_and_o = widen(gates).chunk(2, dim=1)
    i, f = i_and_f.sigmoid().chunk(2, dim=1)  # together: a GPU's search is as fast as its kernels are few
    g, o = g_and_o.chunk(2, dim=1)
    cell = f * cell + i * g.tanh()
    return (o.sigmoid() * cell.tanh()).to(gates.dtype), cell


def widen(values: Tensor) -> Tensor:
    """To float32 at least: half precision is not enough for sums over the vocabulary or over time."""
    return values.to(torch.promote_types(values.dtype, torch.float32))


def log_softmax(logits: Tensor) -> Tensor:
    """Log-probabilities along the last dimension, float32 or wider."""
    return F.log_softmax(logits, dim=-1, dtype=torch.promote_types(logits.dtype, torch.float32))
