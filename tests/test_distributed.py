"""torchrun: what several processes train, and what happens when one of them is killed."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from captioner.model.checkpoint import load_checkpoint

RUN = ["--cnn_layer", "pool5", "--rnn_size", 24, "--input_encoding_size", 16, "--gpuid", -1, "--batch_size", 4]
RUN += ["--seq_per_img", 2, "--losses_log_every", 1, "--val_images_use", -1, "--learning_rate", 0.01]
RUN += ["--precision", "fp32"]  # what is equal is so within rounding
RUN += ["--max_iters", 30, "--save_checkpoint_every", 8, "--num_workers", 1, "--finetune_cnn_after", 12]
RUN += ["--drop_prob_lm", 0, "--resume", "auto"]


@pytest.fixture(scope="module")
def data(tiny_dataset, tiny_cnn):
    return ["--input_h5", tiny_dataset[0], "--input_json", tiny_dataset[1], "--cnn_model", tiny_cnn, *RUN]


def torchrun(data: list, folder: Path, *options: object) -> subprocess.Popen:
    argv = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", 2, *options]
    argv += ["-m", "captioner.cli.train", *data, "--checkpoint_path", folder]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen([str(a) for a in argv], stderr=subprocess.PIPE, text=True, env=environment)


def process_of_rank(rank: int, launcher: subprocess.Popen) -> int:
    """The process id of one of the processes that torchrun started."""
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            parent = int(stat.read_text().rpartition(")")[2].split()[1])
            variables = (stat.parent / "environ").read_bytes().split(b"\0")
        except (OSError, IndexError):  # gone meanwhile
            continue
        if parent == launcher.pid and f"RANK={rank}".encode() in variables:
            return int(stat.parent.name)
    raise AssertionError(f"torchrun has no process of rank {rank}")


def kill_at(iteration: int, rank: int, launcher: subprocess.Popen) -> str:
    """kill -9 one process once the log shows an iteration; returns the log so far."""
    log = ""
    assert launcher.stderr is not None
    for line in launcher.stderr:
        log += line
        if line.startswith(f"iter {iteration} "):
            os.kill(process_of_rank(rank, launcher), signal.SIGKILL)
            return log
    raise AssertionError(log)


@pytest.fixture(scope="module")
def undisturbed(data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed")
    process = torchrun(data, folder)
    _, err = process.communicate(timeout=200)
    assert process.returncode == 0, err
    return folder


def test_two_processes_train_what_one_trains(undisturbed, data, command, tmp_path):
    done = command("train", *data, "--checkpoint_path", tmp_path)
    assert done.returncode == 0, done.stderr
    one, two = (load_checkpoint(folder / "model_id_last.pt").state_dict for folder in (tmp_path, undisturbed))
    for name, tensor in one.items():
        # Adam turns rounding of tiny gradients into steps of up to the learning rate: hence not 1e-6.
        torch.testing.assert_close(tensor, two[name], rtol=0, atol=2e-3, msg=lambda m, n=name: f"{n}: {m}")
    reports = [json.loads((folder / "model_id.json").read_text()) for folder in (tmp_path, undisturbed)]
    for history in ("loss_history", "val_loss_history"):
        assert reports[1][history] == pytest.approx(reports[0][history], abs=1e-4)
    ids = [[row["image_id"] for row in report["val_predictions"]] for report in reports]
    assert ids[0] == ids[1] and len(ids[0]) == 7


@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="finds the processes in Linux's /proc")
def test_a_killed_process_stops_the_others_and_the_command_goes_on(undisturbed, data, tmp_path):
    first = torchrun(data, tmp_path)
    log = kill_at(10, 1, first)
    killed_at = time.monotonic()
    _, rest = first.communicate(timeout=100)
    assert first.returncode not in (0, None)
    assert time.monotonic() - killed_at < 20
    errors = [line for line in (log + rest).splitlines() if "caption-train: error:" in line]
    assert len(errors) == 1 and "another process of this run has ended" in errors[0] and "--resume auto" in errors[0]
    assert 'captioner/cli/train.py"' not in rest, rest  # no traceback of ours; torchrun shows one of its own

    # The same command; this time the first process dies, and torchrun starts both anew by itself.
    second = torchrun(data, tmp_path, "--max_restarts", 1)
    log = kill_at(20, 0, second)
    _, rest = second.communicate(timeout=100)
    assert second.returncode == 0, rest
    assert re.findall(r"resumed at iteration (\d+)", log + rest) == ["8", "16"]
    one, two = (load_checkpoint(folder / "model_id_last.pt").state_dict for folder in (undisturbed, tmp_path))
    assert all(torch.equal(tensor, two[name]) for name, tensor in one.items())
    histories = [
        json.loads((folder / "model_id.json").read_text())["loss_history"] for folder in (undisturbed, tmp_path)
    ]
    assert histories[0] == histories[1]


def test_more_processes_than_images_of_a_batch_is_one_line(data, tmp_path):
    process = torchrun([*data, "--batch_size", 1], tmp_path)
    _, err = process.communicate(timeout=100)
    assert process.returncode not in (0, None)
    assert "caption-train: error: --batch_size 1: not an image for each process" in err
