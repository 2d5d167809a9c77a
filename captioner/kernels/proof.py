"""Whether a fast form computes what the plain one does, on this machine and with this PyTorch."""

import logging
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

log = logging.getLogger(__name__)


class Kernel:
    """A fast form of something that plain torch computes too; used where a small example has shown them equal.

    Args:
        name: for messages.
        example: on a device, pairs of what the fast form and what the plain one compute.
        tolerance: the largest difference, as a part of the largest value.
    """

    def __init__(
        self, name: str, example: Callable[[torch.device], Iterable[tuple[Tensor, Tensor]]], tolerance: float = 1e-4
    ) -> None:
        self.name, self.example, self.tolerance = name, example, tolerance
        self.verdicts: dict[str, bool] = {}  # by type of device
        self._lock = threading.Lock()

    def works(self, device: torch.device) -> bool:
        """Whether the fast form may be used there; the first question in a process takes some milliseconds.

        Where the answer is no, one warning says why.
        """
        if device.type not in self.verdicts:
            with self._lock:
                if device.type not in self.verdicts:
                    self.verdicts[device.type] = self._prove(device)
        return self.verdicts[device.type]

    def refused(self, device: torch.device) -> bool:
        """Whether its example has failed there."""
        return not self.verdicts.get(device.type, True)

    def _prove(self, device: torch.device) -> bool:
        try:
            # In a thread of its own, for which neither the caller's autocast and gradient modes hold nor anything that
            # watches the caller's operations.
            with ThreadPoolExecutor(1) as thread:
                differences = thread.submit(self._differences, device).result()
        except torch.OutOfMemoryError:  # says nothing about the operators
            raise
        # Whatever the operators do that a PyTorch has no promise about: captions matter more than their speed.
        except Exception as error:
            first_line = (str(error).splitlines() or [""])[0]
            log.warning("%s: not used, plain torch instead (%s: %s)", self.name, type(error).__name__, first_line)
            return False
        wrong = [difference for difference in differences if not difference <= self.tolerance]  # nan is wrong too
        if wrong:
            log.warning("%s: not used, plain torch instead (its numbers are off by %.2g)", self.name, max(wrong))
        return not wrong

    def _differences(self, device: torch.device) -> list[float]:
        """Of each pair, the largest difference as a part of the largest value."""
        differences = []
        for found, wanted in self.example(device):
            if found.shape != wanted.shape:
                raise ValueError(f"shape {tuple(found.shape)} where {tuple(wanted.shape)} was meant")
            found, wanted = found.detach().cpu().double(), wanted.detach().cpu().double()
            differences.append(float((found - wanted).abs().max() / wanted.abs().max()))
        return differences
