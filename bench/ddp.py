"""Gradients of several processes, summed by our own all-reduce after the backward pass or by DistributedDataParallel.

Both give the same weights; the table says so, and what each takes. Two processes on this machine's CPU, or one on each
of its GPUs. Why training keeps its own sum: docs/architecture.md.
"""

import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from bench.coco_shaped import CAPTIONS, V, random_captions
from bench.gpu_train import make_trainer
from bench.timing import milliseconds
from captioner.data.batch import Batch, KnownCaptions, PixelInputs
from captioner.model.config import ModelConfig
from captioner.runtime.memory import keep_freed_memory
from captioner.runtime.precision import training_dtype
from captioner.runtime.processes import Processes
from captioner.training.loop import update
from captioner.training.trainer import Trainer

WARM_UP = 2
Step = Callable[[Batch, int], Tensor]  # of a batch and an iteration, to the loss


def run() -> None:
    """Print the table: VGG16 with the default language model, 8 images a process on CPUs, 32 on GPUs."""
    gpus = torch.cuda.device_count()
    measure(ModelConfig(V), ranks=max(2, gpus), on_gpus=gpus >= 2, images=32 if gpus >= 2 else 8, iterations=10)


def measure(config: ModelConfig, *, ranks: int, on_gpus: bool, images: int, iterations: int) -> None:
    """Print ms an iteration and the largest difference between the weights of the two ways.

    Args:
        images: of each process.
    """
    with tempfile.TemporaryDirectory() as folder:
        arguments = (ranks, on_gpus, folder, config, images, iterations)
        torch.multiprocessing.spawn(_rank, arguments, nprocs=ranks)
        print((Path(folder) / "table").read_text(), end="")


def _rank(rank: int, ranks: int, on_gpus: bool, folder: str, config: ModelConfig, images: int, iterations: int) -> None:
    """What one process does; the first one writes the table."""
    keep_freed_memory()
    torch.set_num_threads(max(1, torch.get_num_threads() // (1 if on_gpus else ranks)))
    device = torch.device("cuda", rank) if on_gpus else torch.device("cpu")
    if on_gpus:
        torch.cuda.set_device(device)
    dist.init_process_group(
        "nccl" if on_gpus else "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=ranks
    )
    processes, dtype = Processes(rank, ranks), training_dtype("auto", device)
    lines = [f"{ranks} processes, {images} images each, on {device.type}, {dtype}", ""]
    lines += ["| training | summed | ms an iteration | weights differ by |", "|---|---|---|---|"]
    for finetune in (False, True):
        weights, times = {}, {}
        for way in ("after the backward pass", "by DistributedDataParallel"):
            trainer = make_trainer(config, device, dtype, processes)
            batch = make_batch(images, rank, pin=on_gpus)
            step = _with_ddp(trainer, finetune) if "Distributed" in way else _with_our_sum(trainer, finetune)
            times[way] = [_seconds(step, batch, iteration) for iteration in range(WARM_UP + iterations)][WARM_UP:]
            weights[way] = [parameter.detach().clone() for parameter in trainer.model.parameters()]
        one, other = weights.values()
        difference = max(float((a - b).abs().max()) for a, b in zip(one, other, strict=True))
        kind = "fine-tuning" if finetune else "frozen"
        lines += [f"| {kind} | {way} | {milliseconds(times[way])} | {difference:.1e} |" for way in times]
    if processes.is_main:
        (Path(folder) / "table").write_text("\n".join(lines) + "\n")
    dist.destroy_process_group()


def make_batch(images: int, rank: int, *, pin: bool) -> Batch:
    """A process's images, with captions of its own lengths."""
    rng = np.random.default_rng(rank)
    pixels = torch.from_numpy(rng.integers(0, 256, (images, 3, 256, 256), np.uint8))
    labels = torch.from_numpy(random_captions(rng, images * CAPTIONS).astype(np.int64))
    captions = KnownCaptions(labels, torch.arange(images).repeat_interleave(CAPTIONS))
    batch = Batch([{}] * images, list(range(images)), PixelInputs(pixels), captions)
    return batch.pin() if pin else batch


def _seconds(step: Step, batch: Batch, iteration: int) -> float:
    dist.barrier()
    began = time.perf_counter()
    step(batch, iteration).item()
    return time.perf_counter() - began


def _with_our_sum(trainer: Trainer, finetune: bool) -> Step:
    return lambda batch, iteration: update(trainer, batch, iteration, rate_factor=1.0, finetune=finetune)


class _Loss(nn.Module):
    """What DistributedDataParallel wraps: a module whose call is the loss, and whose parameters are the model's."""

    def __init__(self, trainer: Trainer) -> None:
        super().__init__()
        self.model, self._loss_sum = trainer.model, trainer.loss_sum

    def forward(self, batch: Batch) -> tuple[Tensor, int]:
        return self._loss_sum(batch)


def _with_ddp(trainer: Trainer, finetune: bool) -> Step:
    """`loop.update` with DistributedDataParallel: without pieces, and for one kind of training at a time."""
    trainer.trained(finetune)  # what needs no gradient now is left out for good
    wrapped = DistributedDataParallel(_Loss(trainer), gradient_as_bucket_view=True)

    def step(batch: Batch, iteration: int) -> Tensor:
        groups = trainer.trained(finetune)
        trainer.begin(iteration, groups)
        loss_sum, num_targets = wrapped(batch)
        (loss_sum * trainer.processes.size).backward()  # it divides by their number
        totals = torch.stack([loss_sum.detach().double(), torch.tensor(num_targets).to(loss_sum.device)])
        trainer.processes.sum_([totals])
        torch._foreach_div_(trainer.gradients(groups), totals[1].float())
        for group in groups:
            group.clip_gradients()
            group.set_learning_rate(1.0)
            group.optimizer.step()
        return (totals[0] / totals[1]).float()

    return step
