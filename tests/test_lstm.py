"""The LSTM layer for CPUs against torch.nn.LSTM and finite differences."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from captioner.kernels.lstm import lstm_layer

SHAPES = ([4], [1, 1, 1], [5, 5, 4, 2, 2, 1])


def make_lstm(dtype: torch.dtype = torch.float64) -> nn.LSTM:
    torch.manual_seed(0)
    return nn.LSTM(3, 6).to(dtype)


def run(lstm: nn.LSTM, inputs: Tensor, counts: list[int]) -> Tensor:
    bias = lstm.bias_ih_l0 + lstm.bias_hh_l0
    return lstm_layer(inputs, lstm.weight_ih_l0, lstm.weight_hh_l0, bias, counts)


@pytest.mark.parametrize("counts", SHAPES)
def test_states_and_gradients_are_those_of_nn_lstm(counts):
    lstm, weights = make_lstm(), torch.randn(sum(counts), 6).double()
    inputs = torch.randn(sum(counts), 3).double().requires_grad_()
    expected = lstm(PackedSequence(inputs, torch.tensor(counts)))[0].data
    hidden = run(lstm, inputs, counts)
    torch.testing.assert_close(hidden, expected)
    wanted = [inputs, *lstm.parameters()]
    theirs = torch.autograd.grad((expected * weights).sum(), wanted)
    for ours, gradient in zip(torch.autograd.grad((hidden * weights).sum(), wanted), theirs, strict=True):
        torch.testing.assert_close(ours, gradient)


def test_gradients_agree_with_finite_differences():
    lstm, counts = make_lstm(), SHAPES[-1]
    inputs = torch.randn(sum(counts), 3).double().requires_grad_()
    arguments = inputs, lstm.weight_ih_l0, lstm.weight_hh_l0, lstm.bias_ih_l0
    assert torch.autograd.gradcheck(lambda *tensors: lstm_layer(*tensors, counts), arguments)


def test_autocast_rounds_products_only():
    lstm, counts = make_lstm(torch.float32), [64] * 12
    inputs = torch.randn(sum(counts), 3)
    exact = run(lstm, inputs, counts)
    exact.sum().backward()
    expected = [parameter.grad.clone() for parameter in lstm.parameters()]
    lstm.zero_grad()
    with torch.autocast("cpu", torch.bfloat16):
        hidden = run(lstm, inputs, counts)
    hidden.float().sum().backward()
    assert hidden.dtype == torch.bfloat16
    assert (hidden - exact).abs().max() < 0.02
    for parameter, gradient in zip(lstm.parameters(), expected, strict=True):
        assert parameter.grad.dtype == torch.float32
        assert (parameter.grad - gradient).norm() < 0.02 * gradient.norm()
