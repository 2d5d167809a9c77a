"""What all commands share: option spelling, logging, and how a run ends."""

import argparse
import contextlib
import difflib
import logging
import math
import os
import re
import signal
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import FrameType
from typing import Any, NoReturn

from captioner import __version__
from captioner.errors import InputError, printable
from captioner.runtime import outputs
from captioner.runtime.memory import is_out_of_memory
from captioner.runtime.streams import LogFormatter, guarded_streams

_log_level = logging.INFO  # of the command in this process: what --quiet and --verbose say
_OPTION = re.compile(r"^--?([A-Za-z][\w-]*)(=.*)?$", re.DOTALL)
# What follows a switch and can only be meant as its value.
_SWITCH_WORDS = ("0", "1", "true", "false", "yes", "no", "on", "off")


@dataclass(frozen=True)
class Range:
    """The numbers an option takes, as argparse's `type`. Never infinite ones or NaN.

    Args:
        kind: int or float.
        least, most: the smallest and the largest number.
        above: instead of `least`: numbers must be larger than this.
        below: instead of `most`: numbers must be smaller than this.
        besides: numbers out of the range that have a meaning of their own, as -1 for "all".
    """

    kind: type[int] | type[float]
    least: float = -math.inf
    most: float = math.inf
    above: float = -math.inf
    below: float = math.inf
    besides: tuple[int, ...] = ()

    def __call__(self, text: str) -> int | float:
        try:
            value = self.kind(text)
        except ValueError:
            kind = "whole number" if self.kind is int else "number"
            raise argparse.ArgumentTypeError(f"{_short(text)} is not a {kind}") from None
        if value not in self:
            raise argparse.ArgumentTypeError(f"{_short(text)} is out of range: expected {self}")
        return value

    def __contains__(self, value: float) -> bool:
        inside = self.least <= value <= self.most and self.above < value < self.below
        return value in self.besides or (inside and (self.kind is int or math.isfinite(value)))

    def __str__(self) -> str:
        limits = []
        if math.isfinite(self.least):
            limits.append(f"at least {self.least:.15g}")
        if math.isfinite(self.above):
            limits.append(f"above {self.above:.15g}")
        if math.isfinite(self.most):
            limits.append(f"at most {self.most:.15g}")
        if math.isfinite(self.below):
            limits.append(f"below {self.below:.15g}")
        told = " and ".join(limits) or "a finite number"
        return told + "".join(f", or {number}" for number in self.besides)


# The kinds of numbers, for all commands. Upper limits are far beyond use; they turn a slip of the pen into a line
# instead of a machine without memory.
positive = Range(int, 1, 10**12)
non_negative = Range(int, 0, 10**12)
all_or_some = Range(int, 1, 10**12, besides=(-1,))
never_or_from = Range(int, 0, 10**12, besides=(-1,))
small_size = Range(int, 1, 10_000)  # of beams, groups, captions of one image
width = Range(int, 1, 2**16)  # of a layer
layers = Range(int, 1, 64)
words = Range(int, 1, 1000)  # of a caption
images_at_once = Range(int, 1, 2**16)
workers = Range(int, 0, 1024)
seed_number = Range(int, 0, 2**32 - 1)  # what all generators of random numbers take
gpu_number = Range(int, -1, 1023)
share = Range(float, 0, 1)
positive_share = Range(float, above=0, most=1)
proper_share = Range(float, 0, below=1)
factor = Range(float, 0, 1e38)  # what float32 holds
positive_factor = Range(float, above=0, most=1e38)
temperature = Range(float, 1e-4, 1e4)
exponent = Range(float, 0, 100)
LONGEST_ID = 100  # bytes


def part_of_a_name(text: str) -> str:
    """An option's value that becomes part of a file's name: --id a/b would fail after hours of work."""
    if len(os.fsencode(text)) > LONGEST_ID or not text.isprintable() or {"/", "\\"} & set(text):
        raise argparse.ArgumentTypeError(
            f"{_short(text)} cannot be part of a file's name: at most {LONGEST_ID} bytes, without / or \\"
        )
    return text


# Options that name one file to write, with what they may replace (for --output by command; "nothing": empty files, for
# subtitles and videos cannot be told from those of others). Files that any other options name are inputs, which no
# output replaces (runtime/outputs.py).
FILES_TO_WRITE: dict[str, tuple[str, ...]] = {
    "output": (),
    "output_json": ("dataset",),
    "output_h5": ("dataset",),
    "mean_image": ("mean image",),
    "share": ("page",),
    "srt": ("nothing",),
    "vtt": ("nothing",),
    "jsonl": ("nothing",),
    "urls": ("nothing",),
}
OUTPUTS_OF = {
    "caption-prepro": ("check",),
    "caption-eval": ("captions",),
    "caption-score": ("scores", "captions"),
    "caption-convert": ("model", "arrays"),
    "caption-video": ("nothing",),
    "coco/prepare.py": ("nothing",),
}
TO_STDOUT = ("caption-eval --output",)  # where - is no file
NO_INPUTS = ("resume", "start_from", "id", "query")  # a training keeps the model that it starts from under another name
ONLY_LOOKED_AT = {"check": ("output_json", "output_h5")}  # a switch, and what is not written with it


class Parser(argparse.ArgumentParser):
    """argparse with one spelling of options: `--a_b`, `--a-b` and `-a_b` mean the same; no abbreviations.

    Switches (`type=flag`) work bare, too. Numbers are finite and in range. A mistake is one line.
    """

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(allow_abbrev=False, formatter_class=_HelpFormatter, **kwargs)
        # Options that name no Range take any finite number.
        self.register("type", int, Range(int, -(10**12), 10**12))
        self.register("type", float, Range(float))
        self.add_argument("--version", action="version", version=f"%(prog)s {__version__}", help="say it and stop")
        self.add_argument("--quiet", type=flag, default="0", help="say only what went wrong; no progress bar")
        self.add_argument("--verbose", type=flag, default="0", help="say more")

    def parse_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> Any:  # type: ignore[override]
        parsed, unknown = self.parse_known_args(self.normalise(sys.argv[1:] if args is None else args), namespace)
        loose = next((action.dest for action in self._get_positional_actions() if action.nargs == "*"), None)
        if loose and not any(_OPTION.match(argument) for argument in unknown):
            getattr(parsed, loose).extend(unknown)  # argparse takes those before the first option only
            unknown = []
        if unknown:
            self.error(self._about_unknown(unknown[0]))
        global _log_level
        _log_level = logging.WARNING if parsed.quiet else logging.DEBUG if parsed.verbose else logging.INFO
        del parsed.quiet, parsed.verbose  # they are no options of what the command does
        self._take_note_of_files(vars(parsed))
        return parsed

    def _take_note_of_files(self, options: Mapping[str, Any]) -> None:
        """Whatever an option names is an input, but for those that name outputs or folders of this program."""
        for name in FILES_TO_WRITE:
            if options.get(name) == "-" and f"{self.prog} --{name}" not in TO_STDOUT:
                self.error(f"argument --{name}: - is no file, and only {TO_STDOUT[0]} writes to stdout")
        idle = [name for switch, names in ONLY_LOOKED_AT.items() if options.get(switch) for name in names]
        written = {
            f"--{name}": outputs.Output(options[name], kinds or OUTPUTS_OF.get(self.prog, ()))
            for name, kinds in FILES_TO_WRITE.items()
            if options.get(name) not in (None, "", "-") and name not in idle
        }
        read: list[str] = []
        for name, value in options.items():
            if name not in FILES_TO_WRITE and name not in NO_INPUTS:
                read += [text for text in (value if isinstance(value, list) else [value]) if isinstance(text, str)]
        outputs.begin(read, written, bool(options.get("overwrite")))

    def error(self, message: str) -> NoReturn:
        """One line on stderr, and exit code 2."""
        line = printable(" ".join(message.split()))
        with contextlib.suppress(OSError):  # stderr is full or gone: the exit code still tells
            sys.stderr.write(f"{self.prog}: error: {line}; see {self.prog} --help\n")
        raise SystemExit(2)

    def _print_message(self, message: str, file: object = None) -> None:
        """Help and version: like results, on whatever stdout is connected to."""
        code = run(self.prog, lambda: print(message, end=""))
        if code:
            raise SystemExit(code)

    def _about_unknown(self, argument: str) -> str:
        match = _OPTION.match(argument)
        if match is None:
            return f"{_short(argument)} belongs to no option"
        name = "--" + match[1].replace("-", "_")
        known = [option for option in self._option_string_actions if option.startswith("--")]
        longer = sorted(option for option in known if option.startswith(name))
        near = longer[:1] or difflib.get_close_matches(name, known, n=1)
        return f"there is no option {_short(name)}" + (f"; {near[0]} is the nearest" if near else "")

    def normalise(self, argv: Sequence[str]) -> list[str]:
        """Bring option names to the registered spelling and give bare switches their value; values and negative
        numbers stay as they are."""
        known = self._option_string_actions
        normalised: list[str] = []
        expects_value = False
        rest = list(reversed(argv))
        while rest:
            argument = rest.pop()
            if argument == "--" and not expects_value:
                return [*normalised, argument, *reversed(rest)]
            match = _OPTION.match(argument)
            name = "--" + match[1].replace("-", "_") if match else ""
            if not expects_value and name in known:
                assert match
                if known[name].type is flag and not match[2]:
                    has_value = rest and rest[-1].lower() in _SWITCH_WORDS
                    normalised.append(f"{name}={rest.pop() if has_value else 1}")
                    continue
                normalised.append(name + (match[2] or ""))
                expects_value = known[name].nargs != 0 and not match[2]
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


class OneOrSeveral(argparse.Action):
    """One value is itself, as where an option takes no more; several are a list."""

    def __call__(self, parser: object, namespace: argparse.Namespace, values: Any, name: object = None) -> None:
        setattr(namespace, self.dest, values[0] if len(values) == 1 else values)


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=34, width=110)

    def _format_args(self, action: argparse.Action, default_metavar: str) -> str:
        return "[1|0]" if action.type is flag else super()._format_args(action, default_metavar)


def flag(text: str) -> bool:
    """The original's 1/0 options; bare they mean 1."""
    if text not in ("0", "1"):
        raise argparse.ArgumentTypeError(f"{_short(text)} is neither 1 nor 0")
    return text == "1"


def _short(text: str) -> str:
    return repr(text) if len(text) <= 60 else repr(text[:57]) + "..."


def add_overwrite(group: argparse.ArgumentParser | argparse._ArgumentGroup) -> None:
    """The option of commands that write a file of the user's choice."""
    group.add_argument(
        "--overwrite", type=flag, default="0", help="replace existing files that are not of this program"
    )


def add_precision(group: argparse._ArgumentGroup) -> None:
    """The option of commands that run a finished CNN."""
    group.add_argument(
        "--precision",
        choices=("auto", "fp32", "bf16", "fp16", "int8"),
        default="auto",
        help="of the CNN; int8: CPUs only, twice as fast as bf16; auto: int8 for the bundled CNN, fp32 for imported "
        "models, else bf16 where the hardware has it",
    )


def _require_working_directory() -> None:
    """Without one, libraries end the process in their own words, and relative names mean nothing.

    Raises:
        InputError: it has been removed.
    """
    try:
        os.getcwd()
    except FileNotFoundError:
        raise InputError("the working directory has been removed", remedy="change to one that is there") from None


def run(command: str, body: Callable[[], int | None]) -> int:
    """Run a command's body: log to stderr, one line and exit code 1 for bad input, 130 when interrupted.

    What the system refuses (a full disk, a file that vanished, too little memory) is one line, too.
    """
    interrupted = False

    def interrupt(_: int, __: FrameType | None) -> NoReturn:
        nonlocal interrupted
        interrupted = True
        raise KeyboardInterrupt

    before = signal.getsignal(signal.SIGINT)
    ours = before not in (signal.SIG_IGN, None) and threading.current_thread() is threading.main_thread()  # IGN: nohup
    if ours:
        signal.signal(signal.SIGINT, interrupt)
    with guarded_streams():
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(LogFormatter())
        logging.basicConfig(level=_log_level, handlers=[handler], force=True)
        logging.raiseExceptions = False  # a stderr that is full must not end a command
        try:
            _require_working_directory()
            outputs.check_outputs()
            try:
                code = body() or 0
            except Exception as error:
                if interrupted:  # among the imports of a module in C, which makes another exception of it
                    raise KeyboardInterrupt from error
                raise
            sys.stdout.flush()
            return code
        except KeyboardInterrupt:
            _say(f"{command}: interrupted")
            return 130
        except BrokenPipeError:
            # `caption-eval … | head` has seen enough. (SIGPIPE's default would be shorter, but it would also end a
            # command whose worker process or server hangs up.) What is still buffered must not fail at exit.
            _forget_stdout()
            return 1
        except InputError as error:
            problem = error
        except OSError as error:
            place = error.filename if isinstance(error.filename, str) else "the system"
            problem = InputError(f"{place}: {error.strerror or error}", remedy="check the disk and the file's folder")
        except (MemoryError, RuntimeError, ImportError) as error:
            if not is_out_of_memory(error):
                raise
            reason = str(error).partition(". ")[0] or "not enough memory"
            remedy = "close what else uses it, take another GPU with --gpuid, or the CPU with --gpuid -1"
            problem = InputError(
                reason, remedy=remedy if "CUDA" in reason else "close what else uses it, or ask for less"
            )
        finally:
            outputs.begin()
            if ours:
                signal.signal(signal.SIGINT, before)  # until Python has ended
        _forget_stdout()
        _say(f"{command}: error: {problem}")
        return 1


def _say(line: str) -> None:
    with contextlib.suppress(OSError):  # stderr is full or gone: the exit code still tells
        print(line, file=sys.stderr, flush=True)


def _forget_stdout() -> None:
    """What could not be written must not be tried once more when Python ends."""
    try:
        sys.stdout.flush()
    except (OSError, InputError):
        with contextlib.suppress(OSError, ValueError):  # ValueError: a test's stream has no descriptor
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
