"""torchrun: what several processes train, and what happens when one of them is killed."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
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


def torchrun(
    data: list,
    folder: Path,
    *options: object,
    size: int = 2,
    program: tuple = ("-m", "captioner.cli.train"),
    **more: str,
) -> subprocess.Popen:
    argv = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", size, *options]
    argv += [*program, *data, "--checkpoint_path", folder]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **more}
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


def assert_trained_alike(folder: Path, other: Path) -> list[dict]:
    """Their reports; weights and losses are those of one training but for rounding."""
    one, two = (load_checkpoint(run / "model_id_last.pt").state_dict for run in (folder, other))
    for name, tensor in one.items():
        # Adam turns rounding of tiny gradients into steps of up to the learning rate: hence not 1e-6.
        torch.testing.assert_close(tensor, two[name], rtol=0, atol=2e-3, msg=lambda m, n=name: f"{n}: {m}")
    reports = [json.loads((run / "model_id.json").read_text()) for run in (folder, other)]
    for history in ("loss_history", "val_loss_history"):
        assert reports[1][history] == pytest.approx(reports[0][history], abs=1e-4)
    return reports


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
    reports = assert_trained_alike(tmp_path, undisturbed)
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


@pytest.mark.timeout(600)
def test_another_number_of_processes_goes_on_with_a_run(undisturbed, data, command, tmp_path):
    """Two processes, then one, then three train what two train undisturbed: in 1 to 16, 17 to 24, 25 to 30."""
    for size, last in ((2, 16), (1, 24), (3, 30)):
        process = torchrun([*data, "--max_iters", last], tmp_path, size=size)
        _, err = process.communicate(timeout=200)
        assert process.returncode == 0, err
        before = {1: 2, 3: 1}.get(size)
        assert not before or f"{size} process(es) go on with what {before} did" in err, err
    assert_trained_alike(undisturbed, tmp_path)


def test_more_processes_than_images_of_a_batch_is_one_line(data, tmp_path):
    process = torchrun([*data, "--batch_size", 1], tmp_path)
    _, err = process.communicate(timeout=100)
    assert process.returncode not in (0, None)
    assert "caption-train: error: --batch_size 1: not an image for each process" in err


# Says what features it computes, two images at a time, and which process dies while it does so.
IN_THE_CACHE = """
import os, signal, sys
from captioner.cli.train import main
from captioner.model.caption_model import CaptionModel
from captioner.training import feature_cache
feature_cache.BATCH_SIZE = 2
whole, calls = CaptionModel.cnn_features, []
def cnn_features(self, images, offsets=None):
    if offsets is not None:
        calls.append(len(images))
        if os.environ["RANK"] == os.environ.get("KILLED") and len(calls) == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        os.write(2, f"computed by {os.environ['RANK']}\\n".encode())  # in one piece, whoever else writes
    return whole(self, images, offsets)
CaptionModel.cnn_features = cnn_features
sys.exit(main())
"""


@pytest.mark.timeout(600)
def test_a_process_killed_while_features_are_computed_costs_its_batch_and_more_processes_go_on(
    data, tiny_dataset, two_files, command, tmp_path
):
    """From two h5 files; what comes out is what one process trains from one."""
    (tmp_path / "cache.py").write_text(IN_THE_CACHE)
    program = (tmp_path / "cache.py",)
    cached = ["--cache_features", 1, "--finetune_cnn_after", -1, "--max_iters", 4]
    first = torchrun([*data, *two_files, *cached], tmp_path / "run", program=program, KILLED="1")
    _, log = first.communicate(timeout=250)
    assert first.returncode not in (0, None)
    errors = [line for line in log.splitlines() if "caption-train: error:" in line]
    assert len(errors) == 1 and "another process of this run has ended" in errors[0], log
    assert 'captioner/cli/train.py"' not in log, log
    assert log.count("computed by 0") == 3 and log.count("computed by 1") == 2

    second = torchrun([*data, *two_files, *cached], tmp_path / "run", size=3, program=program)
    _, log = second.communicate(timeout=250)
    assert second.returncode == 0, log
    assert [log.count(f"computed by {rank}") for rank in range(3)] == [3, 3, 3]  # 14 batches in all
    assert "on cpu × 3 processes" in log

    alone = [*data, "--input_h5", shutil.copy(tiny_dataset[0], tmp_path), *cached]
    done = command("train", *alone, "--checkpoint_path", tmp_path / "alone")
    assert done.returncode == 0, done.stderr
    (features,) = two_files[1].parent.glob("features-*.npy")
    (expected,) = tmp_path.glob("features-*.npy")
    assert np.allclose(np.load(features)["values"], np.load(expected)["values"], rtol=1e-5, atol=1e-6)
    assert not list(two_files[1].parent.glob(".features*"))
    one, three = (load_checkpoint(tmp_path / name / "model_id_last.pt").state_dict for name in ("alone", "run"))
    for name, tensor in one.items():
        torch.testing.assert_close(tensor, three[name], rtol=0, atol=2e-3, msg=lambda m, n=name: f"{n}: {m}")
