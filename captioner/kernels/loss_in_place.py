"""The loss of an output layer, with its gradient, without a second array as large as the logits."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

# Rows of logits in hand at once: with 10,000 words 10 MB, which a CPU's cache holds. A GPU wants large blocks, and has
# the memory.
BLOCK, GPU_BLOCK = 256, 4096


def output_loss_in_place(hidden: Tensor, weight: Tensor, bias: Tensor, columns: Tensor, smoothing: float) -> Tensor:
    """Summed cross-entropy of the logits hidden · weightᵀ + bias.

    Under autocast the products are in its format; sums are float32 or wider.

    Args:
        hidden: (P, H).
        weight: (C, H).
        bias: (C,).
        columns: (P,) int64 in 0..C-1, the right answers.
        smoothing: part of each right answer's probability that is spread evenly over all C.

    Returns:
        A scalar, float32 or wider.
    """
    device = hidden.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype
    wide = bias.to(torch.promote_types(bias.dtype, torch.float32))
    with torch.autocast(device, enabled=False):
        return _OutputLoss.apply(hidden.to(dtype), weight.to(dtype), wide, columns, smoothing, torch.is_grad_enabled())


class _OutputLoss(torch.autograd.Function):
    """The logits (P, C) are by far the largest tensor of a training step.

    They become their own gradient in place, in blocks that fit into the cache, instead of being written and read anew
    by log-softmax, the loss and the backward of both.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor, columns: Tensor, smoothing: float, grads: bool
    ) -> Tensor:
        total, d_bias = bias.new_zeros(()), torch.zeros_like(bias)
        d_logits = hidden @ weight.t() if grads else None
        size = BLOCK if hidden.device.type == "cpu" else GPU_BLOCK
        for start in range(0, len(hidden), size):
            rows = slice(start, start + size)
            block = hidden[rows] @ weight.t() if d_logits is None else d_logits[rows]
            logits, answers = block.to(bias.dtype), columns[rows].unsqueeze(1)
            logits += bias
            logits -= logits.amax(1, keepdim=True)
            total -= (1 - smoothing) * logits.gather(1, answers).sum()
            if smoothing:
                total -= smoothing * logits.mean(1).sum()
            sums = logits.exp_().sum(1, keepdim=True)
            total += sums.log().sum()
            if grads:
                logits /= sums
                if smoothing:
                    logits -= smoothing / logits.shape[1]
                logits.scatter_add_(1, answers, logits.new_full(answers.shape, smoothing - 1.0))
                d_bias += logits.sum(0)
                block.copy_(logits)
        if grads:
            ctx.save_for_backward(d_logits, d_bias, hidden, weight)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_total: Tensor) -> tuple[Tensor | None, ...]:
        d_logits, d_bias, hidden, weight = ctx.saved_tensors
        d_weight = d_logits.t() @ (hidden * d_total.to(hidden.dtype))  # scaled where it is small
        return (d_logits @ weight) * d_total.to(hidden.dtype), d_weight, d_bias * d_total, None, None, None
