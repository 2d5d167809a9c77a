"""Which device computes."""

import logging
import os

import torch

from captioner.errors import InputError

log = logging.getLogger(__name__)


def device_named(name: "str | torch.device") -> torch.device:
    """The device that torch calls so: "cpu", "cuda", "cuda:1", "mps"; "auto" is the fastest kind there is.

    Raises:
        InputError: torch knows no such device, or this machine has none.
    """
    if name == "auto":
        kinds = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
        return torch.device(next(kind for kind, there in kinds.items() if there))
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # AssertionError: a PyTorch without CUDA
        reason = str(error).partition("\n")[0]
        raise InputError(f"device {name}: {reason}", expected="auto, cpu, cuda, cuda:0, .. or mps") from error
    return device


def choose_device(gpuid: int) -> torch.device:
    """The device for the original's `gpuid`: -1 is the CPU, N ≥ 0 that GPU, the CPU with a notice where there is none.

    Under `torchrun` each process of a machine takes the GPU of its local rank instead of all taking `gpuid`.

    Raises:
        InputError: the machine has GPUs, but not that one.
    """
    if gpuid < 0:
        return torch.device("cpu")
    if torch.cuda.is_available():
        index = int(os.environ["LOCAL_RANK"]) if "LOCAL_RANK" in os.environ else gpuid
        if "LOCAL_RANK" in os.environ and os.environ.get("CUDA_VISIBLE_DEVICES") and torch.cuda.device_count() == 1:
            index = 0  # who started the processes has given each of them a GPU of its own
        if index >= torch.cuda.device_count():
            raise InputError(
                f"--gpuid {index}: this machine has {torch.cuda.device_count()} GPU(s)",
                expected=f"0..{torch.cuda.device_count() - 1}, or -1 for the CPU",
            )
        torch.cuda.set_device(index)
        return torch.device("cuda", index)
    if torch.backends.mps.is_available():
        return torch.device("mps")
    log.info("no GPU here: running on the CPU (--gpuid -1 silences this line)")
    return torch.device("cpu")


def widest_float(device: torch.device) -> torch.dtype:
    """float64; float32 on Apple's GPUs, which have no wider one."""
    return torch.float32 if device.type == "mps" else torch.float64
