"""Which device computes, at which precision, and which of several processes this one is."""

import contextlib
import ctypes
import datetime
import logging
import os
import re
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.rendezvous import rendezvous

from captioner.errors import InputError

log = logging.getLogger(__name__)

Precision = Literal["auto", "fp32", "bf16", "fp16", "int8"]
# malloc.h of glibc
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, LARGEST_BLOCK = -1, -3, 2**30

# A killed rank must stop the others soon, not after the default half hour; feature caching of rank 0 takes minutes.
PATIENCE = datetime.timedelta(minutes=10)

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


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


def inference_dtype(precision: Precision, device: torch.device) -> torch.dtype:
    """The CNN's number format for captioning; "auto" is bfloat16 where the hardware multiplies it natively."""
    if precision != "auto":
        return PRECISIONS[precision]
    if multiplies_bf16(device):
        return torch.bfloat16
    return torch.float16 if device.type == "cuda" else torch.float32


def training_dtype(precision: Precision, device: torch.device) -> torch.dtype:
    """The format of autocast in training; "auto" is bfloat16 where the hardware multiplies it natively."""
    if precision == "fp16":
        raise InputError(
            "--precision fp16 cannot train: its gradients underflow", expected="auto, fp32 or bf16 (same speed as fp16)"
        )
    if precision != "auto":
        return PRECISIONS[precision]
    return torch.bfloat16 if multiplies_bf16(device) else torch.float32


def multiplies_bf16(device: torch.device) -> bool:
    """Whether the hardware has instructions for products in bfloat16."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type == "cpu":
        # Without these instructions oneDNN emulates bfloat16, slower than float32.
        with contextlib.suppress(AttributeError, RuntimeError):
            return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return False


def keep_freed_memory() -> None:
    """Keep glibc from handing large freed blocks back to the kernel: VGG16 asks for the same ones image after image.

    Getting them back costs page faults, a third of the time of a batch on a CPU. Elsewhere than on glibc: no effect.
    """
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(M_MMAP_THRESHOLD, LARGEST_BLOCK)
        libc.mallopt(M_TRIM_THRESHOLD, LARGEST_BLOCK)


def prepare_for_inference(module: nn.Module, dtype: torch.dtype) -> None:
    """Bring a CNN's weights, in place, to the number format and memory layout that convolve fastest."""
    module.to(dtype).to(memory_format=torch.channels_last)


@dataclass(frozen=True)
class Processes:
    """This process among those that `torchrun` started; one of one without it."""

    rank: int = 0
    size: int = 1

    @property
    def is_main(self) -> bool:
        """True in the one process that writes files and logs."""
        return self.rank == 0

    def share(self, count: int) -> range:
        """The positions 0..count-1 that are this process's, interleaved so that shares differ by one at most."""
        return range(self.rank, count, self.size)

    def sum_(self, tensors: list[Tensor]) -> None:
        """Replace each tensor by its sum over all processes, in one message per number format."""
        if self.size == 1:
            return
        for dtype in sorted({tensor.dtype for tensor in tensors}, key=str):
            group = [tensor for tensor in tensors if tensor.dtype == dtype]
            flat = torch.cat([tensor.reshape(-1) for tensor in group])
            with _peers_needed():
                dist.all_reduce(flat)
            for tensor, total in zip(group, flat.split([t.numel() for t in group]), strict=True):
                tensor.copy_(total.view_as(tensor))

    def gather(self, value: Any) -> list[Any]:
        """Every process's value, in order of rank, in every process."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        with _peers_needed():
            dist.all_gather_object(values, value)
        return values

    def largest(self, value: int) -> int:
        """The largest of all processes' values, in every process."""
        return max(self.gather(value))

    def wait(self) -> None:
        """Go on only when every process has come this far."""
        if self.size > 1:
            with _peers_needed():
                dist.barrier()


@contextlib.contextmanager
def _peers_needed() -> Iterator[None]:
    """One line instead of a traceback where another process is gone: that one has said why, or was killed."""
    try:
        yield
    except RuntimeError as error:  # gloo's and nccl's own kinds derive from it
        reason = re.sub(r"^\[\S+\] ", "", str(error)).partition(". ")[0]  # without the place in gloo's source
        raise InputError(
            f"another process of this run has ended ({reason[:200]})",
            remedy="see its own last line; repeat the command to go on (with training: --resume auto)",
        ) from error


def _agree_on_a_name(store: dist.Store, rank: int, size: int) -> str:
    """A name for what these processes tell each other through the store, which nobody has used before.

    torchrun keeps its store when it starts killed processes anew. Without a new name each time they would take the
    addresses of the dead for those of the living. The first process answers the questions that the others ask under
    numbers of their own, until all have heard the answer; old questions stay there, but nobody waits for their answer.
    """
    if rank > 0:
        question = f"captioner/answer/{uuid.uuid4().hex}"
        store.set(f"captioner/question/{rank}", question)
        store.wait([question], PATIENCE)
        name = store.get(question).decode()
        store.add(f"{name}/heard", 1)
        return name
    name, deadline = f"captioner/{uuid.uuid4().hex}", time.monotonic() + PATIENCE.total_seconds()
    questions = [f"captioner/question/{other}" for other in range(1, size)]
    while (heard := store.add(f"{name}/heard", 0)) < size - 1:
        if time.monotonic() > deadline:
            raise InputError(f"{heard + 1} of {size} processes have started", remedy="start all of them")
        for question in questions:
            if store.check([question]):
                store.set(store.get(question).decode(), name)
        time.sleep(0.02)
    return name


@contextlib.contextmanager
def process_group(device: torch.device) -> Iterator[Processes]:
    """Join the processes `torchrun` started (its environment variables tell); alone without it."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield Processes()
        return
    backend = "nccl" if device.type == "cuda" else "gloo"
    with _peers_needed():
        store, rank, size = next(rendezvous("env://", timeout=PATIENCE))
        store = dist.PrefixStore(_agree_on_a_name(store, rank, size), store)
        dist.init_process_group(backend, timeout=PATIENCE, store=store, rank=rank, world_size=size)
    processes = Processes(rank, size)
    try:
        if not processes.is_main:
            logging.getLogger().setLevel(logging.ERROR)  # what there is to say, the main process says
        yield processes
    finally:
        dist.destroy_process_group()
