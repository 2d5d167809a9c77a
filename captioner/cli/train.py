"""caption-train: train a captioning model (original: train.lua)."""

from collections.abc import Sequence
from typing import Any

from captioner.cli.options import run
from captioner.cli.train_options import build_parser, given_options


def main(argv: Sequence[str] | None = None) -> int:
    given = given_options(build_parser(), argv)
    planning = given.pop("plan", False)
    return run("caption-train", lambda: _plan(given) if planning else _train(given))


def _train(given: dict[str, Any]) -> int:
    import captioner  # torch is imported late, so that --help and argument errors are instant

    stopped_by = captioner.train(**given).stopped_by
    return 128 + stopped_by if stopped_by else 0


def _plan(given: dict[str, Any]) -> int:
    import captioner

    for line in captioner.plan_training(**given):
        print(line, flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
