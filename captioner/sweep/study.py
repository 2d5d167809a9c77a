"""Random or guided search over training options: one training at a time per worker, on disk whatever is killed.

Each trial is a run of caption-train of its own, `trial<N>` in the sweep's folder. Optuna chooses the options and keeps
the book (study.journal); its trials that still run when a sweep starts are those that a killed one left behind, and go
on where they were. (Original: the scripts in cv/.)
"""

import contextlib
import json
import logging
import os
import queue
import re
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from captioner.errors import InputError
from captioner.runtime.files import read_json, read_small

if TYPE_CHECKING:  # an extra, imported late
    import optuna

log = logging.getLogger(__name__)

Value = str | int | float | bool
Sampler = Literal["random", "tpe"]
JOURNAL = "study.journal"
RESULTS = ("results.csv", "results.md", "results.svg")
SET_BY_THE_SWEEP = ("id", "checkpoint_path", "gpuid", "resume")
LARGEST = 1e12  # of a range, as of the options' own
OTHER_COMMANDS = ("plan", "preset", "stages", "help", "version")  # not one training


@dataclass(frozen=True)
class Interval:
    """Numbers from low to high, both included; whole ones if both are."""

    low: float
    high: float
    log: bool = False
    step: float | None = None


@dataclass(frozen=True)
class Ranges:
    """What a sweep varies, and what all of its trials share."""

    fixed: dict[str, Value]
    search: dict[str, Interval | list[Value]]

    @property
    def by_cider(self) -> bool:
        """Whether the best trial is the one with the highest CIDEr, not with the lowest validation loss."""
        return bool(int(self.fixed.get("language_eval", 0)))

    def to_json(self) -> str:
        """For comparison with what a sweep began with."""
        return json.dumps([self.fixed, self.search], default=vars, sort_keys=True)


def read_ranges(path: Path, known: Sequence[str]) -> Ranges:
    """Read a file of ranges: tables [fixed] and [search] in TOML.

    Args:
        known: the names of caption-train's options.

    Raises:
        InputError: no such file, no TOML, an unknown option, or a range that is none.
    """
    content = _read_toml(path)
    unknown = sorted(content.keys() - {"fixed", "search"})
    if unknown or not isinstance(content.get("search"), dict) or not content["search"]:
        problem = f"unknown table {unknown[0]}" if unknown else "no table [search]"
        raise InputError(f"{path}: {problem}", expected="[fixed], and [search] with at least one range")
    fixed = content.get("fixed", {})
    if not isinstance(fixed, dict):
        raise InputError(f"{path}: fixed is {fixed!r}", expected="a table, [fixed]")
    for name in (*fixed, *content["search"]):
        if name in SET_BY_THE_SWEEP:
            raise InputError(f"{path}: {name} is set by the sweep, for each trial", remedy="leave it out")
        if name not in known or name in OTHER_COMMANDS:
            raise InputError(f"{path}: caption-train has no option {name} that a sweep could set")
    both = sorted(fixed.keys() & content["search"].keys())
    if both:
        raise InputError(f"{path}: {both[0]} is both fixed and searched")
    for name, value in fixed.items():
        if not _is_value(value):
            raise InputError(f"{path}: fixed.{name} is {value!r}", expected="a number or a text")
    return Ranges(fixed, {name: _range(path, name, value) for name, value in content["search"].items()})


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        import tomllib as toml
    except ImportError:  # Python 3.10
        try:
            import tomli as toml
        except ImportError as error:
            raise _missing("tomli") from error
    try:
        return toml.loads(read_small(path).decode("utf-8"))
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror or error})") from error
    except ValueError as error:
        raise InputError(f"{path}: is not TOML ({error})") from error
    except RecursionError:
        raise InputError(f"{path}: is nested too deeply") from None


def _missing(package: str) -> InputError:
    return InputError(f"a sweep needs {package}, which is not installed", remedy='pip install "captioner[sweep]"')


def _is_value(value: object) -> bool:
    """Whether an option can be set to it; NaN and infinite numbers are values that caption-train will refuse."""
    return isinstance(value, int | float) or (isinstance(value, str) and "\0" not in value)


def _range(path: Path, name: str, value: Any) -> Interval | list[Value]:
    if isinstance(value, list) and value and all(map(_is_value, value)):
        return value
    if isinstance(value, dict) and {"low", "high"} <= value.keys() <= {"low", "high", "log", "step"}:
        numbers = [value[key] for key in ("low", "high", "step") if key in value]
        if all(type(number) in (int, float) and abs(number) <= LARGEST for number in numbers) and isinstance(
            value.get("log", False), bool
        ):
            interval = Interval(**value)
            positive = not interval.log or (interval.low > 0 and interval.step is None)
            if interval.low < interval.high and positive and (interval.step is None or interval.step > 0):
                return interval
    raise InputError(
        f"{path}: search.{name} is {value!r}",
        expected="a list of choices, or { low = A, high = B } with A < B and perhaps log = true (A > 0) or step = C",
    )


def _require_own_folder(folder: Path) -> None:
    """Refuse a folder where a new sweep would write over files of others.

    Raises:
        InputError: naming the first of them.
    """
    journal = folder / JOURNAL
    if os.path.lexists(journal) and not journal.is_file():
        raise InputError(f"{journal}: is no file", remedy="choose another --folder")
    if journal.exists():
        return
    for name in sorted(entry.name for entry in os.scandir(folder)):
        if name in RESULTS or re.fullmatch(r"trial\d+\.log|model_idtrial\d+.*", name):
            raise InputError(
                f"{folder / name}: is there, but {journal.name} of a sweep is not", remedy="choose another --folder"
            )


class Sweep:
    """The book of a sweep, in its folder.

    Args:
        seed: trial N draws its options from seed and N, whatever ran before it.

    Raises:
        InputError: Optuna is missing, or the folder holds a sweep over other ranges.
    """

    def __init__(self, folder: Path, ranges: Ranges, sampler: Sampler, seed: int) -> None:
        try:
            import optuna
            from optuna.storages import JournalStorage
            from optuna.storages.journal import JournalFileBackend
        except ImportError as error:
            raise _missing("Optuna") from error
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self.folder, self.ranges, self.sampler, self.seed = folder, ranges, sampler, seed
        self._optuna, self._lock = optuna, threading.Lock()
        journal = folder / JOURNAL
        _require_own_folder(folder)
        try:
            self.study = optuna.create_study(
                storage=JournalStorage(JournalFileBackend(str(journal))),
                study_name="sweep",
                direction="maximize" if ranges.by_cider else "minimize",
                load_if_exists=True,
            )
        except (ValueError, KeyError, TypeError, AttributeError, optuna.exceptions.OptunaError) as error:
            raise InputError(
                f"{journal}: is damaged, or no book of a sweep ({error})", remedy="choose another --folder"
            ) from error
        began_with = self.study.user_attrs.setdefault("ranges", ranges.to_json())
        if began_with != ranges.to_json():
            raise InputError(
                f"{folder}: holds a sweep over other ranges",
                remedy="choose another --folder, or that sweep's file",
            )
        self.study.set_user_attr("ranges", began_with)

    def trials(self, total: int) -> "Iterator[tuple[optuna.Trial, dict[str, Value]]]":
        """What is left to do of `total` trials, each with its options; begun ones first."""
        running = self.study.get_trials(states=[self._optuna.trial.TrialState.RUNNING])
        for frozen in running:
            trial = self._optuna.Trial(self.study, frozen._trial_id)
            yield trial, self._options(trial)
        while (number := len(self.study.trials)) < total:
            self.study.sampler = self._make_sampler(number)
            trial = self.study.ask()
            yield trial, self._options(trial)

    def _make_sampler(self, number: int) -> "optuna.samplers.BaseSampler":
        seed = (self.seed * 100_003 + number) % 2**32  # all that numpy takes
        if self.sampler == "tpe":
            return self._optuna.samplers.TPESampler(seed=seed, constant_liar=True)
        return self._optuna.samplers.RandomSampler(seed=seed)

    def _options(self, trial: "optuna.Trial") -> dict[str, Value]:
        chosen: dict[str, Any] = {}
        for name, values in self.ranges.search.items():
            if isinstance(values, list):
                chosen[name] = trial.suggest_categorical(name, values)
            elif isinstance(values.low, int) and isinstance(values.high, int):
                chosen[name] = trial.suggest_int(
                    name, values.low, values.high, step=int(values.step or 1), log=values.log
                )
            else:
                chosen[name] = trial.suggest_float(name, values.low, values.high, step=values.step, log=values.log)
        return chosen

    def finish(self, trial: "optuna.Trial", code: int) -> None:
        """Enter how a trial's training ended: its best score, or the reason of its failure."""
        number = trial.number
        log_file = self.folder / f"trial{number}.log"
        best = self._best(self.folder / f"model_idtrial{number}.json") if code == 0 else None
        if best:
            score, iteration = best
            trial.set_user_attr("iteration", iteration)
            self.study.tell(trial, score)
            for kind in ("last", "resume"):  # three quarters of a trial's disk space, and done with
                (self.folder / f"model_idtrial{number}_{kind}.pt").unlink(missing_ok=True)
            log.info("trial %d: %s %.4f at iteration %d", number, self.score_name, score, iteration)
            return
        lines = log_file.read_text(encoding="utf-8", errors="replace").strip().splitlines() or [""]
        reason = (
            f"killed by signal {-code}"
            if code < 0
            else "it has no score"
            if code == 0
            else lines[-1].removeprefix("caption-train: error: ")
        )
        trial.set_user_attr("reason", reason)
        self.study.tell(trial, state=self._optuna.trial.TrialState.FAIL)
        log.warning("trial %d failed: %s (see %s)", number, reason, log_file)

    @property
    def score_name(self) -> str:
        """What trials are compared by."""
        return "CIDEr" if self.ranges.by_cider else "validation loss"

    def _best(self, report: Path) -> tuple[float, int] | None:
        curve = validation_curve(report, self.ranges.by_cider)
        return (max(curve) if self.ranges.by_cider else min(curve)) if curve else None


def validation_curve(report: Path, by_cider: bool) -> list[tuple[float, int]]:
    """(score, iteration) of each validation in a training's report.

    Raises:
        InputError: it cannot be read, or is none.
    """
    content = read_json(report)
    try:
        if by_cider:
            return [(float(scores["CIDEr"]), int(k)) for k, scores in content["val_lang_stats_history"].items()]
        return [(float(loss), int(k)) for k, loss in content["val_loss_history"].items() if loss is not None]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{report}: is no report of a training, or a damaged one") from error


class Workers:
    """Trains trials, one at a time on each device, until none is left or `stop` is called.

    Args:
        devices: the --gpuid of each worker; -1 is the CPU, whose cores are shared out among its workers.
        lock: an open file that trainings inherit, so that its lock lasts as long as any of them.
    """

    def __init__(self, sweep: Sweep, devices: Sequence[int], lock: int) -> None:
        self.sweep, self.devices, self.lock = sweep, devices, lock
        self._stopping = False
        self._running: set[subprocess.Popen] = set()
        self._mutex = threading.Lock()

    def run(self, total: int) -> Iterator[None]:
        """Yield after each trial that has ended."""
        trials = self.sweep.trials(total)
        ended: queue.Queue[BaseException | None] = queue.Queue()

        def work(device: int) -> None:
            try:
                while True:
                    with self._mutex:
                        following = None if self._stopping else next(trials, None)
                    if following is None:
                        break
                    code = self._train(following[0].number, following[1], device)
                    if self._stopping:
                        break  # what was stopped half-way stays a running trial
                    with self._mutex:
                        self.sweep.finish(following[0], code)
                    ended.put(None)
            except BaseException as error:  # for the main thread to raise
                ended.put(error)
            ended.put(StopIteration())

        threads = [threading.Thread(target=work, args=(device,), daemon=True) for device in self.devices]
        for thread in threads:
            thread.start()
        left = len(threads)
        while left:
            event = ended.get()
            if isinstance(event, StopIteration):
                left -= 1
            elif event is not None:
                raise event
            else:
                yield

    def _train(self, number: int, chosen: Mapping[str, Value], device: int) -> int:
        options = {**self.sweep.ranges.fixed, **chosen}
        options |= {
            "id": f"trial{number}",
            "checkpoint_path": str(self.sweep.folder),
            "gpuid": device,
            "resume": "auto",
        }
        argv = [sys.executable, "-m", "captioner.cli.train"]
        argv += [f"--{name}={int(value) if isinstance(value, bool) else value}" for name, value in options.items()]
        environment = dict(os.environ)
        if device < 0:
            environment.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // len(self.devices))))
        log.info("trial %d: %s", number, ", ".join(f"{name} {_short(value)}" for name, value in chosen.items()))
        with (self.sweep.folder / f"trial{number}.log").open("a", encoding="utf-8") as output:
            with self._mutex:
                if self._stopping:
                    return -1
                # A session of its own: Ctrl-C reaches a training through `stop` alone, once.
                process = subprocess.Popen(
                    argv, stdout=output, stderr=output, env=environment, pass_fds=[self.lock], start_new_session=True
                )
                self._running.add(process)
            code = process.wait()
            with self._mutex:
                self._running.discard(process)
        return code

    def stop(self) -> None:
        """Let the trainings save their state and end; the next sweep in this folder goes on with them."""
        with self._mutex:
            self._stopping = True
            running = list(self._running)
        for process in running:
            process.terminate()
        for process in running:
            process.wait()


@contextlib.contextmanager
def alone_in(folder: Path) -> Iterator[int]:
    """Hold the folder for one sweep and its trainings: those of a killed sweep must end before the next one begins.

    Yields:
        The descriptor that trainings inherit.
    """
    try:
        import fcntl
    except ImportError as error:
        raise InputError("a sweep needs Linux or macOS", remedy="on Windows: use WSL") from error
    lock = folder / "lock"
    if os.path.lexists(lock) and (not lock.is_file() or lock.stat().st_size):
        raise InputError(f"{lock}: is there, and is no lock of a sweep", remedy="choose another --folder")
    with lock.open("a") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            log.info("%s: waiting for another sweep, or for trainings that a killed one has left, to end", folder)
            fcntl.flock(stream, fcntl.LOCK_EX)
        yield stream.fileno()


def _short(value: Value) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
