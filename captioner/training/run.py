"""A whole training by one call: what caption-train does, for Python too."""

import contextlib
import dataclasses
import itertools
import logging
import math
import threading
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from captioner.data.batch import Batch
from captioner.data.batches import TrainingBatches, prefetch
from captioner.data.dataset import Dataset
from captioner.data.epoch_order import EpochOrder
from captioner.model.caption_model import build_model
from captioner.runtime.device import choose_device
from captioner.runtime.files import require_writable_folder
from captioner.runtime.locks import sole_run
from captioner.runtime.memory import keep_freed_memory
from captioner.runtime.precision import training_dtype
from captioner.runtime.processes import Processes, process_group
from captioner.runtime.signals import Stopped, StopRequest
from captioner.training import loop, presets
from captioner.training.health_checks import LossMonitor, LossTrend, warn_of_pixels
from captioner.training.optim import reductions_on_plateau, schedule_factor
from captioner.training.options import TrainingOptions, stages_of
from captioner.training.resume import ResumeState, load_resume_state
from captioner.training.run_files import LossFile, Pace, Progress
from captioner.training.self_critical import SelfCritical
from captioner.training.setup import (
    augmentation_of,
    best_of_stage_before,
    files_of,
    fit_grid,
    fresh_checkpoint,
    image_weights,
    in_words_of,
    last_iteration,
    load_features,
    make_trainer,
    validation_images,
)
from captioner.training.tensorboard import EventLog
from captioner.training.trainer import Trainer
from captioner.training.validation import Validation

log = logging.getLogger(__name__)

# Options that may differ between a run and its continuation without a word.
UNRELATED_TO_THE_RESULT = {
    "resume", "stages", "num_workers", "gpuid", "backend", "max_iters", "epochs", "losses_log_every", "tensorboard"
}  # fmt: skip


@dataclass(frozen=True)
class TrainingResult:
    """What a training came to.

    Attributes:
        best: the checkpoint with the best validation.
        last: the checkpoint of the last validation.
        stopped_by: the number of the signal that ended it early, 0 if none did; `resume="auto"` goes on.
    """

    best: Path
    last: Path
    stopped_by: int = 0


def train(**options: Any) -> TrainingResult:
    """Train a captioning model on a dataset made by caption-prepro.

    Args:
        options: those of caption-train, by name and with its defaults (`TrainingOptions`), for example
            `train(input_h5="data.h5", input_json="data.json", preset="flickr8k", checkpoint_path="run")`.

    Returns:
        Where the models are; with a preset of two stages those of the last.

    Raises:
        InputError: an option, the data or the weights are at fault, or the loss explodes.
    """
    stages = stages_of(options)
    for stage in stages:
        stage.check()
    keep_freed_memory()
    device = choose_device(stages[0].gpuid)
    # Python takes signals in the main thread only; trainings in others cannot be asked to stop.
    in_main_thread = threading.current_thread() is threading.main_thread()
    with (
        process_group(device) as processes,
        StopRequest() if in_main_thread else contextlib.nullcontext() as stop,
        _sole_run(stages[0]) if processes.is_main else contextlib.nullcontext(),
    ):
        if processes.is_main:
            for stage in stages:
                files_of(stage).remove_left_over()
        for stage in _stages_to_do(stages):
            processes.wait()  # the stage before has written its best model, or nobody has written anything
            signal = _train_stage(stage, device, processes, lambda: stop.signal if stop else 0, options.keys())
            if signal:
                break
    files = files_of(stage)
    return TrainingResult(files.best, files.last, signal)


def _sole_run(options: TrainingOptions) -> contextlib.AbstractContextManager[None]:
    """Two runs with the same files would mix their models."""
    folder = require_writable_folder(options.checkpoint_path or ".", "checkpoints")
    return sole_run(folder / f".model_id{options.id}.lock", f"the training run in {folder}")


def _stages_to_do(stages: list[TrainingOptions]) -> list[TrainingOptions]:
    """All stages; with --resume auto those left: a stage that has a state was begun when those before were done."""
    started = [
        dataclasses.replace(options, start_from=str(best_of_stage_before(options)))
        if options.stage and options.stage > 1 and not options.start_from
        else options
        for options in stages
    ]
    begun = [k for k, options in enumerate(started) if options.resume == "auto" and files_of(options).resume.exists()]
    for options in started[: max(begun, default=0)]:
        log.info("stage %d is done", options.stage)
    return started[max(begun, default=0) :]


def _train_stage(
    options: TrainingOptions,
    device: torch.device,
    processes: Processes,
    stop_signal: Callable[[], int],
    given: Collection[str],
) -> int:
    """Train, resumable at any time; returns the number of the signal that asked to stop, else 0."""
    try:
        run = open_run(options, device, processes, stop_signal, given)
    except Stopped as stopped:
        log.info("stopped before the first iteration; repeat the command to go on")
        return stopped.signal
    if run is None:
        return 0
    signal = loop.train(run)
    if signal:
        log.info("stopped at iteration %d; repeat the command with --resume auto to go on", run.history.iteration)
    else:
        log.info("done: %d iterations; best model: %s", run.history.iteration, run.files.best)
        log.info("curves: %s (open it by double click)", run.files.page)
    return signal


def open_run(
    options: TrainingOptions,
    device: torch.device,
    processes: Processes,
    stop_signal: Callable[[], int],
    given: Collection[str] = (),
) -> loop.TrainingRun | None:
    """All that a run consists of, new or resumed; None if it is done already.

    Args:
        given: the options that the user named, of whatever value.

    Raises:
        InputError: data, weights or state do not fit, or nothing can be written.
        Stopped: the run was asked to stop while features were computed.
    """
    if options.preset and options.stage:
        log.info("%s", presets.describe(options.preset, options.stage, dataclasses.asdict(options)))
    require_writable_folder(options.checkpoint_path or ".", "checkpoints")
    files = files_of(options)
    dataset = Dataset.open(options.input_h5, options.input_json)
    indices = dataset.captioned_indices("train")
    weights = image_weights(options, dataset, indices)
    images_per_epoch = len(EpochOrder(indices, seed=options.seed, shuffle=options.shuffle, weights=weights))
    last = last_iteration(options, images_per_epoch)
    resumed = _find_resume_state(options, files.resume)
    start = resumed.checkpoint if resumed else fresh_checkpoint(options, dataset, given)
    history = start.history
    dataset = in_words_of(start, dataset)
    if last is not None and history.iteration >= last and history.iteration in history.val_loss_history:
        log.info("done already: %d iterations; best model: %s", history.iteration, files.best)
        return None
    model = build_model(start).to(device)
    trainer = make_trainer(options, model, training_dtype(options.precision, device), processes)
    if options.self_critical_after >= 0:
        trainer.self_critical = SelfCritical(
            dataset,
            indices,
            samples=options.self_critical_samples,
            temperature=options.self_critical_temperature,
            bleu_weight=options.self_critical_bleu,
        ).loss_sum
    processes.wait()  # everyone has looked for a state before the main process moves anything
    if resumed:
        trainer.restore_optimizers(resumed.optimizers, str(files.resume))
        log.info("resumed at iteration %d", history.iteration)
    elif processes.is_main:
        _set_earlier_runs_aside(options)
        if options.cnn_model != "random" or options.start_from:
            few = indices[:: math.ceil(len(indices) / 4)]
            warn_of_pixels(model, torch.from_numpy(np.stack([dataset.images[int(i)] for i in few])))
    features = load_features(options, trainer, dataset, stop_signal)
    if not resumed and not options.start_from:
        fit_grid(trainer, dataset, indices, features)
    batches = TrainingBatches(
        dataset,
        indices,
        batch_size=options.batch_size,
        seq_per_img=options.seq_per_img,
        seed=options.seed,
        shuffle=options.shuffle,
        weights=weights,
        features=features,
        share=processes.share,
        all_captions_from=options.self_critical_after if options.self_critical_after >= 0 else None,
        augmentation=augmentation_of(options),
    )
    validate = Validation(
        trainer,
        dataset,
        validation_images(options, dataset),
        language_eval=options.language_eval,
        num_workers=options.num_workers,
        features=features,
    )
    trend = LossTrend(model.config.vocab_size)
    first_loss = resumed.first_loss if resumed else None
    events = EventLog(files.events, history) if options.tensorboard and processes.is_main else None
    pace = Pace(files.pace, history.iteration) if resumed else Pace()
    losses = LossFile(files.losses, history) if options.losses_log_every and processes.is_main else None
    log.info("%s", _summary(trainer, dataset, len(indices)))
    return loop.TrainingRun(
        options=options,
        trainer=trainer,
        vocab=start.vocab,
        decoding=start.decoding,
        history=history,
        last=last,
        batches=_stream(batches, history.iteration, options.num_workers, pin=device.type == "cuda"),
        schedule=lambda iteration: schedule_factor(
            iteration,
            schedule=options.lr_schedule,
            warmup=options.warmup,
            last=last,
            decay_start=options.learning_rate_decay_start,
            decay_every=options.learning_rate_decay_every,
            reductions=reductions_on_plateau(history, options.patience) if options.lr_schedule == "plateau" else 0,
        ),
        validate=validate,
        monitor=LossMonitor(history, first_loss, options.losses_log_every, batches.describe, trend),
        progress=Progress(images_per_epoch, options.batch_size, pace, events, losses),
        files=files,
        events=events,
        stop_signal=stop_signal,
    )


def _set_earlier_runs_aside(options: TrainingOptions) -> None:
    """A run's earlier files, and those of the stages after it."""
    later = [files_of(options, stage) for stage in presets.STAGES if options.stage and stage > options.stage]
    for earlier_run in (files_of(options), *later):
        earlier_run.keep_previous(repeating=options.resume == "auto")


def _stream(batches: TrainingBatches, first: int, num_workers: int, pin: bool) -> Iterator[Batch]:
    """The batches from number `first` on, made ahead in threads; for a GPU in page-locked memory."""
    jobs = ((lambda k=k: batches(k).pin() if pin else batches(k)) for k in itertools.count(first))
    return prefetch(jobs, num_workers, ahead=2 * num_workers)


def _find_resume_state(options: TrainingOptions, own: Path) -> ResumeState | None:
    """The state to go on from, as --resume asks; None starts afresh."""
    if not options.resume or (options.resume == "auto" and not own.exists()):
        return None
    state = load_resume_state(own if options.resume == "auto" else options.resume)
    unrelated = UNRELATED_TO_THE_RESULT - ({"max_iters", "epochs"} if options.lr_schedule == "cosine" else set())
    before, now = state.checkpoint.history.opt, dataclasses.asdict(options)
    changed = [k for k, v in now.items() if k in before and before[k] != v and k not in unrelated]
    if changed:
        log.info("resuming with changed options: %s", ", ".join(f"{k} {before[k]} → {now[k]}" for k in changed))
    state.checkpoint.history.opt = now
    return state


def _summary(trainer: Trainer, dataset: Dataset, num_images: int) -> str:
    """One line on what is about to happen."""
    millions = sum(parameter.numel() for parameter in trainer.model.parameters()) / 1e6
    processes = f" × {trainer.processes.size} processes" if trainer.processes.size > 1 else ""
    return (
        f"{num_images} training images, {dataset.vocab.size} words, {millions:.1f} M parameters, "
        f"on {trainer.device}{processes}, {trainer.arithmetic}"
    )
