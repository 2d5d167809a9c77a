"""An LSTM layer over captions of different lengths, with its gradient, for CPUs.

It computes what torch.nn.LSTM does (Hochreiter & Schmidhuber 1997; gates in torch's order i, f, g, o). On a CPU torch
leaves the gradient of packed sequences to autograd, which multiplies anew at every step to get the weights' gradients
and adds up arrays as large as all steps together. Written out, all steps share one product for each gradient, and what
the derivatives of the activations need is computed for all of them at once.

Letters: P rows of a packed batch, E inputs, H hidden. The rows lie step by step; step t has counts[t] of them, those of
the captions that are still running, never more than the step before.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def lstm_layer(inputs: Tensor, w_ih: Tensor, w_hh: Tensor, bias: Tensor, counts: list[int]) -> Tensor:
    """The hidden states (P, H) of inputs (P, E), beginning with zeros.

    Under autocast the products are in its format, and so is the result; cells and activations are float32 or wider.

    Args:
        w_ih: (4H, E).
        w_hh: (4H, H).
        bias: (4H,), of both products together.
        counts: rows of each step.
    """
    device = inputs.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else w_ih.dtype
    with torch.autocast(device, enabled=False):
        return _Layer.apply(*(tensor.to(dtype) for tensor in (inputs, w_ih, w_hh, bias)), counts)


class _Layer(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, inputs: Tensor, w_ih: Tensor, w_hh: Tensor, bias: Tensor, counts: list[int]) -> Tensor:
        width = w_hh.shape[1]
        wide = torch.promote_types(inputs.dtype, torch.float32)
        gates = torch.addmm(bias, inputs, w_ih.t()).to(wide)  # (P, 4H), turned into the activations step by step
        cells, tanhs = gates.new_empty(2, len(inputs), width)
        hidden = inputs.new_empty(len(inputs), width)
        for rows, before in _steps(counts):
            now = gates[rows]
            if before is not None:
                now += hidden[before] @ w_hh.t()
            i, f, g, o = now.chunk(4, dim=1)
            now[:, : 2 * width].sigmoid_()
            torch.mul(i, g.tanh_(), out=cells[rows])
            if before is not None:
                cells[rows].addcmul_(f, cells[before])
            torch.tanh(cells[rows], out=tanhs[rows])
            hidden[rows] = o.sigmoid_() * tanhs[rows]
        ctx.save_for_backward(inputs, w_ih, w_hh, gates, cells, tanhs, hidden)
        ctx.counts = counts
        return hidden

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_hidden: Tensor) -> tuple[Tensor | None, ...]:
        # gradient of the result, result -> gradient of the argument
        sigmoid_backward, tanh_backward = torch.ops.aten.sigmoid_backward, torch.ops.aten.tanh_backward
        inputs, w_ih, w_hh, gates, cells, tanhs, hidden = ctx.saved_tensors
        d_gates = torch.empty_like(gates, dtype=w_hh.dtype)
        d_bias = gates.new_zeros(gates.shape[1])
        d_h = d_c = gates.new_zeros(0, cells.shape[1])  # what the step after this one passes back
        steps = _steps(ctx.counts)
        for rows, before in reversed(steps):
            i, f, g, o = gates[rows].chunk(4, dim=1)
            d_hidden_now = d_hidden[rows].to(gates.dtype, copy=True)
            d_hidden_now[: len(d_h)] += d_h
            d_cell = tanh_backward(d_hidden_now * o, tanhs[rows])
            d_cell[: len(d_c)] += d_c
            d_f = torch.zeros_like(f) if before is None else sigmoid_backward(d_cell * cells[before], f)
            d_i, d_g = sigmoid_backward(d_cell * g, i), tanh_backward(d_cell * i, g)
            d_o = sigmoid_backward(d_hidden_now * tanhs[rows], o)
            d_now = torch.cat([d_i, d_f, d_g, d_o], 1)
            d_bias += d_now.sum(0)
            d_gates[rows] = d_now
            if before is not None:
                d_h, d_c = d_gates[rows] @ w_hh, d_cell * f
        previous = torch.cat([hidden[:0], *(hidden[before] for _, before in steps if before)])
        d_w_hh = d_gates[ctx.counts[0] :].t() @ previous  # the first step has no step before it
        return d_gates @ w_ih, d_gates.t() @ inputs, d_w_hh, d_bias.to(w_hh.dtype), None


def _steps(counts: list[int]) -> list[tuple[slice, slice | None]]:
    """The rows of each step, and those of the same captions at the step before."""
    steps: list[tuple[slice, slice | None]] = []
    start, before = 0, None
    for t, count in enumerate(counts):
        if t > 0:
            before = slice(start - counts[t - 1], start - counts[t - 1] + count)
        steps.append((slice(start, start + count), before))
        start += count
    return steps
