"""How much memory a piece of work takes, as the system or the GPU's allocator counts it."""

import contextlib
import ctypes
import gc
import sys
from collections.abc import Callable
from pathlib import Path

import torch

_STATUS = Path("/proc/self/status")
_CLEAR = Path("/proc/self/clear_refs")


def peak_bytes(work: Callable[[], object], device: torch.device) -> int | None:
    """The most bytes that `work` had at a time on top of what was there before it; None where nobody tells.

    On a GPU those of its allocator, else those of the whole process, to some hundred kilobytes. (macOS only tells by
    how much the process grew beyond its largest size ever.)
    """
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        work()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    if sys.platform == "win32":
        work()
        return None
    if not _CLEAR.exists():
        before = _largest_ever()
        work()
        return _largest_ever() - before
    with contextlib.suppress(AttributeError):  # not in every libc
        ctypes.CDLL(None).malloc_trim(0)  # else the work would reuse what earlier work has freed
    _CLEAR.write_text("5")  # proc(5): the peak begins anew
    before = _resident_kilobytes("VmRSS")
    work()
    return 1024 * (_resident_kilobytes("VmHWM") - before)


def _resident_kilobytes(name: str) -> int:
    return next(int(line.split()[1]) for line in _STATUS.read_text().splitlines() if line.startswith(name))


def _largest_ever() -> int:
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
