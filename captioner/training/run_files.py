"""A training run as seen from outside: its files and its log lines."""

import glob
import itertools
import json
import logging
import math
import os
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from captioner.data.batch import Batch
from captioner.model.checkpoint import Checkpoint, TrainingRecord, save_checkpoint
from captioner.output.training_page import write_training_page
from captioner.runtime.files import atomic_write
from captioner.training.resume import ResumeState, save_resume_state
from captioner.training.tensorboard import EventLog

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
        self.page = folder / f"model_id{run_id}.html"
        self.events = folder / f"model_id{run_id}_tensorboard"
        self._state_saved_at = time.monotonic()

    def keep_previous(self) -> None:
        """Set an earlier run of the same name aside: starting afresh must not cost anybody a trained model.

        Its files become …previous…, …previous2… and so on; those of one run have the same number.
        """
        files = [path for path in (self.best, self.last, self.resume, self.report) if os.path.lexists(path)]
        for number in itertools.count(1):
            word = f"previous{number}" if number > 1 else "previous"
            aside = [path.with_name(f"{path.stem}.{word}{path.suffix}") for path in files]
            if not any(map(os.path.lexists, aside)):
                break
        for path, previous in zip(files, aside, strict=True):
            os.replace(path, previous)
            log.info("an earlier run's %s is now %s", path.name, previous.name)

    def save_models(self, model: Checkpoint, better: bool) -> None:
        """Write the report and the last checkpoint, and the best one if this is `better` than all before.

        Raises:
            InputError: a file cannot be written; that of before is still there.
        """
        if better:
            save_checkpoint(self.best, model)
        save_checkpoint(self.last, model)
        write_report(self.report, model.record)
        write_training_page(self.page, [self.report, *self._other_stages()])

    def _other_stages(self) -> list[Path]:
        """The reports of the other stages of the same recipe, which the page shows too."""
        name = re.sub(r"_stage\d+$", "", self.report.stem)
        found = self.report.parent.glob(f"{glob.escape(name)}_stage[0-9].json")
        return sorted(path for path in found if path != self.report)

    def save_state(self, state: ResumeState) -> None:
        """Write the resume state.

        Raises:
            InputError: the file cannot be written; that of before is still there.
        """
        save_resume_state(self.resume, state)
        self.state_is_saved()

    def state_is_saved(self) -> None:
        """The clock of `state_is_old` starts anew, also in the processes that write nothing."""
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

    def report(self, iteration: int, name: str, value: float) -> None:
        """Log an iteration's loss, or its reward; `name` says which."""
        if self.events:
            self.events.training(iteration, name, value)
        now = time.monotonic()
        seconds, iterations = now - self._since, iteration - self._iteration
        waiting = self._waited / seconds
        log.info(
            "iter %d (epoch %.2f): %s %.4f, %.2f it/s, %.0f images/s%s",
            iteration,
            iteration * self.batch_size / self.images_per_epoch,
            name,
            value,
            iterations / seconds,
            iterations * self.batch_size / seconds,
            f", {100 * waiting:.0f} % of the time waiting for data (more --num_workers, a faster disk or, "
            "with a frozen CNN, --cache_features 1 would help)"
            if waiting > 0.5 and iteration
            else "",
        )
        self._since, self._iteration, self._waited = now, iteration, 0.0


def write_report(path: str | Path, record: TrainingRecord) -> None:
    """The original's `model_id<ID>.json`: opt, iter, histories and predictions, readable by its notebooks."""
    report = {
        "opt": record.opt,
        "iter": record.iteration,
        "loss_history": record.loss_history,
        "val_loss_history": record.val_loss_history,
        "val_lang_stats_history": record.val_lang_stats_history,
        "val_predictions": record.val_predictions,
    }
    if record.reward_history:
        report["reward_history"] = record.reward_history
    with atomic_write(path, "w", encoding="utf-8") as stream:
        json.dump(_without_nan(report), stream, ensure_ascii=False, allow_nan=False)


def _without_nan(value: Any) -> Any:
    # JSON has no NaN; browsers refuse a report that holds one.
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {key: _without_nan(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_without_nan(item) for item in value]
    return value
