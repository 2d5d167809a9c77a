"""What a training run will take, before it starts: parameters, memory, disk and time.

Memory and time are measured in a few real iterations of few images, and carried forward to the whole batch: all that
depends on the images grows in proportion to them. Captions and their lengths are the data set's own.
"""

import copy
import dataclasses
import shutil
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_iter

from captioner.data.batch import Batch
from captioner.data.batches import VALIDATION_BATCH, TrainingBatches
from captioner.data.cached_features import CachedFeatures
from captioner.data.crops import IMAGE_SIZE
from captioner.data.dataset import Dataset
from captioner.data.epoch_order import EpochOrder
from captioner.model.caption_model import CaptionModel, build_model
from captioner.model.checkpoint_content import Checkpoint
from captioner.runtime.device import choose_device
from captioner.runtime.memory import keep_freed_memory
from captioner.runtime.peak_memory import peak_bytes
from captioner.runtime.precision import inference_dtype, prepare_for_inference, training_dtype
from captioner.runtime.processes import Processes, process_group
from captioner.runtime.quantities import bytes_text
from captioner.training import presets
from captioner.training.feature_cache import stand_in_features
from captioner.training.loop import update
from captioner.training.options import TrainingOptions, stages_of
from captioner.training.setup import (
    best_of_stage_before,
    cache_form,
    fresh_checkpoint,
    image_weights,
    in_words_of,
    last_iteration,
    make_trainer,
    validation_images,
)
from captioner.training.trainer import Trainer

MEASURED_SECONDS = 4.0  # what measuring the time of one kind of iteration may take, about
PROCESS_BYTES = 0.9e9  # what a training run of next to no weights and images was seen to take on Linux


def plan_training(**given: Any) -> Iterator[str]:
    """What --plan 1 prints, line by line; nothing is written or fetched, and no state is looked for.

    Args:
        given: options of caption-train by name; the others have their defaults.

    Raises:
        InputError: an option, the data or the weights are at fault.
    """
    stages = stages_of(given)
    for options in stages:
        options.check()
    keep_freed_memory()
    device = choose_device(stages[0].gpuid)
    with process_group(device) as processes:
        if processes.is_main:
            yield from _plan_stages(stages, device, processes)
        processes.wait()


def _plan_stages(stages: list[TrainingOptions], device: torch.device, processes: Processes) -> Iterator[str]:
    start = None  # stage 2 goes on with the model of stage 1, which needs no training to be measured
    for options in stages:
        dataset = Dataset.open(options.input_h5, options.input_json)
        if start is None:
            # torchvision's weights have the shapes of random ones, and need not be downloaded for a plan.
            cnn_model = "random" if options.cnn_model == "imagenet" else options.cnn_model
            later = options.stage is not None and options.stage > 1
            start_from = options.start_from or (str(best_of_stage_before(options)) if later else "")
            start = fresh_checkpoint(dataclasses.replace(options, cnn_model=cnn_model, start_from=start_from), dataset)
        dataset = in_words_of(start, dataset)
        if options.preset and options.stage:
            yield presets.describe(options.preset, options.stage, dataclasses.asdict(options))
        yield from _plan_stage(options, start, dataset, device, processes)


def _plan_stage(
    options: TrainingOptions, start: Checkpoint, dataset: Dataset, device: torch.device, processes: Processes
) -> Iterator[str]:
    """Measure a few iterations of this process's share, with the CNN frozen and fine-tuned."""
    indices = dataset.captioned_indices("train")
    val_indices = validation_images(options, dataset)
    model = build_model(start).to(device)
    yield (
        f"data         {len(indices):,} training and {len(val_indices):,} validation images,"
        f" {dataset.vocab.size:,} words"
    )
    used = [
        name
        for name, part in (
            ("frozen", options.finetune_cnn_after != 0),
            ("fine-tuning", options.finetune_cnn_after >= 0),
        )
        if part
    ]
    form = cache_form(options, model)
    features = None if form is None else stand_in_features(len(dataset.info), form, model)
    weights = image_weights(options, dataset, indices)
    epoch = len(EpochOrder(indices, seed=options.seed, shuffle=options.shuffle, weights=weights))
    share = len(processes.share(options.batch_size))
    kinds = {}
    for name in ("frozen", "fine-tuning"):
        finetune = name == "fine-tuning"
        of_kind = dataclasses.replace(options, finetune_cnn_after=0 if finetune else -1)
        kinds[name] = measure(
            make_trainer(of_kind, model, training_dtype(options.precision, device), Processes()),
            dataset,
            indices,
            finetune=finetune,
            features=features if form is not None and (form.last_block or not finetune) else None,
            batch_size=share,
            seq_per_img=options.seq_per_img,
            timed=name in used,
        )
    yield from Plan(
        model,
        kinds,
        used,
        batch_size=share,
        iterations_per_epoch=epoch / options.batch_size,
        iterations=last_iteration(options, epoch),
        feature_cache=0 if form is None else form.bytes_per_image(model) * len(dataset.info),
        cached_views=0 if form is None else form.views * len(dataset.info),
        validation_images=0 if options.cache_features else len(val_indices),
        validation_every=options.save_checkpoint_every,
        image_seconds=seconds_per_image(model, device, inference_dtype(options.precision, device)),
        validation_bytes=0 if options.cache_features else validation_bytes(model, device, VALIDATION_BATCH),
        device=device,
        folder=Path(options.checkpoint_path or "."),
    ).lines()


@dataclass(frozen=True)
class Measured:
    """What a kind of training takes: with the CNN frozen, or fine-tuned. Sizes in bytes.

    Attributes:
        optimizer: the states of the update rules.
        activations: what `images_at_once` need at a time, gradients and temporary tensors included; None if not known.
        seconds: per iteration of the whole batch, without waiting for data; None if not measured.
        measured: how many images the measured iterations had.
    """

    trained: int
    optimizer: int
    activations: int | None
    images_at_once: int
    seconds: float | None
    measured: int


def measure(
    trainer: Trainer,
    dataset: Dataset,
    indices: np.ndarray,
    *,
    finetune: bool,
    features: CachedFeatures | None,
    batch_size: int,
    seq_per_img: int,
    timed: bool,
) -> Measured:
    """Train a few iterations and tell what they took; the trainer's weights and optimisers change.

    Args:
        indices: the training images.
        features: stand-ins for cached features; None reads pixels.
        batch_size: images of this process per iteration.
        timed: whether to measure the time, too.
    """

    def batch(size: int) -> Batch:
        make = TrainingBatches(
            dataset, indices, batch_size=size, seq_per_img=seq_per_img, seed=0, shuffle=True, features=features
        )
        return make(0)

    def step(size: int) -> float:
        started = time.perf_counter()
        float(update(trainer, batch_of[size], 0, rate_factor=1.0, finetune=finetune))  # float() waits for a GPU
        return time.perf_counter() - started

    trained = [p for group in trainer.trained(finetune) for p in group.parameters]
    batch_of = {size: batch(size) for size in (1, 3)}
    step(1)  # optimisers make their states in the first step
    peaks = {}
    for size in batch_of:
        for parameter in trained:
            parameter.grad = None
        peaks[size] = peak_bytes(partial(step, size), trainer.device)
    at_once = -(-batch_size // trainer.accumulate)

    seconds, size = None, 3
    if timed:
        times = {size: min(step(size) for _ in range(2)) for size in batch_of}
        while size < batch_size and 2 * times[size] * 4 < MEASURED_SECONDS:
            size = min(2 * size, batch_size)
            batch_of[size] = batch(size)
            times[size] = min(step(size) for _ in range(3))
        seconds = _extrapolate(times, batch_size)
    states = [group.optimizer.state for group in trainer.groups.values()]
    return Measured(
        trained=_numel(trained),
        optimizer=sum(t.nbytes for t in tree_iter([dict(state) for state in states]) if isinstance(t, Tensor)),
        activations=_extrapolate_bytes(peaks, at_once),
        images_at_once=at_once,
        seconds=seconds,
        measured=size,
    )


def _extrapolate(measured: Mapping[int, float], size: int) -> float:
    """What `size` images take, along the line through the last two measurements."""
    before, last = list(measured)[-2:]
    growth = (measured[last] - measured[before]) / (last - before)
    return measured[last] + max(0.0, growth) * (size - last)


def _extrapolate_bytes(measured: Mapping[int, int | None], size: int) -> int | None:
    known = {images: peak for images, peak in measured.items() if peak is not None}
    return round(_extrapolate(known, size)) if len(known) > 1 else None


@torch.inference_mode()
def seconds_per_image(model: CaptionModel, device: torch.device, dtype: torch.dtype) -> float:
    """The time of the CNN's forward pass alone, as for cached features and for validation."""
    model = copy.deepcopy(model).eval()
    for module in model.encoder.cnn_modules():
        prepare_for_inference(module, dtype)
    images = torch.randint(0, 256, (2, 3, IMAGE_SIZE, IMAGE_SIZE), dtype=torch.uint8, device=device)
    times = []
    for _ in range(3):
        started = time.perf_counter()
        float(model.cnn_features(images).sum())
        times.append(time.perf_counter() - started)
    return min(times) / len(images)


@torch.inference_mode()
def validation_bytes(model: CaptionModel, device: torch.device, batch_size: int) -> int | None:
    """The most that the CNN's forward pass over a batch of validation images takes; None if not known."""
    peaks = {}
    for size in (1, 3):
        images = torch.zeros((size, 3, IMAGE_SIZE, IMAGE_SIZE), dtype=torch.uint8, device=device)
        peaks[size] = peak_bytes(partial(model.cnn_features, images), device)
    return _extrapolate_bytes(peaks, batch_size)


@dataclass(frozen=True)
class Plan:
    """All that `caption-train --plan 1` says of a run or of one stage of it.

    Attributes:
        kinds: by name, "frozen" and "fine-tuning".
        used: which of the kinds the run consists of, in order.
        iterations_per_epoch: a batch may reach into the next epoch.
        iterations: None: without end.
        feature_cache: bytes on disk; 0 without one.
        cached_views: what the CNN must look at for it.
        validation_images: 0 with cached features, whose validation takes next to nothing.
        image_seconds: of the CNN alone, per image.
        validation_bytes: memory of a batch of validation images; None if not known.
        folder: where checkpoints will be written.
    """

    model: CaptionModel
    kinds: dict[str, Measured]
    used: list[str]
    batch_size: int
    iterations_per_epoch: float
    iterations: int | None
    feature_cache: int
    cached_views: int
    validation_images: int
    validation_every: int
    image_seconds: float
    validation_bytes: int | None
    device: torch.device
    folder: Path

    def lines(self) -> list[str]:
        """The plan as text, ready to print."""
        return [*self._model(), *self._memory(), *self._disk(), *self._time()]

    def _model(self) -> list[str]:
        cnn, language = _numel(self.model.cnn_parameters()), _numel(self.model.language_model_parameters())
        trained = ", ".join(f"{self.kinds[name].trained:,} when {name}" for name in self.used)
        total = "without end" if self.iterations is None else f"{self.iterations:,} in all"
        return [
            f"parameters   {cnn + language:,}: CNN {cnn:,}, language model {language:,}; trained: {trained}",
            f"iterations   {self.iterations_per_epoch:,.1f} an epoch, {total}",
        ]

    def _memory(self) -> list[str]:
        lines: list[str] = []
        weights = _bytes(self.model)
        for name, kind in self.kinds.items():
            parts = f"weights {bytes_text(weights)}, optimiser {bytes_text(kind.optimizer)}"
            if kind.activations is None:
                told = f"{parts}; gradients and activations cannot be measured on this system"
            else:
                batch = max(kind.activations, self.validation_bytes or 0)
                told = f"{bytes_text(weights + kind.optimizer + batch)}: {parts}, gradients and activations"
                told += f" {bytes_text(kind.activations)} at {kind.images_at_once} images"
                if batch > kind.activations:
                    told += f" (validation {bytes_text(batch)})"
            other = "" if name in self.used else "; not part of this run"
            lines.append(f"{'' if lines else 'memory':12} {name}: {told}{other}")
        return [*lines, f"{'':12} and about {bytes_text(PROCESS_BYTES)} for Python and its libraries"]

    def _disk(self) -> list[str]:
        weights = _bytes(self.model)
        state = weights + max(self.kinds[name].optimizer for name in self.used)
        folder = self.folder.absolute()
        while not folder.exists():
            folder = folder.parent
        free = shutil.disk_usage(folder).free
        needed = 2 * weights + 2 * state
        lines = [
            f"disk         {bytes_text(2 * weights + state)} in {self.folder}: best and last model"
            f" {bytes_text(weights)} each, resume state {bytes_text(state)}; {bytes_text(state)} more while that is"
            f" being replaced; {bytes_text(free)} are free"
        ]
        if free < needed:
            lines.append(f"{'':12} warning: {bytes_text(needed)} will not fit")
        if self.feature_cache:
            lines.append(
                f"{'':12} {bytes_text(self.feature_cache)} of cached features beside the h5, unless they are there"
            )
        return lines

    def _time(self) -> list[str]:
        lines: list[str] = []
        for name in self.used:
            kind = self.kinds[name]
            assert kind.seconds is not None
            of = "" if kind.measured == self.batch_size else f" of {self.batch_size}"
            epoch = kind.seconds * self.iterations_per_epoch
            lines.append(
                f"{'' if lines else 'time':12} {name}: {_duration(kind.seconds)} an iteration, {_duration(epoch)} an"
                f" epoch (measured on {self.device} with {kind.measured}{of} images, without waiting for data)"
            )
        if self.feature_cache:
            seconds = _duration(self.cached_views * self.image_seconds)
            lines.append(f"{'':12} {seconds} once for the cached features")
        if self.validation_images:
            seconds = _duration(self.validation_images * self.image_seconds)
            lines.append(f"{'':12} at least {seconds} for each validation, every {self.validation_every} iterations")
        return lines


def _numel(parameters: list[nn.Parameter]) -> int:
    return sum(parameter.numel() for parameter in parameters)


def _bytes(model: nn.Module) -> int:
    return sum(tensor.nbytes for tensor in model.state_dict().values())


def _duration(seconds: float) -> str:
    if seconds < 1:
        return f"{1000 * seconds:.0f} ms"
    if seconds < 120:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
