"""What all commands share: option spelling, logging, and how a run ends."""

import argparse
import logging
import os
import re
import sys
from collections.abc import Callable, Sequence
from typing import Any

from captioner.errors import InputError

_OPTION = re.compile(r"^--?([A-Za-z][\w-]*)(=.*)?$", re.DOTALL)


class Parser(argparse.ArgumentParser):
    """argparse with one spelling of options: `--a_b`, `--a-b` and `-a_b` mean the same; no abbreviations."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(allow_abbrev=False, formatter_class=_HelpFormatter, **kwargs)

    def parse_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> Any:  # type: ignore[override]
        return super().parse_args(self.normalise(sys.argv[1:] if args is None else args), namespace)

    def normalise(self, argv: Sequence[str]) -> list[str]:
        """Bring option names to the registered spelling; values and negative numbers stay as they are."""
        known = self._option_string_actions
        normalised: list[str] = []
        expects_value = False
        for argument in argv:
            match = _OPTION.match(argument)
            name = "--" + match[1].replace("-", "_") if match else ""
            if not expects_value and name in known:
                normalised.append(name + (match[2] or "") if match else argument)
                expects_value = known[name].nargs != 0 and not (match and match[2])
            elif expects_value and argument.startswith("-") and name not in known:
                # A value such as "-beam" or a negative number: argparse would take it for an option.
                normalised[-1] += "=" + argument
                expects_value = False
            else:
                if expects_value and name in known:
                    normalised.append(name)  # the value is missing: argparse says so
                else:
                    normalised.append(argument)
                expects_value = False
        return normalised


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=34, width=110)


def flag(text: str) -> bool:
    """The original's 1/0 options."""
    if text not in ("0", "1"):
        raise argparse.ArgumentTypeError(f"{text!r} is neither 1 nor 0")
    return text == "1"


def positive(text: str) -> int:
    """An integer of at least 1."""
    return _integer(text, 1)


def non_negative(text: str) -> int:
    """An integer of at least 0."""
    return _integer(text, 0)


def _integer(text: str, least: int) -> int:
    try:
        value = int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number") from None
    if value < least:
        raise argparse.ArgumentTypeError(f"{text} is below {least}")
    return value


def add_precision(group: argparse._ArgumentGroup) -> None:
    """The option of commands that run a finished CNN."""
    group.add_argument(
        "--precision",
        choices=("auto", "fp32", "bf16", "fp16", "int8"),
        default="auto",
        help="of the CNN; int8: CPUs only, twice as fast as bf16; auto: int8 for the bundled CNN, fp32 for imported "
        "models, else bf16 where the hardware has it",
    )


def run(command: str, body: Callable[[], int | None]) -> int:
    """Run a command's body: log to stderr, one line and exit code 1 for bad input, 130 when interrupted."""
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr, force=True)
    try:
        code = body() or 0
        sys.stdout.flush()
        return code
    except BrokenPipeError:
        # `caption-eval … | head` has seen enough. (SIGPIPE's default would be shorter, but it would also end a
        # command whose worker process or server hangs up.) What is still buffered must not fail at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except InputError as error:
        print(f"{command}: error: {error}", file=sys.stderr)
        return 1
    except RuntimeError as error:
        if type(error).__name__ != "OutOfMemoryError":  # torch's; importing it here would slow down --help
            raise
        reason = str(error).partition(". ")[0]
        remedy = "close what else uses it, take another GPU with --gpuid, or the CPU with --gpuid -1"
        print(f"{command}: error: {InputError(reason, remedy=remedy)}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"{command}: interrupted", file=sys.stderr)
        return 130
