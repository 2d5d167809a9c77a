"""The update rules against traces computed by the original, and against the formulas where the rate changes."""

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from captioner.errors import InputError
from captioner.training.optim import clip_elementwise, learning_rate, make_optimizer
from captioner.training.options import RULES

ORIGINALS = [name for name in RULES if name != "adamw"]
TRACES = Path(__file__).parent / "data" / "neuraltalk2" / "optim.json"


@pytest.fixture(scope="module")
def traces() -> dict:
    return json.loads(TRACES.read_text())


def values_of(rows: object, dtype: torch.dtype) -> torch.Tensor:
    return torch.tensor(rows, dtype=torch.float64).to(dtype)


def run(name: str, x0: torch.Tensor, grads: torch.Tensor, **hyper: float) -> torch.Tensor:
    x = nn.Parameter(x0.clone())
    optimizer = make_optimizer(name, [x], **hyper)
    steps = []
    for grad in grads:
        x.grad = grad.clone()
        optimizer.step()
        steps.append(x.detach().clone())
    return torch.stack(steps)


@pytest.mark.parametrize("kind", ["double", "float"])
@pytest.mark.parametrize("name", [*ORIGINALS, "adam_default"])
def test_twenty_steps_equal_the_originals(traces: dict, name: str, kind: str) -> None:
    dtype = {"double": torch.float64, "float": torch.float32}[kind]
    hyper = dict(traces["hyper"])
    if name == "adam_default":
        hyper.update(alpha=0.9, beta=0.999, eps=1e-8)
    got = run(name.split("_")[0], values_of(traces["x0"], dtype), values_of(traces["grads"], dtype), **hyper)
    expected = values_of(traces[f"x_{kind}"][name], dtype)
    tolerance = {"double": 1e-13, "float": 2e-6}[kind]
    torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("nesterov", [False, True])
def test_momentum_keeps_the_rate_inside_the_velocity_when_it_decays(nesterov: bool) -> None:
    x = nn.Parameter(torch.zeros(1, dtype=torch.float64))
    optimizer = make_optimizer("sgdmom" if nesterov else "sgdm", [x], lr=1.0, alpha=0.5, beta=0, eps=0)
    expected, v = 0.0, 0.0
    for lr, grad in [(1.0, 1.0), (0.5, 2.0), (0.1, -1.0)]:
        optimizer.param_groups[0]["lr"] = lr
        x.grad = torch.full_like(x, grad)
        optimizer.step()
        v = 0.5 * v + lr * grad
        expected -= 0.5 * v + lr * grad if nesterov else v
        assert x.item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("name", RULES)
def test_a_restored_state_continues_exactly(traces: dict, name: str) -> None:
    grads = values_of(traces["grads"], torch.float32)
    whole = run(name, values_of(traces["x0"], torch.float32), grads, **traces["hyper"])
    first = nn.Parameter(values_of(traces["x0"], torch.float32))
    optimizer = make_optimizer(name, [first], **traces["hyper"])
    for grad in grads[:7]:
        first.grad = grad.clone()
        optimizer.step()
    second = nn.Parameter(first.detach().clone())
    resumed = make_optimizer(name, [second], **traces["hyper"])
    resumed.load_state_dict(optimizer.state_dict())
    for grad in grads[7:]:
        second.grad = grad.clone()
        resumed.step()
    assert torch.equal(second, whole[-1])


@pytest.mark.parametrize("name", RULES)
def test_parameters_without_gradient_stay(name: str) -> None:
    used, unused = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    optimizer = make_optimizer(name, [used, unused], lr=0.1, alpha=0.8, beta=0.9, eps=1e-8)
    used.grad = torch.ones(2)
    optimizer.step()
    assert torch.equal(unused, torch.ones(2)) and not torch.equal(used, torch.ones(2))


def test_unknown_rule_and_bad_values_are_input_errors() -> None:
    p = [nn.Parameter(torch.ones(1))]
    with pytest.raises(InputError, match="one of rmsprop, sgd"):
        make_optimizer("lbfgs", p, lr=0.1, alpha=0.8, beta=0.9, eps=1e-8)
    with pytest.raises(InputError, match="beta"):
        make_optimizer("adam", p, lr=0.1, alpha=1.5, beta=0.9, eps=1e-8)
    with pytest.raises(InputError, match="negative"):
        make_optimizer("sgdm", p, lr=-0.1, alpha=0.5, beta=0.9, eps=1e-8)


def test_schedule_is_flat_then_halves_continuously() -> None:
    def rate(i: int, start: int = 10) -> float:
        return learning_rate(i, base=0.4, decay_start=start, decay_every=20)

    assert rate(0) == rate(10) == 0.4
    assert rate(20) == pytest.approx(0.4 * 0.5**0.5)
    assert rate(30) == pytest.approx(0.2)
    assert rate(10**6, start=-1) == 0.4


def test_clipping_is_elementwise() -> None:
    p, without = nn.Parameter(torch.zeros(3)), nn.Parameter(torch.zeros(3))
    p.grad = torch.tensor([-5.0, 0.05, 0.2])
    clip_elementwise([p, without], 0.1)
    assert torch.equal(p.grad, torch.tensor([-0.1, 0.05, 0.1])) and without.grad is None
