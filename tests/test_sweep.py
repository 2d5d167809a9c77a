"""caption-sweep from outside: it searches, survives being killed, says which trial is best and why others failed."""

import csv
import itertools
import json
import logging
import math
import os
import re
import signal
import subprocess
import sys
import threading
import time
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

from captioner.cli.sweep import build_parser, devices_of
from captioner.errors import InputError
from captioner.sweep.results import write_results
from captioner.sweep.study import Interval, Ranges, Sweep, Workers, alone_in

ROOT = Path(__file__).parents[1]
SEED = 10  # of these ranges: a trial that works, then one that does not
RANGES = """
[fixed]
input_h5 = "{h5}"
input_json = "{json}"
cnn_model = "{cnn}"
cnn_layer = "pool5"
rnn_size = 24
input_encoding_size = 16
batch_size = 4
seq_per_img = 2
max_iters = 60
save_checkpoint_every = 10
losses_log_every = 1
num_workers = 0
language_eval = 1
shuffle = true

[search]
learning_rate = {{ low = 1e-3, high = 1e-1, log = true }}
drop_prob_lm = [0.1, 0.3, 1.5]    # the last one cannot be
"""


@pytest.fixture
def ranges(tiny_dataset, tiny_cnn, tmp_path):
    path = tmp_path / "ranges.toml"
    path.write_text(RANGES.format(h5=tiny_dataset[0], json=tiny_dataset[1], cnn=tiny_cnn))
    return path


def started(argv: list, log: Path, iteration: int) -> subprocess.Popen:
    """A sweep whose trial has come to an iteration."""
    process = subprocess.Popen([str(a) for a in argv], cwd=ROOT, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while not (log.exists() and f"iter {iteration} " in log.read_text()):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    return process


def children(pid: int) -> list[int]:
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            if int(stat.read_text().rpartition(")")[2].split()[1]) == pid:
                found.append(int(stat.parent.name))
        except OSError:  # gone meanwhile
            continue
    return found


@pytest.mark.usefixtures("without_java")
@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="finds the training in Linux's /proc")
def test_a_killed_and_a_stopped_sweep_go_on(ranges, command, tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # threads that wait for each other crawl on a busy machine
    folder = tmp_path / "sweep"
    options = ["--ranges", ranges, "--folder", folder, "--trials", 2, "--gpus", -1, "--seed", SEED]
    argv = [sys.executable, "-m", "captioner.cli.sweep", *options]

    killed = started(argv, folder / "trial0.log", 15)
    for pid in (killed.pid, *children(killed.pid)):  # a power cut: sweep and training at once
        os.kill(pid, signal.SIGKILL)
    killed.wait()

    stopped = started(argv, folder / "trial0.log", 32)
    stopped.terminate()
    assert stopped.wait(timeout=60) == 143
    assert "stopped at iteration" in (folder / "trial0.log").read_text().splitlines()[-1]

    done = command("sweep", *options)
    assert done.returncode == 0, done.stderr
    resumed = re.findall(r"^resumed at iteration (\d+)$", (folder / "trial0.log").read_text(), re.MULTILINE)
    assert resumed[0] == "10" and int(resumed[1]) > 32
    rows = list(csv.DictReader((folder / "results.csv").open()))
    assert [(row["trial"], row["state"]) for row in rows] == [("0", "done"), ("1", "failed")]
    assert "--drop_prob_lm: '1.5' is out of range" in rows[1]["reason"]
    report = json.loads((folder / "model_idtrial0.json").read_text())
    best = max(scores["CIDEr"] for scores in report["val_lang_stats_history"].values())
    assert float(rows[0]["CIDEr"]) == pytest.approx(best)
    assert float(rows[0]["learning_rate"]) == pytest.approx(report["opt"]["learning_rate"])
    assert float(rows[0]["drop_prob_lm"]) == report["opt"]["drop_prob_lm"]
    assert report["iter"] == 60
    assert "--drop_prob_lm: '1.5' is out of range" in done.stdout and done.stdout.startswith(
        "| trial | state | CIDEr |"
    )
    assert (folder / "results.md").read_text() == done.stdout
    assert ElementTree.parse(folder / "results.svg").getroot().tag.endswith("svg")
    assert {path.name for path in folder.glob("*.pt")} == {"model_idtrial0.pt"}

    again = command("sweep", *options)  # nothing is left to do
    assert again.returncode == 0 and again.stdout == done.stdout and "trial" not in again.stderr


@pytest.mark.parametrize("by_cider", [True, False])
def test_the_best_trial_comes_first(by_cider, tmp_path):
    """Four trainings by hand: two good ones, one that fails, one that is not done."""
    sweep = Sweep(tmp_path, Ranges({"language_eval": int(by_cider)}, {"rnn_size": [1, 2]}), "random", 1)
    trials = list(itertools.islice(sweep.trials(4), 4))
    for (trial, _), (loss, cider) in zip(trials[:2], [(2.5, 0.3), (2.0, 0.6)], strict=True):
        histories = {"val_loss_history": {"0": 9.0, "10": loss, "20": loss + 1}}
        histories["val_lang_stats_history"] = {"0": {"CIDEr": 0.0}, "10": {"CIDEr": cider / 2}, "20": {"CIDEr": cider}}
        (tmp_path / f"model_idtrial{trial.number}.json").write_text(json.dumps(histories))
        sweep.finish(trial, 0)
    (tmp_path / "trial2.log").write_text("iter 0\ncaption-train: error: x.h5: no | such file\n")
    sweep.finish(trials[2][0], 1)
    table = write_results(sweep)
    assert [(row["trial"], row["state"]) for row in table] == [
        (1, "done"),
        (0, "done"),
        (2, "failed"),
        (3, "unfinished"),
    ]
    name, iteration = ("CIDEr", 20) if by_cider else ("validation loss", 10)
    assert (table[0][name], table[0]["iteration"]) == (0.6 if by_cider else 2.0, iteration)
    assert table[2]["reason"] == "x.h5: no | such file"
    assert "x.h5: no \\| such file |" in (tmp_path / "results.md").read_text()


def test_every_gpu_trains_one_trial_at_a_time(tmp_path, monkeypatch):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 3)
    devices = devices_of(build_parser().parse_args(["--ranges", "x", "--workers", "7"]))
    assert devices == [0, 1, 2]
    assert devices_of(build_parser().parse_args(["--ranges", "x", "--gpus", "0,2"])) == [0, 2]
    together, trained = threading.Barrier(3, timeout=30), []

    def train(self, number, chosen, device):
        together.wait()  # breaks if fewer than three run at a time
        trained.append((number, device))
        together.wait()
        (tmp_path / f"trial{number}.log").write_text("no")
        return 1

    monkeypatch.setattr(Workers, "_train", train)
    sweep = Sweep(tmp_path, Ranges({}, {"rnn_size": [1, 2]}), "random", 1)
    assert len(list(Workers(sweep, devices, lock=0).run(6))) == 6
    assert sorted(number for number, _ in trained) == list(range(6))
    assert {device for _, device in trained[:3]} == {device for _, device in trained[3:]} == {0, 1, 2}


def test_a_sweep_waits_for_trainings_that_a_killed_one_has_left(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    with alone_in(tmp_path) as lock:
        left = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE, pass_fds=[lock])
    answers: list[int] = []

    def wait():
        with alone_in(tmp_path) as descriptor:
            answers.append(descriptor)

    thread = threading.Thread(target=wait)
    thread.start()
    thread.join(0.5)
    assert not answers and "waiting for another sweep" in caplog.text
    left.communicate(b"go\n")
    thread.join(10)
    assert answers


def test_a_sweep_of_failures_fails(ranges, command, tmp_path):
    ranges.write_text(ranges.read_text().replace("[0.1, 0.3, 1.5]", "[1.5]"))
    done = command(
        "sweep", "--ranges", ranges, "--folder", tmp_path / "sweep", "--trials", 2, "--workers", 2, "--gpus", -1
    )
    assert done.returncode == 1
    assert done.stdout.count("| failed |") == 2
    assert done.stderr.splitlines()[-1].startswith("caption-sweep: error: no trial succeeded")


def test_the_script_runs_the_command():
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    done = subprocess.run(
        [ROOT / "scripts" / "sweep", "--help"],
        env={**os.environ, "PATH": path},
        capture_output=True,
        text=True,
        check=True,
    )
    assert "usage: caption-sweep" in done.stdout


def asked(folder: Path, ranges: Ranges, sampler: str, total: int) -> list[dict]:
    return [options for _, options in Sweep(folder, ranges, sampler, seed=1).trials(total)]


def test_trials_do_not_depend_on_when_a_sweep_was_killed(tmp_path):
    search = {
        "a": Interval(1e-4, 1e-1, log=True),
        "b": Interval(8, 64, step=8),
        "c": ["x", "y"],
        "d": Interval(0.0, 1.0),
    }
    ranges = Ranges({}, search)
    for name in ("whole", "parts"):
        (tmp_path / name).mkdir()
    whole = asked(tmp_path / "whole", ranges, "random", 12)
    first = asked(tmp_path / "parts", ranges, "random", 5)
    rest = asked(tmp_path / "parts", ranges, "random", 12)  # the five are still running: they come again
    assert rest[:5] == first and rest == whole
    assert len({options["a"] for options in whole}) == 12
    assert all(1e-4 <= o["a"] <= 1e-1 and o["b"] % 8 == 0 and 8 <= o["b"] <= 64 and 0 <= o["d"] <= 1 for o in whole)
    assert {o["c"] for o in whole} == {"x", "y"} and all(type(o["b"]) is int for o in whole)


def test_tpe_looks_where_trials_were_good(tmp_path):
    sweep = Sweep(tmp_path, Ranges({}, {"a": Interval(1e-4, 1e0, log=True), "c": ["x", "y"]}), "tpe", seed=1)
    for trial, options in sweep.trials(40):
        sweep.study.tell(trial, abs(math.log10(options["a"]) + 2) + (options["c"] == "y"))
    last = [trial.params for trial in sweep.study.trials[-10:]]
    assert sum(params["c"] == "x" and 1e-3 < params["a"] < 1e-1 for params in last) >= 8  # chance: a quarter


def test_other_ranges_in_the_same_folder_are_refused(tmp_path):
    asked(tmp_path, Ranges({}, {"a": [1, 2]}), "random", 1)
    with pytest.raises(InputError, match="other ranges"):
        Sweep(tmp_path, Ranges({}, {"a": [1, 3]}), "random", 1)


BAD_RANGES = {
    "no toml": ("learning_rate: 1", "is not TOML"),
    "nothing searched": ("[fixed]\nrnn_size = 3", "no table"),
    "another table": ("[serach]\nrnn_size = [1]", "unknown table serach"),
    "unknown option": ("[search]\nrnnsize = [1, 2]", "no option rnnsize"),
    "not one training": ('[search]\nrnn_size=[1]\n[fixed]\npreset = "coco"', "no option preset"),
    "the sweep's own": ('[fixed]\nid = "x"\n[search]\nrnn_size = [1]', "id is set by the sweep"),
    "both": ("[fixed]\nrnn_size = 3\n[search]\nrnn_size = [1]", "both fixed and searched"),
    "empty choice": ("[search]\nrnn_size = []", "a list of choices"),
    "one number": ("[search]\nrnn_size = 5", "a list of choices"),
    "high below low": ("[search]\nrnn_size = { low = 5, high = 1 }", "with A < B"),
    "log of nothing": ("[search]\nlearning_rate = { low = 0.0, high = 1.0, log = true }", "A > 0"),
    "misspelt": ("[search]\nlearning_rate = { low = 0.1, high = 1.0, logs = true }", "a list of choices"),
    "table fixed": ("[fixed.rnn_size]\na = 1\n[search]\noptim = ['adam']", "fixed.rnn_size is"),
}


@pytest.mark.parametrize("case", BAD_RANGES)
def test_bad_ranges_are_one_line(case, command, tmp_path):
    text, message = BAD_RANGES[case]
    (tmp_path / "ranges.toml").write_text(text)
    done = command("sweep", "--ranges", tmp_path / "ranges.toml", "--folder", tmp_path / "sweep")
    assert done.returncode == 1 and not (tmp_path / "sweep").exists()
    line = done.stderr.splitlines()[-1]
    assert line.startswith("caption-sweep: error: ") and "ranges.toml" in line and message in line


def test_without_optuna_it_says_what_to_install(ranges, command, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "optuna", None)
    done = command("sweep", "--ranges", ranges, "--folder", tmp_path / "sweep")
    assert done.returncode == 1 and 'pip install "captioner[sweep]"' in done.stderr.splitlines()[-1]
