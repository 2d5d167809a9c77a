"""A training run as seen from outside: its files and its log lines."""

import itertools
import json
import logging
import math
import os
import re
import time
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

from captioner.data.batch import Batch
from captioner.errors import InputError
from captioner.model.checkpoint import Checkpoint, TrainingHistory, load_checkpoint, save_checkpoint
from captioner.output.training_page import write_training_page
from captioner.runtime.files import atomic_write, cannot_write, read_small, remove_left_over, require_replaceable
from captioner.runtime.outputs import kind_of
from captioner.training.resume import ResumeState, save_resume_state
from captioner.training.tensorboard import EventLog

log = logging.getLogger(__name__)

SAVE_STATE_EVERY_SECONDS = 600
OTHER_RUNS_SHOWN = 7  # on the page of a run; their reports lie in it


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
        self.pace = folder / f"model_id{run_id}_pace.json"
        self.page = folder / f"model_id{run_id}.html"
        self.losses = folder / f"model_id{run_id}_losses.jsonl"
        self.events = folder / f"model_id{run_id}_tensorboard"
        self._state_saved_at = time.monotonic()

    def remove_left_over(self) -> None:
        """Remove what a killed process was writing: if that was its very last file, nobody writes it again."""
        for path in (self.best, self.last, self.resume, self.report, self.pace, self.page, self.losses):
            remove_left_over(path)

    def keep_previous(self, repeating: bool) -> None:
        """Set an earlier run of the same name aside: starting afresh must not cost anybody a trained model.

        Its files become …previous…, …previous2… and so on; those of one run have the same number.

        Args:
            repeating: this is the command of before, which was killed: if that was before its first state, it has left
                nothing that does not come again.

        Raises:
            InputError: one of them is an input of this command, or no file.
        """
        ours = (self.best, self.last, self.resume, self.report, self.pace, self.losses)
        files = [path for path in ours if os.path.lexists(path)]
        if os.path.lexists(self.page) and kind_of(self.page) != "page":
            files.append(self.page)  # somebody else's
        for path in files:
            require_replaceable(path)
        if repeating and self._have_not_begun(files):
            return
        for number in itertools.count(1):
            word = f"previous{number}" if number > 1 else "previous"
            aside = [path.with_name(f"{path.stem}.{word}{path.suffix}") for path in files]
            if not any(map(os.path.lexists, aside)):
                break
        for path, previous in zip(files, aside, strict=True):
            os.replace(path, previous)
            log.info("an earlier run's %s is now %s", path.name, previous.name)

    def _have_not_begun(self, files: Collection[Path]) -> bool:
        """Whether these are what a run leaves that is killed before its first state: its models have been validated
        once, before the first update. A model that came otherwise (a converted one) has not, whatever it has learnt."""
        there = set(files) - {self.losses}
        if not (there <= {self.best} or {self.last} <= there <= {self.best, self.last, self.report, self.pace}):
            return False
        if self.losses in files and not _are_losses(self.losses):
            return False
        try:
            histories = [load_checkpoint(path).history for path in there & {self.best, self.last}]
        except InputError:
            return False
        return all(history.iteration == 0 and history.val_loss_history.keys() == {0} for history in histories)

    def save_models(self, model: Checkpoint, better: bool, pace: "Pace") -> None:
        """Write the reports and the last checkpoint, and the best one if this is `better` than all before.

        Raises:
            InputError: a file cannot be written; that of before is still there.
        """
        if better:
            save_checkpoint(self.best, model)
        save_checkpoint(self.last, model)
        write_report(self.report, model.history)
        pace.write(self.pace)
        write_training_page(self.page, [self.report, *self._other_reports()])

    def _other_reports(self) -> list[Path]:
        """Those of the recipe's other stages, and of the folder's latest other runs, for the page to compare with."""
        recipe = re.sub(r"_stage\d+$", "", self.report.stem)
        reports = {
            path: os.stat(path).st_mtime
            for path in self.report.parent.glob("model_id*.json")
            if path != self.report and not path.stem.endswith("_pace") and ".previous" not in path.stem
            if path.is_file()
        }
        stages = [path for path in reports if re.fullmatch(rf"{re.escape(recipe)}_stage\d+", path.stem)]
        others = sorted(reports.keys() - stages, key=reports.__getitem__, reverse=True)
        return [*sorted(stages), *others[:OTHER_RUNS_SHOWN]]

    def save_state(self, state: ResumeState, pace: "Pace") -> None:
        """Write the resume state, and how the run went up to it.

        Raises:
            InputError: the file cannot be written; that of before is still there.
        """
        pace.write(self.pace)
        save_resume_state(self.resume, state)
        self.state_is_saved()

    def state_is_saved(self) -> None:
        """The clock of `state_is_old` starts anew, also in the processes that write nothing."""
        self._state_saved_at = time.monotonic()

    def state_is_old(self) -> bool:
        """Whether a crash now would cost more work than anybody wants to lose."""
        return time.monotonic() - self._state_saved_at > SAVE_STATE_EVERY_SECONDS


class Pace:
    """Learning rate and speed along a run. In a file of its own: equal runs have equal reports, but no equal speed.

    Args:
        earlier: the file of the run that is continued, if it is still there.
        iteration: where that stands; what it did after it is done anew.
    """

    def __init__(self, earlier: Path | None = None, iteration: int = 0) -> None:
        self.learning_rate: dict[int, float] = {}
        self.iterations_per_second: dict[int, float] = {}
        if earlier is None:
            return
        try:
            content = json.loads(read_small(earlier).decode("utf-8"))
            for name, history in vars(self).items():
                history.update({int(k): float(v) for k, v in content[name].items() if int(k) < iteration})
        except (OSError, ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
            log.info("%s: cannot be read (%s): these curves begin anew", earlier.name, error)

    def write(self, path: Path) -> None:
        """{"learning_rate": {iteration: value}, "iterations_per_second": ..}.

        Raises:
            InputError: the file cannot be written.
        """
        with atomic_write(path, "w", encoding="utf-8") as stream:
            json.dump(vars(self), stream)


class LossFile:
    """The logged losses on disk as they come, as JSON lines: the report, which has them too, waits for a validation.

    Args:
        history: where the run stands; what a killed run wrote beyond that comes again.

    Raises:
        InputError: the file cannot be written.
    """

    def __init__(self, path: Path, history: TrainingHistory) -> None:
        self.path = path
        past = [("loss", item) for item in history.loss_history.items()]
        past += [("reward", item) for item in history.reward_history.items()]
        with atomic_write(path, "w") as stream:
            stream.writelines(_loss_line(i, name, value) for name, (i, value) in sorted(past, key=lambda one: one[1]))

    def add(self, iteration: int, name: str, value: float) -> None:
        """Append an iteration's loss, or its reward; `name` says which."""
        try:
            with self.path.open("a", encoding="ascii") as stream:
                stream.write(_loss_line(iteration, name, value))
        except OSError as error:
            raise cannot_write(self.path, error) from error


def _are_losses(path: Path) -> bool:
    """Whether a file has nothing but lines of a LossFile, the last of which may be cut off."""
    lines = path.read_bytes().splitlines(keepends=True) if path.is_file() else [b"?"]
    return all(re.fullmatch(rb'\{"iter": \d+, "(loss|reward)": [^"\s]+\}\n', line) for line in lines[:-1]) and (
        not lines or lines[-1].startswith(b'{"iter": ')
    )


def _loss_line(iteration: int, name: str, value: float) -> str:
    return json.dumps({"iter": iteration, name: value}) + "\n"


class Progress:
    """Log lines with the speed since the last one and how much of the time went into waiting for data.

    Args:
        pace: takes learning rates and speeds.
        events: takes the losses too.
        losses: so does this.
    """

    def __init__(
        self,
        images_per_epoch: int,
        batch_size: int,
        pace: Pace,
        events: EventLog | None = None,
        losses: LossFile | None = None,
    ) -> None:
        self.images_per_epoch, self.batch_size, self.pace = images_per_epoch, batch_size, pace
        self.events, self.losses = events, losses
        self._since, self._iteration, self._waited = time.monotonic(), -1, 0.0

    def next(self, stream: Iterator[Batch]) -> Batch:
        """The stream's next batch, with the time it took to arrive on the books."""
        started = time.monotonic()
        batch = next(stream)
        self._waited += time.monotonic() - started
        return batch

    def report(self, iteration: int, name: str, value: float, learning_rate: float) -> None:
        """Log an iteration's loss, or its reward; `name` says which."""
        if self.losses:
            self.losses.add(iteration, name, value)
        if self.events:
            self.events.training(iteration, name, value)
        now = time.monotonic()
        seconds, iterations = max(now - self._since, 1e-9), iteration - self._iteration  # clocks may be coarse
        waiting = self._waited / seconds
        self.pace.learning_rate[iteration] = learning_rate
        self.pace.iterations_per_second[iteration] = iterations / seconds
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


def write_report(path: str | Path, history: TrainingHistory) -> None:
    """The original's `model_id<ID>.json`: opt, iter, histories and predictions, readable by its notebooks."""
    report = {
        "opt": history.opt,
        "iter": history.iteration,
        "loss_history": history.loss_history,
        "val_loss_history": history.val_loss_history,
        "val_accuracy_history": history.val_accuracy_history,
        "val_lang_stats_history": history.val_lang_stats_history,
        "val_predictions": history.val_predictions,
    }
    if history.reward_history:
        report["reward_history"] = history.reward_history
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
