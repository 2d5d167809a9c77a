"""A training run as seen from outside: its files and its log lines."""

import logging
import os
import time
from collections.abc import Iterator
from pathlib import Path

from captioner.data.batches import Batch
from captioner.model.checkpoint import (
    Checkpoint,
    ResumeState,
    save_checkpoint,
    save_resume_state,
    write_report,
)
from captioner.training.health_checks import LossMonitor
from captioner.training.tensorboard import EventLog
from captioner.training.trainer import Trainer

log = logging.getLogger(__name__)

SAVE_STATE_EVERY_SECONDS = 600


class RunFiles:
    """The files of a run: best and last checkpoint, resume state and report, named as the original names them.

    Args:
        folder: checkpoint_path, writable.
        run_id: the original's --id.
    """

    def __init__(self, folder: Path, run_id: str) -> None:
        self.best = folder / f"model_id{run_id}.pt"
        self.last = folder / f"model_id{run_id}_last.pt"
        self.resume = folder / f"model_id{run_id}_resume.pt"
        self.report = folder / f"model_id{run_id}.json"
        self.events = folder / f"model_id{run_id}_tensorboard"
        self._state_saved_at = time.monotonic()

    def keep_previous(self) -> None:
        """Set an earlier run of the same name aside: starting afresh must not cost anybody a trained model."""
        for path in (self.best, self.last, self.resume, self.report):
            if path.exists():
                previous = path.with_name(f"{path.stem}.previous{path.suffix}")
                os.replace(path, previous)
                log.info("an earlier run's %s is now %s", path.name, previous.name)

    def save_checkpoints(self, record: Checkpoint, trainer: Trainer, better: bool) -> None:
        """Write the report and the last checkpoint, and the best one if this is `better` than all before.

        Raises:
            InputError: the weights are not finite, or a file cannot be written; those of before are still there.
        """
        trainer.require_sound_weights(record.iteration)
        if trainer.processes.is_main:
            record.state_dict = trainer.model.state_dict()
            if better:
                save_checkpoint(self.best, record)
            save_checkpoint(self.last, record)
            write_report(self.report, record)

    def save_state(self, record: Checkpoint, trainer: Trainer, monitor: LossMonitor) -> None:
        """Write the resume state, after making sure that loss and weights are sound.

        Raises:
            InputError: they are not, or the file cannot be written; that of before is still there.
        """
        monitor.flush()
        trainer.require_sound_weights(record.iteration)
        if trainer.processes.is_main:
            record.state_dict = trainer.model.state_dict()
            save_resume_state(self.resume, ResumeState(record, trainer.optimizer_states(), monitor.first))
        self._state_saved_at = time.monotonic()

    def state_is_old(self) -> bool:
        """Whether a crash now would cost more work than anybody wants to lose."""
        return time.monotonic() - self._state_saved_at > SAVE_STATE_EVERY_SECONDS


class Progress:
    """Log lines with the speed since the last one and how much of the time went into waiting for data.

    Args:
        events: takes the losses too.
    """

    def __init__(self, images_per_epoch: int, batch_size: int, events: EventLog | None = None) -> None:
        self.images_per_epoch, self.batch_size, self.events = images_per_epoch, batch_size, events
        self._since, self._iteration, self._waited = time.monotonic(), -1, 0.0

    def next(self, stream: Iterator[Batch]) -> Batch:
        """The stream's next batch, with the time it took to arrive on the books."""
        started = time.monotonic()
        batch = next(stream)
        self._waited += time.monotonic() - started
        return batch

    def report(self, iteration: int, loss: float) -> None:
        """Log an iteration's loss."""
        if self.events:
            self.events.loss(iteration, loss)
        now = time.monotonic()
        seconds, iterations = now - self._since, iteration - self._iteration
        waiting = self._waited / seconds
        log.info(
            "iter %d (epoch %.2f): loss %.4f, %.2f it/s, %.0f images/s%s",
            iteration,
            iteration * self.batch_size / self.images_per_epoch,
            loss,
            iterations / seconds,
            iterations * self.batch_size / seconds,
            f", {100 * waiting:.0f} % of the time waiting for data (more --num_workers, a faster disk or, "
            "with a frozen CNN, --cache_features 1 would help)"
            if waiting > 0.5 and iteration
            else "",
        )
        self._since, self._iteration, self._waited = now, iteration, 0.0
