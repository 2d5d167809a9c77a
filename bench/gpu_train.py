"""Training on a GPU: speed of frozen and of fine-tuning training, waiting for data, memory, and what bounds it.

The data is of COCO's shape (20,000 real pictures); an epoch of COCO's 113,287 training pictures is projected.
"""

import itertools
import os
import tempfile
import time
from pathlib import Path

import torch

from bench.coco_shaped import CAPTIONS, V, make_dataset
from captioner.data.batches import TrainingBatches, prefetch
from captioner.data.dataset import Dataset
from captioner.model.caption_model import CaptionModel
from captioner.model.config import ModelConfig
from captioner.runtime.memory import keep_freed_memory
from captioner.runtime.precision import training_dtype
from captioner.runtime.processes import Processes
from captioner.training.loop import update
from captioner.training.trainer import Rule, Trainer

EPOCH_IMAGES = 113_287
TARGETS = {"frozen": 60, "fine-tuning": 180}  # seconds an epoch
BATCHES = (16, 64, 128, 256, 512)
WARM_UP, PROFILED = 10, 5
ALONE = Processes()


def run() -> None:
    """Print the tables; needs a GPU, and 4 GB of temporary files."""
    if not torch.cuda.is_available():
        print("bench gpu_train: needs a CUDA GPU; there is none here")
        return
    measure(torch.device("cuda"), ModelConfig(V), num_images=20_000, batches=BATCHES, num_iterations=100)


def measure(
    device: torch.device, config: ModelConfig, *, num_images: int, batches: tuple[int, ...], num_iterations: int
) -> None:
    """Print images/s by batch size, and a profile at the best one, for both kinds of training."""
    keep_freed_memory()
    dtype = training_dtype("auto", device)
    print(
        f"{num_images:,} pictures, {CAPTIONS} captions each, {config.cnn_layer}, {dtype}, {os.cpu_count()} CPU cores\n"
    )
    print("| training | batch | it/s | images/s | waiting for data | peak memory, GB | epoch of COCO, s | target, s |")
    print("|---|---|---|---|---|---|---|---|")
    best = {}
    with tempfile.TemporaryDirectory() as folder:
        dataset = make_dataset(Path(folder), num_images)
        for kind, size in itertools.product(TARGETS, batches):
            trainer = make_trainer(config, device, dtype)
            seconds, waited = time_steps(trainer, dataset, size, num_iterations, finetune=kind == "fine-tuning")
            rate = num_iterations * size / seconds
            memory = torch.cuda.max_memory_allocated(device) / 1e9 if device.type == "cuda" else float("nan")
            print(
                f"| {kind} | {size} | {num_iterations / seconds:.2f} | {rate:.0f} | {100 * waited / seconds:.0f} % "
                f"| {memory:.1f} | {EPOCH_IMAGES / rate:.0f} | {TARGETS[kind]} |",
                flush=True,
            )
            del trainer  # before the next one is made, whose peak of memory is measured
            best[kind] = max(best.get(kind, (0.0, 0)), (rate, size))
        for kind, (_, size) in best.items():
            print(f"\nWhat bounds {kind} at batch {size}, {PROFILED} iterations:\n")
            profile(make_trainer(config, device, dtype), dataset, size, finetune=kind == "fine-tuning")


def make_trainer(
    config: ModelConfig, device: torch.device, dtype: torch.dtype, processes: Processes = ALONE
) -> Trainer:
    """As caption-train makes it by default, with random weights."""
    torch.manual_seed(0)
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    return Trainer(
        CaptionModel(config).to(device),
        lm_rule=Rule("adam", learning_rate=4e-4, alpha=0.8, beta=0.999, epsilon=1e-8),
        cnn_rule=Rule("adam", learning_rate=1e-5, alpha=0.8, beta=0.999, epsilon=1e-8),
        finetune_from_block=1,
        grad_clip=0.1,
        cnn_weight_decay=0.0,
        accumulate=1,
        dtype=dtype,
        seed=0,
        processes=processes,
    )


def time_steps(
    trainer: Trainer, dataset: Dataset, batch_size: int, num_iterations: int, *, finetune: bool
) -> tuple[float, float]:
    """Seconds for that many iterations after warming up, and how many of them went into waiting for data."""
    on_gpu = trainer.device.type == "cuda"
    batches = TrainingBatches(
        dataset,
        dataset.captioned_indices("train"),
        batch_size=batch_size,
        seq_per_img=CAPTIONS,
        seed=0,
        shuffle=True,
    )
    jobs = (
        (lambda k=k: batches(k).pin() if on_gpu else batches(k)) for k in range(WARM_UP + num_iterations)
    )  # as caption-train reads ahead
    workers = min(8, os.cpu_count() or 1)
    began = waited = 0.0
    stream = prefetch(jobs, workers, ahead=2 * workers)
    for iteration in range(WARM_UP + num_iterations):
        if iteration == WARM_UP:
            waited, began = 0.0, time.perf_counter()
        asked = time.perf_counter()
        batch = next(stream)
        waited += time.perf_counter() - asked
        loss = update(trainer, batch, iteration, rate_factor=1.0, finetune=finetune)
        if iteration == WARM_UP - 1:
            loss.item()  # nothing of the warming up is left to do when the clock starts
    loss.item()
    return time.perf_counter() - began, waited


def profile(trainer: Trainer, dataset: Dataset, batch_size: int, *, finetune: bool) -> None:
    """Print the operations that take most of the device's time."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    on_gpu = trainer.device.type == "cuda"
    if on_gpu:
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities) as profiler:
        time_steps(trainer, dataset, batch_size, PROFILED, finetune=finetune)
    key = "self_device_time_total" if on_gpu else "self_cpu_time_total"
    rows = sorted(profiler.key_averages(), key=lambda row: getattr(row, key), reverse=True)
    total = sum(getattr(row, key) for row in rows) or 1
    print("| operation | share of the device's busy time | calls |\n|---|---|---|")
    for row in rows[:10]:
        print(f"| {row.key[:60]} | {100 * getattr(row, key) / total:.1f} % | {row.count} |")
