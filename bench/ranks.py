"""Training in 1, 2 and 4 processes of one thread each, as torchrun starts them: the same weights, and how much faster.

On a machine with fewer free cores than processes the second column says nothing, the last one all the same.
"""

import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from bench.coco_shaped import make_dataset
from captioner.model.checkpoint import load_checkpoint

WARM_UP = 2
OPTIONS = "--cnn_layer pool5 --drop_prob_lm 0 --optim sgd --precision fp32 --gpuid -1 --losses_log_every 1 "
OPTIONS += "--val_images_use 4 --batch_size 8 --num_workers 1 "
KINDS = {"frozen": "--finetune_cnn_after -1", "fine-tuning": "--finetune_cnn_after 0"}


def run() -> None:
    """Print the table: VGG16 with the default language model, 8 images in all."""
    with tempfile.TemporaryDirectory() as folder:
        make_dataset(Path(folder), 64, held_out="val")
        data = ["--input_h5", f"{folder}/data.h5", "--input_json", f"{folder}/data.json", "--cnn_model", "random"]
        measure(data, Path(folder), counts=(1, 2, 4), iterations=8)


def measure(data: Sequence[str], folder: Path, *, counts: Sequence[int], iterations: int) -> None:
    """Print seconds an iteration by number of processes, and how far weights are from those of the first row.

    Args:
        data: options that name dataset and CNN.
        counts: numbers of processes.
    """
    print(f"{len(os.sched_getaffinity(0))} CPU cores\n")
    print("| training | processes | ms an iteration | times faster | weights differ by |\n|---|---|---|---|---|")
    for kind, options in KINDS.items():
        first: tuple[float, dict] | None = None
        for count in counts:
            target = folder / f"{kind}{count}"
            argv = [*data, *OPTIONS.split(), *options.split(), "--max_iters", str(iterations)]
            seconds = _train([*argv, "--checkpoint_path", str(target)], count)[WARM_UP:]
            weights = load_checkpoint(target / "model_id_last.pt").state_dict
            median = statistics.median(seconds)
            first = first or (median, weights)
            differ = max(float((own - weights[name]).abs().max()) for name, own in first[1].items())
            spread = f"{1000 * median:.0f} ({1000 * min(seconds):.0f}-{1000 * max(seconds):.0f})"
            print(f"| {kind} | {count} | {spread} | {first[0] / median:.2f} | {differ:.1e} |", flush=True)


def _train(argv: Sequence[str], count: int) -> list[float]:
    """Train by caption-train in so many processes; the seconds of each iteration but the first."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={count}", "-m", "captioner.cli.train"]
    command = [sys.executable, *launcher, *argv]
    log, times = [], []
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}) as one:
        assert one.stderr
        for line in one.stderr:
            log.append(line)
            if re.match(r"iter \d+ ", line):
                times.append(time.perf_counter())
    assert one.returncode == 0, "".join(log)
    return [after - before for before, after in zip(times, times[1:], strict=False)]
