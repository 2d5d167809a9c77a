"""The original's update rules under their own names, its learning-rate schedule and its clipping.

The rules are those of neuraltalk2's misc/optim_updates.lua. torch.optim computes the same for `sgd`, `adagrad` and
`rmsprop`. It differs in two places, which the two classes here close:

- `adam` adds epsilon to sqrt(v) before the bias correction; torch.optim.Adam adds it after, so that the original's
  epsilon is torch's times sqrt(1 - beta^t).
- `sgdm` and `sgdmom` keep the learning rate inside the velocity (v = alpha v + lr g); torch.optim.SGD multiplies it on
  the way out. The two agree only while the rate stays constant, and ours decays.
"""

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

from captioner.errors import InputError
from captioner.model.checkpoint_content import TrainingHistory
from captioner.training.options import RULES, Schedule


def make_optimizer(
    name: str,
    parameters: Iterable[nn.Parameter],
    *,
    lr: float,
    alpha: float,
    beta: float,
    eps: float,
    weight_decay: float = 0.0,
) -> torch.optim.Optimizer:
    """The optimiser called `name`; change its rate through `param_groups[i]["lr"]`.

    Args:
        name: one of RULES.
        parameters: what to update, in place.
        lr: learning rate.
        alpha: momentum (sgdm, sgdmom), decay of the mean square (rmsprop), beta1 (adam, adamw); else unused.
        beta: beta2 (adam, adamw); else unused.
        eps: added to the root mean square (rmsprop, adagrad, adam, adamw); else unused.
        weight_decay: of adamw (Loshchilov & Hutter 2019), per unit of learning rate; else unused.

    Raises:
        InputError: no such rule, or a hyper-parameter outside its range.

    Source: misc/optim_updates.lua of neuraltalk2.
    """
    parameters = list(parameters)
    if name not in RULES:
        raise InputError(f"no update rule is called {name!r}", expected=f"one of {', '.join(RULES)}")
    try:
        if name == "sgd":
            return torch.optim.SGD(parameters, lr=lr)
        if name in ("sgdm", "sgdmom"):
            return _Momentum(parameters, lr=lr, alpha=alpha, nesterov=name == "sgdmom")
        if name == "adagrad":
            return torch.optim.Adagrad(parameters, lr=lr, eps=eps)
        if name == "rmsprop":
            return torch.optim.RMSprop(parameters, lr=lr, alpha=alpha, eps=eps)
        if name == "adamw":
            fused = _can_fuse(parameters)
            return torch.optim.AdamW(
                parameters, lr=lr, betas=(alpha, beta), eps=eps, weight_decay=weight_decay, fused=fused
            )
        return _Adam(parameters, lr=lr, betas=(alpha, beta), eps=eps)
    except ValueError as error:  # torch checks the ranges
        raise InputError(f"update rule {name}: {error}") from error


def learning_rate(iteration: int, *, base: float, decay_start: int, decay_every: int) -> float:
    """The rate of an iteration: `base` up to `decay_start`, then halved every `decay_every` iterations, continuously.

    A negative `decay_start` means that the rate never decays.
    """
    if decay_start < 0 or iteration <= decay_start:
        return base
    return base * 0.5 ** ((iteration - decay_start) / decay_every)


def schedule_factor(
    iteration: int,
    *,
    schedule: Schedule,
    warmup: int,
    last: int | None,
    decay_start: int,
    decay_every: int,
    reductions: int,
) -> float:
    """What multiplies the learning rates in an iteration.

    Args:
        schedule: "decay" is the original's (`learning_rate`); "cosine" falls from 1 to 0 at the iteration `last`
            (Loshchilov & Hutter 2017); "plateau" is 1, halved `reductions` times.
        warmup: the factor rises linearly over so many iterations, whatever the schedule.
    """
    rising = min(1.0, (iteration + 1) / warmup) if warmup else 1.0
    if schedule == "cosine":
        assert last is not None
        return rising * 0.5 * (1 + math.cos(math.pi * min(1.0, iteration / max(1, last))))
    if schedule == "plateau":
        return rising * 0.5**reductions
    return rising * learning_rate(iteration, base=1.0, decay_start=decay_start, decay_every=decay_every)


def without_improvement(history: TrainingHistory) -> int:
    """How many validations there were since the one of the best model."""
    qualities = _qualities(history)
    return len(qualities) - 1 - qualities.index(max(qualities)) if qualities else 0


def reductions_on_plateau(history: TrainingHistory, patience: int) -> int:
    """How often `patience` validations in a row brought no better model."""
    best, waited, reductions = -math.inf, 0, 0
    for quality in _qualities(history):
        best, waited = (quality, 0) if quality > best else (best, waited + 1)
        if waited == patience:
            waited, reductions = 0, reductions + 1
    return reductions


def _qualities(history: TrainingHistory) -> list[float]:
    """What says which model is best, validation by validation: CIDEr where it is computed, else the negative loss."""
    scores = history.val_lang_stats_history
    return [scores[k]["CIDEr"] if k in scores else -loss for k, loss in sorted(history.val_loss_history.items())]


def clip_elementwise(parameters: Iterable[nn.Parameter], limit: float) -> None:
    """Clamp every gradient element to [-limit, limit], in place; parameters without gradient are left alone."""
    nn.utils.clip_grad_value_(parameters, limit)


class _Adam(torch.optim.Adam):
    """Adam with the original's place of epsilon, on torch's fused kernel where there is one."""

    def __init__(self, parameters: list[nn.Parameter], *, lr: float, betas: tuple[float, float], eps: float) -> None:
        super().__init__(parameters, lr=lr, betas=betas, eps=eps, fused=_can_fuse(parameters))
        for group in self.param_groups:
            # Saved and restored with the groups, so that resuming continues the correction.
            group.update(original_eps=eps, steps=0)

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        for group in self.param_groups:
            group["steps"] += 1
            group["eps"] = group["original_eps"] / math.sqrt(1 - group["betas"][1] ** group["steps"])
        return super().step(closure)


def _can_fuse(parameters: list[nn.Parameter]) -> bool | None:
    return all(p.device.type in ("cpu", "cuda") and p.is_floating_point() for p in parameters) or None


class _Momentum(torch.optim.Optimizer):
    """sgdm: v = alpha v + lr g, x = x - v. sgdmom (Nesterov): x = x - (alpha v + lr g) with the new v."""

    def __init__(self, parameters: list[nn.Parameter], *, lr: float, alpha: float, nesterov: bool) -> None:
        if not (lr >= 0 and alpha >= 0):
            raise ValueError(f"the learning rate {lr} and the momentum {alpha} must not be negative")
        super().__init__(parameters, {"lr": lr, "alpha": alpha, "nesterov": nesterov})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            updated = [p for p in group["params"] if p.grad is not None]
            if not updated:
                continue
            for p in updated:
                if "velocity" not in self.state[p]:
                    self.state[p]["velocity"] = torch.zeros_like(p)
            velocity = [self.state[p]["velocity"] for p in updated]
            scaled = torch._foreach_mul([p.grad for p in updated], group["lr"])
            torch._foreach_mul_(velocity, group["alpha"])
            torch._foreach_add_(velocity, scaled)
            if group["nesterov"]:
                torch._foreach_add_(scaled, velocity, alpha=group["alpha"])
                torch._foreach_sub_(updated, scaled)
            else:
                torch._foreach_sub_(updated, velocity)
        return loss
