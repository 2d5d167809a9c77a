"""caption-sweep: search for good training options (original: the scripts in cv/)."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from captioner.cli.options import Parser, Range, positive, run, seed_number
from captioner.cli.train_options import build_parser as train_parser
from captioner.errors import InputError
from captioner.runtime.files import require_writable_folder
from captioner.runtime.signals import Interruption


def build_parser() -> Parser:
    """The command's options."""
    p = Parser(
        prog="caption-sweep",
        description="Train with many settings of caption-train's options, chosen from ranges, and compare them. Repeat "
        "the command to go on with a killed sweep, or with more --trials.",
    )
    p.add_argument("--ranges", required=True, metavar="F.toml", help="options that all trials share, and ranges")
    p.add_argument("--folder", default="sweep", help="for checkpoints, logs, the study and the results")
    p.add_argument("--trials", type=positive, default=20, help="trainings in all, those of earlier starts included")
    p.add_argument("--gpus", default="", metavar="0,1,..", help="a worker on each; empty: on every GPU there is")
    p.add_argument("--workers", type=Range(int, 1, 1024), default=1, help="trainings at a time where there is no GPU")
    p.add_argument("--sampler", choices=("random", "tpe"), default="random", help="tpe learns from the trials before")
    p.add_argument("--seed", type=seed_number, default=123, help="of the choices")
    return p


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of `caption-sweep`."""
    opt = build_parser().parse_args(argv)
    return run("caption-sweep", lambda: sweep(opt))


def sweep(opt: argparse.Namespace) -> int:
    """Run the trials that are left; the table goes to stdout. Returns the exit code."""
    from captioner.sweep.results import markdown, write_results
    from captioner.sweep.study import Sweep, Workers, alone_in, read_ranges

    known = [action.dest for action in train_parser()._actions]
    ranges = read_ranges(Path(opt.ranges), known)
    folder = require_writable_folder(opt.folder, "a sweep")
    with alone_in(folder) as lock:
        study = Sweep(folder, ranges, opt.sampler, opt.seed)
        workers = Workers(study, devices_of(opt), lock)
        table = write_results(study)
        with Interruption() as interruption:
            try:
                for _ in workers.run(opt.trials):
                    table = write_results(study)
            except KeyboardInterrupt:
                workers.stop()
                return 128 + interruption.signal
    print(markdown(table))
    if not any(row["state"] == "done" for row in table):
        raise InputError("no trial succeeded", remedy=f"see the reasons above and the logs in {folder}")
    return 0


def devices_of(opt: argparse.Namespace) -> list[int]:
    """The --gpuid of each worker.

    Raises:
        InputError: --gpus is no list of numbers.
    """
    if opt.gpus:
        try:
            return [int(number) for number in opt.gpus.split(",")]
        except ValueError:
            raise InputError(f"--gpus is {opt.gpus!r}", expected="numbers separated by commas, as 0,1,2") from None
    import torch

    return list(range(torch.cuda.device_count())) or [-1] * opt.workers


if __name__ == "__main__":
    raise SystemExit(main())
