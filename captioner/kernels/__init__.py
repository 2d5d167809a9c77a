"""The door to what is only there to be fast; everybody else calls what stands on this page.

Behind each function and class stands a fast form, in a file of its own in this folder, and a plain one in torch's
documented interface, which is the reference. The fast ones partly use operators that PyTorch makes no promise about.
So each is proved before its first use in a process: a small example must give what the plain form gives. If it raises,
or gives other numbers, one warning says so and the plain form does the work.

Letters: P rows of a packed batch, E inputs, H hidden, C classes, R rows of a search.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import PackedSequence

from captioner.kernels.block_topk import BLOCK, topk_by_blocks
from captioner.kernels.int8 import Int8Convolutions
from captioner.kernels.loss_in_place import output_loss_in_place
from captioner.kernels.lstm import lstm_layer
from captioner.kernels.packed_linear import PackedLinear
from captioner.kernels.proof import Kernel
from captioner.runtime.hardware import multiplies_bf16, multiplies_int8

CPU = torch.device("cpu")
NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.float64: "fp64"}


def arithmetic(dtype: torch.dtype, device: torch.device, *, int8: bool = False) -> str:
    """What a run computes with, for people: "fp32", "bf16", "int8 convolutions + bf16", and what is plain torch.

    Args:
        dtype: of the products.
        int8: whether the convolutions are in 8-bit integers.
    """
    refused = [kernel.name for kernel in KERNELS if kernel.refused(device)]
    text = f"int8 convolutions + {NAMES[dtype]}" if int8 else NAMES[dtype]
    return f"{text} (plain torch: {', '.join(refused)})" if refused else text


def prove_for_search(device: torch.device) -> None:
    """Prove now what every search uses, rather than at its first step."""
    TOPK.works(device)


def prove_for_training(device: torch.device) -> None:
    """Prove now what training uses, rather than in its first iteration."""
    OUTPUT_LOSS.works(device)
    if device.type == "cpu":
        LSTM.works(device)


# --- the LSTM of a training batch -------------------------------------------------------------------------------------


def run_lstm(lstm: nn.LSTM, inputs: Tensor, counts: list[int]) -> Tensor:
    """Hidden states (P, H) of the last layer for inputs (P, E), counts[t] rows of which belong to step t."""
    if inputs.device.type != "cpu" or not LSTM.works(inputs.device):
        return _plain_lstm(lstm, inputs, counts)
    for layer in range(lstm.num_layers):
        w_ih, w_hh, b_ih, b_hh = lstm_weights(lstm, layer)
        inputs = inputs if layer == 0 else dropout(inputs, lstm.dropout, lstm.training)
        inputs = lstm_layer(inputs, w_ih, w_hh, b_ih + b_hh, counts)
    return inputs


def lstm_weights(lstm: nn.LSTM, layer: int) -> list[Tensor]:
    """(4H, E), (4H, H), (4H,), (4H,): weights and biases from the input and from the hidden state."""
    return [getattr(lstm, f"{kind}_l{layer}") for kind in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")]


def _plain_lstm(lstm: nn.LSTM, inputs: Tensor, counts: list[int]) -> Tensor:
    # In float32: cuDNN's LSTM has no bfloat16, and under autocast to that it would take float16, whose range is small.
    with torch.autocast(inputs.device.type, enabled=False):
        return lstm(PackedSequence(inputs.to(lstm_weights(lstm, 0)[0].dtype), torch.tensor(counts)))[0].data


def _lstm_example(device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
    with torch.random.fork_rng(devices=[]):
        lstm = nn.LSTM(3, 5)
    _fixed(lstm.to(device))
    inputs = _random(9, 3, device=device).requires_grad_()
    counts, wanted = [4, 3, 2], [inputs, *lstm.parameters()]
    w_ih, w_hh, b_ih, b_hh = lstm_weights(lstm, 0)
    fast = lstm_layer(inputs, w_ih, w_hh, b_ih + b_hh, counts)
    plain = _plain_lstm(lstm, inputs, counts)
    yield fast, plain
    weights = _random(9, 5, device=device)
    yield from zip(
        torch.autograd.grad((fast * weights).sum(), wanted),
        torch.autograd.grad((plain * weights).sum(), wanted),
        strict=True,
    )


LSTM = Kernel("LSTM layer with its own gradient", _lstm_example)


def dropout(hidden: Tensor, drop_prob: float, training: bool) -> Tensor:
    """As F.dropout, whose own random numbers take four times as long on a CPU."""
    if not training or drop_prob == 0:
        return hidden
    kept = torch.rand(hidden.shape, device=hidden.device) >= drop_prob
    return hidden * (kept / (1 - drop_prob)).to(hidden.dtype)


# --- the loss of the output layer -------------------------------------------------------------------------------------


def output_loss(hidden: Tensor, weight: Tensor, bias: Tensor, columns: Tensor, smoothing: float = 0.0) -> Tensor:
    """Cross-entropy of the logits hidden · weightᵀ + bias, summed.

    Under autocast the products are in its format; sums are float32 or wider.

    Args:
        hidden: (P, H).
        weight: (C, H).
        bias: (C,).
        columns: (P,) int64 in 0..C-1, the right answers.
        smoothing: part of each right answer's probability that is spread evenly over all C (Szegedy et al. 2016).
    """
    form = output_loss_in_place if OUTPUT_LOSS.works(hidden.device) else _plain_output_loss
    return form(hidden, weight, bias, columns, smoothing)


def _plain_output_loss(hidden: Tensor, weight: Tensor, bias: Tensor, columns: Tensor, smoothing: float) -> Tensor:
    logits = F.linear(hidden, weight, bias).to(_wide(bias))
    return F.cross_entropy(logits, columns, reduction="sum", label_smoothing=smoothing)


def _output_loss_example(device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
    inputs = [_random(*shape, device=device).requires_grad_() for shape in ((6, 4), (7, 4), (7,))]
    hidden, weight, bias = inputs
    columns = torch.tensor([0, 6, 3, 3, 1, 5], device=device)
    for smoothing in (0.0, 0.25):
        fast = output_loss_in_place(hidden, weight, bias, columns, smoothing)
        plain = _plain_output_loss(hidden, weight, bias, columns, smoothing)
        yield fast, plain
        yield from zip(torch.autograd.grad(2 * fast, inputs), torch.autograd.grad(2 * plain, inputs), strict=True)


OUTPUT_LOSS = Kernel("output layer's loss in place", _output_loss_example)


# --- linear layers of a search in bfloat16 ----------------------------------------------------------------------------


def can_pack(device: torch.device) -> bool:
    """Whether `PackedLinear` is faster there than nn.Linear in bfloat16, and equal."""
    return device.type == "cpu" and multiplies_bf16(device) and PACKED_LINEAR.works(device)


def _packed_linear_example(device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
    weight, bias = _random(24, 32, device=device).bfloat16(), _random(24, device=device).bfloat16()
    for rows in (3, 16):
        inputs = _random(rows, 32, device=device).bfloat16()
        yield PackedLinear(weight, bias)(inputs), F.linear(inputs, weight, bias)


PACKED_LINEAR = Kernel("packed linear layer", _packed_linear_example, tolerance=0.02)


# --- convolutions in 8-bit integers -----------------------------------------------------------------------------------


def can_int8(device: torch.device) -> bool:
    """Whether `Int8Convolutions` are fast there, and exact: older CPUs add pairs of products in 16 bits."""
    return multiplies_int8(device) and INT8.works(device)


def _int8_example(device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
    with torch.random.fork_rng(devices=[]):
        layers = (nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2))
        features = nn.Sequential(*layers)
    _fixed(features.to(device))
    images = (90 + 60 * _random(2, 3, 6, 6, device=device)).clamp(-100, 150)
    with torch.no_grad():
        for name, parameter in features.named_parameters():
            if name.endswith("weight"):  # all at the largest level, so that sums get as large as they can
                parameter.copy_(0.3 * parameter.sign())
        inner = float(features[:2](images).max())
        yield Int8Convolutions(features, (-100.0, 150.0), [inner])(images), features(images)


# 8 bits round two layers by up to 1 %; sums that overflow, a wrong scale or border are off by 5 % and more.
INT8 = Kernel("8-bit convolutions", _int8_example, tolerance=0.03)


# --- the best words of a search step ----------------------------------------------------------------------------------


def topk(values: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """`values.topk(count)` along the last dimension: values and indices, greatest first."""
    return topk_by_blocks(values, count) if TOPK.works(values.device) else _plain_topk(values, count)


def _plain_topk(values: Tensor, count: int) -> tuple[Tensor, Tensor]:
    found = values.topk(count)
    return found.values, found.indices


def _topk_example(device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
    size = 5 * BLOCK + 3
    values = torch.stack([torch.randperm(size, generator=torch.Generator().manual_seed(seed)) for seed in range(3)])
    values = values.float().to(device)
    yield from zip(topk_by_blocks(values, 2), _plain_topk(values, 2), strict=True)


TOPK = Kernel("top-k by blocks", _topk_example, tolerance=0.0)


KERNELS: Sequence[Kernel] = (LSTM, OUTPUT_LOSS, PACKED_LINEAR, INT8, TOPK)


def _random(*shape: int, device: torch.device) -> Tensor:
    """Normal numbers, always the same, without a draw from torch's own generator."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape))).to(device)


@torch.no_grad()
def _fixed(module: nn.Module) -> None:
    """Give a module weights that are always the same."""
    for parameter in module.parameters():
        parameter.copy_(0.3 * _random(*parameter.shape, device=parameter.device))


def _wide(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)
