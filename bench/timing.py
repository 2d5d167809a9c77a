"""Interleaved timing: each round runs every contender once, so that what else the machine does hits them alike."""

import statistics
import time
from collections.abc import Callable, Mapping

import torch

from captioner.runtime.hardware import multiplies_bf16


def interleave(contenders: Mapping[str, Callable[[], object]], rounds: int = 7) -> dict[str, list[float]]:
    """Seconds of every round by contender, after one unmeasured round."""
    for contender in contenders.values():
        contender()
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(rounds):
        for name, contender in contenders.items():
            start = time.perf_counter()
            contender()
            seconds[name].append(time.perf_counter() - start)
    return seconds


def milliseconds(seconds: list[float]) -> str:
    """Median (least to greatest) in ms."""
    median, least, greatest = (1000 * value for value in (statistics.median(seconds), min(seconds), max(seconds)))
    return f"{median:.1f} ({least:.1f}-{greatest:.1f})"


def ratio(numerator: list[float], denominator: list[float]) -> str:
    """Median (least to greatest) of the rounds' ratios."""
    ratios = [a / b for a, b in zip(numerator, denominator, strict=True)]
    return f"{statistics.median(ratios):.2f} ({min(ratios):.2f}-{max(ratios):.2f})"


def dtypes(device: torch.device) -> list[torch.dtype]:
    """The precisions worth measuring: without instructions for it, bfloat16 is emulated, or refused by torch's LSTM."""
    return [torch.float32, torch.bfloat16] if multiplies_bf16(device) else [torch.float32]
