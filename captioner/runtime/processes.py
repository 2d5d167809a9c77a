"""Which of several processes this one is, and what they tell each other."""

import contextlib
import datetime
import logging
import os
import re
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.rendezvous import rendezvous

from captioner.errors import InputError

# A rank that hangs must stop the others soon, not after the default half hour. Where one works while the others wait
# (CNN features of a large data set take hours) only its death does, which gloo notices at once.
PATIENCE, LONG_PATIENCE = datetime.timedelta(minutes=10), datetime.timedelta(days=7)


@dataclass(frozen=True)
class Processes:
    """This process among those that `torchrun` started; one of one without it."""

    rank: int = 0
    size: int = 1
    patient: Any = None  # torch's group of all processes, for what some of them may come to late

    @property
    def is_main(self) -> bool:
        """True in the one process that writes files and logs."""
        return self.rank == 0

    def share(self, count: int) -> range:
        """Those of 0..count-1 that are this process's, interleaved so that processes differ by one row at most."""
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

    def gather(self, value: Any, patient: bool = False) -> list[Any]:
        """Every process's value, in order of rank, in every process.

        Args:
            patient: whether some may come with theirs hours after the others.
        """
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        with _peers_needed():
            dist.all_gather_object(values, value, group=self.patient if patient else None)
        return values

    def largest(self, value: int, patient: bool = False) -> int:
        """The largest of all processes' values, in every process; `patient` as for `gather`."""
        return max(self.gather(value, patient))

    def smallest(self, value: int) -> int:
        """The smallest of all processes' values, in every process."""
        return min(self.gather(value))

    def wait(self) -> None:
        """Go on only when every process has come this far, however long one of them works."""
        if self.size > 1:
            with _peers_needed():
                dist.barrier(group=self.patient)


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
    # What is no tensor of a GPU goes through gloo: it notices at once that a process has gone, which nccl does not.
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    with _peers_needed():
        store, rank, size = next(rendezvous("env://", timeout=PATIENCE))
        store = dist.PrefixStore(_agree_on_a_name(store, rank, size), store)
        dist.init_process_group(backend, timeout=PATIENCE, store=store, rank=rank, world_size=size)
        patient = dist.new_group(backend="gloo", timeout=LONG_PATIENCE)
    processes = Processes(rank, size, patient)
    try:
        if not processes.is_main:
            logging.getLogger().setLevel(logging.ERROR)  # what there is to say, the main process says
        yield processes
    finally:
        dist.destroy_process_group()
