"""caption-train: train a captioning model (original: train.lua)."""

import argparse
import itertools
import logging
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from captioner.cli.options import run
from captioner.cli.train_options import build_parser, check_options, stages_of
from captioner.cli.train_setup import (
    files_of,
    fresh_checkpoint,
    last_iteration,
    load_features,
    make_trainer,
    plan,
    require_matching,
    validation_images,
)
from captioner.runtime.files import require_writable_folder
from captioner.training import presets

if TYPE_CHECKING:  # torch is imported late, so that --help and argument errors are instant
    import torch

    from captioner.data.dataset import Dataset
    from captioner.model.caption_model import CaptionModel
    from captioner.model.checkpoint import ResumeState
    from captioner.runtime.processes import Processes
    from captioner.runtime.signals import StopRequest

log = logging.getLogger(__name__)

AGREE_EVERY = 10  # iterations between two rounds in which several processes ask each other whether to stop
# Options that may differ between a run and its continuation without a word.
UNRELATED_TO_THE_RESULT = {
    "resume", "stages", "num_workers", "gpuid", "backend", "max_iters", "epochs", "losses_log_every", "tensorboard"
}  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    opt = build_parser().parse_args(argv)
    return run("caption-train", lambda: train(stages_of(opt, argv)))


def train(stages: list[argparse.Namespace]) -> int:
    """Run one stage after the other (without --preset there is one); returns the exit code."""
    from captioner.runtime.device import choose_device
    from captioner.runtime.memory import keep_freed_memory
    from captioner.runtime.processes import process_group
    from captioner.runtime.signals import StopRequest

    for opt in stages:
        check_options(opt)
    for opt in stages:
        if opt.stage == 2 and not opt.start_from:
            opt.start_from = str(files_of(opt, 1).best)
    keep_freed_memory()
    device = choose_device(stages[0].gpuid)
    with process_group(device) as processes, StopRequest() as stop:
        if stages[0].plan:
            for line in plan(stages, device, processes) if processes.is_main else ():
                print(line, flush=True)
            processes.wait()
            return 0
        for opt in stages_to_do(stages):
            processes.wait()  # the stage before has written its best model, or nobody has written anything
            code = train_stage(opt, device, processes, stop)
            if code:
                return code
    return 0


def stages_to_do(stages: list[argparse.Namespace]) -> list[argparse.Namespace]:
    """All stages; with --resume auto those left: a stage that has a state was begun when those before were done."""
    begun = [k for k, opt in enumerate(stages) if opt.resume == "auto" and files_of(opt).resume.exists()]
    for opt in stages[: max(begun, default=0)]:
        log.info("stage %d is done", opt.stage)
    return stages[max(begun, default=0) :]


def train_stage(opt: argparse.Namespace, device: "torch.device", processes: "Processes", stop: "StopRequest") -> int:
    """Train until the last iteration (or forever), resumable at any time; returns the exit code."""
    import numpy as np
    import torch

    from captioner.data.batches import TrainingBatches, prefetch
    from captioner.data.dataset import Dataset
    from captioner.model.caption_model import build_model
    from captioner.runtime.precision import training_dtype
    from captioner.training.health_checks import LossMonitor, LossTrend, warn_of_pixels
    from captioner.training.optim import learning_rate
    from captioner.training.run_files import Progress
    from captioner.training.tensorboard import EventLog
    from captioner.training.validation import Validation

    if opt.preset:
        log.info("%s", presets.describe(opt.preset, opt.stage, vars(opt)))
    require_writable_folder(opt.checkpoint_path or ".", "checkpoints")
    files = files_of(opt)
    dataset = Dataset.open(opt.input_h5, opt.input_json)
    train_indices = dataset.captioned_indices("train")
    last = last_iteration(opt, len(train_indices))
    resumed = find_resume_state(opt, files.resume)
    record = resumed.checkpoint if resumed else fresh_checkpoint(opt, dataset)
    require_matching(record, dataset, opt)
    if last is not None and record.iteration >= last and record.iteration in record.val_loss_history:
        log.info("done already: %d iterations; best model: %s", record.iteration, files.best)
        return 0
    model = build_model(record).to(device)
    trainer = make_trainer(opt, model, training_dtype(opt.precision, device), processes)
    processes.wait()  # everyone has looked for a state before the main process moves anything
    if resumed:
        trainer.restore_optimizers(resumed.optimizers, str(files.resume))
        log.info("resumed at iteration %d", record.iteration)
    elif processes.is_main:
        later = [files_of(opt, stage) for stage in presets.STAGES if opt.stage and stage > opt.stage]
        for earlier_run in (files, *later):
            earlier_run.keep_previous()
        if opt.cnn_model != "random" or opt.start_from:
            few = train_indices[:: math.ceil(len(train_indices) / 4)]
            warn_of_pixels(model, torch.from_numpy(np.stack([dataset.images[int(i)] for i in few])))
    features = load_features(opt, trainer, dataset)
    batches = TrainingBatches(
        dataset,
        train_indices,
        batch_size=opt.batch_size,
        seq_per_img=opt.seq_per_img,
        seed=opt.seed,
        shuffle=opt.shuffle,
        features=features,
        share=processes.share,
    )
    jobs = (
        (lambda k=k: batches(k).pin() if device.type == "cuda" else batches(k))
        for k in itertools.count(record.iteration)
    )
    stream = prefetch(jobs, opt.num_workers, ahead=2 * opt.num_workers)
    validate = Validation(
        trainer,
        dataset,
        validation_images(opt, dataset),
        language_eval=opt.language_eval,
        num_workers=opt.num_workers,
        features=features,
    )
    first_loss = resumed.first_loss if resumed else None
    trend = LossTrend(record.config.vocab_size)
    monitor = LossMonitor(record.loss_history, first_loss, opt.losses_log_every, batches.describe, trend)
    events = EventLog(files.events, record) if opt.tensorboard and processes.is_main else None
    progress = Progress(len(train_indices), opt.batch_size, events)
    log.info("%s", summary(model, dataset, len(train_indices), device, processes))

    stopping = 0
    for iteration in itertools.count(record.iteration):
        finished = last is not None and iteration >= last
        if (iteration % opt.save_checkpoint_every == 0 or finished) and iteration not in record.val_loss_history:
            monitor.flush()
            better = validate(record)
            files.save_checkpoints(record, trainer, better)
            files.save_state(record, trainer, monitor)
            if events:
                events.validation(record)
        if processes.size == 1 or iteration % AGREE_EVERY == 0:
            stopping = processes.largest(stop.signal)
        if finished or stopping or files.state_is_old():
            files.save_state(record, trainer, monitor)
        if finished or stopping:
            break

        batch = progress.next(stream)
        decay = learning_rate(
            iteration,
            base=1.0,
            decay_start=opt.learning_rate_decay_start,
            decay_every=opt.learning_rate_decay_every,
        )
        finetune = 0 <= opt.finetune_cnn_after <= iteration
        loss = trainer.step(batch, iteration, rate_factor=decay, finetune=finetune)
        record.iteration = iteration + 1

        monitor.note(iteration, loss)
        if opt.losses_log_every and iteration % opt.losses_log_every == 0:
            monitor.flush()
            progress.report(iteration, record.loss_history[iteration])

    if events:
        events.close()
    if stopping:
        log.info("stopped at iteration %d; repeat the command with --resume auto to go on", record.iteration)
        return 128 + stopping
    log.info("done: %d iterations; best model: %s", record.iteration, files.best)
    return 0


def find_resume_state(opt: argparse.Namespace, own: Path) -> "ResumeState | None":
    """The state to go on from, as --resume asks; None starts afresh."""
    from captioner.model.checkpoint import load_resume_state

    if not opt.resume or (opt.resume == "auto" and not own.exists()):
        return None
    state = load_resume_state(own if opt.resume == "auto" else opt.resume)
    before = state.checkpoint.opt
    changed = [k for k, v in vars(opt).items() if k in before and before[k] != v and k not in UNRELATED_TO_THE_RESULT]
    if changed:
        log.info(
            "resuming with changed options: %s", ", ".join(f"{k} {before[k]} → {getattr(opt, k)}" for k in changed)
        )
    state.checkpoint.opt = vars(opt).copy()
    return state


def summary(
    model: "CaptionModel", dataset: "Dataset", num_images: int, device: "torch.device", processes: "Processes"
) -> str:
    """One line on what is about to happen."""
    millions = sum(parameter.numel() for parameter in model.parameters()) / 1e6
    where = f"{device} × {processes.size} processes" if processes.size > 1 else str(device)
    return f"{num_images} training images, {dataset.vocab.size} words, {millions:.1f} M parameters, on {where}"


if __name__ == "__main__":
    raise SystemExit(main())
