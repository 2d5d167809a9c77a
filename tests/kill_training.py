"""kill -9 at random moments: the same training command again and again must end like one that nothing disturbs.

    PYTHONPATH=. python tests/kill_training.py --kills 50 --seed 1

A small dataset and CNN, fine-tuning from the middle on, dropout, a checkpoint every fourth iteration. Four of five
moments are uniform over the time from the first batch to the end, so that they hit training, validation and writing
alike; the fifth over the whole time, imports included. When a run was complete, the next one begins.
"""

import argparse
import json
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import h5py
import numpy as np
import torch

from captioner.model.checkpoint import load_checkpoint
from captioner.model.encoder import Encoder
from captioner.training.resume import load_resume_state

ITERATIONS = 48
WORDS = ["a", "red", "green", "blue", "dark", "bright", "picture", "wall"]
OPTIONS = "--cnn_layer pool5 --cnn_pixels caffe --rnn_size 64 --input_encoding_size 32 --gpuid -1 --batch_size 4 "
OPTIONS += "--seq_per_img 2 --losses_log_every 1 --val_images_use -1 --save_checkpoint_every 4 "
OPTIONS += f"--max_iters {ITERATIONS} "
OPTIONS += "--finetune_cnn_after 24 --cnn_learning_rate 1e-4 --num_workers 2 --resume auto"
FILES = ("model_id.pt", "model_id_last.pt")


def run(kills: int, seed: int) -> str:
    """Kill so many times; a Markdown table of where it hit and what differs from the undisturbed run."""
    rng = random.Random(seed)
    hit = {"before the first iteration": 0, "in training": 0, "after the last iteration": 0}
    runs, losses_differ, differences = 0, 0, 0.0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        _write_data(folder)
        times = _end_times(folder)
        while sum(hit.values()) < kills:
            runs += 1
            while sum(hit.values()) < kills:
                if _ended(folder, f"run{runs}", rng.random() < 0.2, rng.random(), times, hit):
                    break
            else:
                _ended(folder, f"run{runs}", True, 1000, times, hit)
            largest, unequal = _compare(folder / "undisturbed", folder / f"run{runs}")
            differences, losses_differ = max(differences, largest), losses_differ + unequal
    rows = [("kill -9, and complete runs they were spread over", f"{sum(hit.values())}, {runs}")]
    rows += [(f"killed {where}", str(count)) for where, count in hit.items()]
    rows += [("histories of loss, validation loss and captions that differ", f"{losses_differ} of {3 * runs}")]
    rows += [("largest difference of a weight, best and last models", f"{differences:g}")]
    return "\n".join(["| what | value |", "|---|---|", *(f"| {what} | {value} |" for what, value in rows)])


def _end_times(folder: Path) -> tuple[float, float]:
    """Seconds of the undisturbed run: from its start, and from its first batch, to its end."""
    started = time.monotonic()
    process = _start(folder, "undisturbed")
    log = _until_training(process)
    training = time.monotonic()
    log += process.communicate()[1]
    assert process.returncode == 0, log
    return time.monotonic() - started, time.monotonic() - training


def _until_training(process: subprocess.Popen) -> str:
    """The log up to the line after which training begins."""
    log = ""
    assert process.stderr is not None
    for line in process.stderr:
        log += line
        if "training images" in line:
            break
    return log


def _start(folder: Path, run_name: str) -> subprocess.Popen:
    argv = [sys.executable, "-m", "captioner.cli.train", *OPTIONS.split(), "--cnn_model", str(folder / "cnn.pth")]
    argv += ["--input_h5", str(folder / "data.h5"), "--input_json", str(folder / "data.json")]
    argv += ["--checkpoint_path", str(folder / run_name)]
    # Sums depend in their last digits on the number of threads.
    return subprocess.Popen(argv, stderr=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})


def _ended(
    folder: Path, run_name: str, whole: bool, share: float, times: tuple[float, float], hit: dict[str, int]
) -> bool:
    """Start the command and kill it at a share of its time, unless it has ended by then: True if it has.

    Args:
        whole: whether the time is that from the start on, or from the first batch on.
        times: how long either takes.
    """
    process = _start(folder, run_name)
    log = "" if whole else _until_training(process)
    try:
        log += process.communicate(timeout=share * times[0 if whole else 1])[1]
        assert process.returncode == 0, log
        return True
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGKILL)
    log += process.communicate()[1]
    iterations = [int(number) for number in re.findall(r"^iter (\d+) ", log, re.MULTILINE)]
    last = iterations[-1] if iterations else -1
    before, after = last < 0, last == ITERATIONS - 1
    hit[f"{'before the first' if before else 'after the last'} iteration" if before or after else "in training"] += 1
    state = folder / run_name / "model_id_resume.pt"
    if state.exists():
        load_resume_state(state)  # whole at any moment
    return False


def _compare(undisturbed: Path, killed: Path) -> tuple[float, int]:
    """The largest difference of any weight, and how many of the report's histories differ."""
    largest = 0.0
    for name in FILES:
        one, other = load_checkpoint(undisturbed / name).state_dict, load_checkpoint(killed / name).state_dict
        largest = max(largest, *(float((one[key] - other[key]).abs().max()) for key in one))
    reports = [json.loads((folder / "model_id.json").read_text()) for folder in (undisturbed, killed)]
    histories = ("loss_history", "val_loss_history", "val_predictions")
    return largest, sum(reports[0][name] != reports[1][name] for name in histories)


def _write_data(folder: Path) -> None:
    rng = np.random.default_rng(0)
    splits = ["train"] * 24 + ["val"] * 8
    labels = np.zeros((2 * len(splits), 16), np.uint32)
    for row in labels:
        length = rng.integers(2, 9)
        row[:length] = rng.integers(1, len(WORDS) + 1, size=length)
    first = np.arange(1, len(labels), 2, dtype=np.uint32)
    with h5py.File(folder / "data.h5", "w") as file:
        file["images"] = rng.integers(0, 256, size=(len(splits), 3, 256, 256), dtype=np.uint8)
        file["labels"], file["label_start_ix"], file["label_end_ix"] = labels, first, first + 1
        file["label_length"] = (labels > 0).sum(axis=1).astype(np.uint32)
    info = [{"split": split, "file_path": f"{i}.png", "id": i} for i, split in enumerate(splits)]
    words = {str(i): word for i, word in enumerate(WORDS, start=1)}
    (folder / "data.json").write_text(json.dumps({"ix_to_word": words, "images": info}))
    torch.manual_seed(0)
    state = Encoder("pool5", (12,) * 13).state_dict()
    torch.save({key: value for key, value in state.items() if key.startswith("features.")}, folder / "cnn.pth")


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    print(run(arguments.kills, arguments.seed))
