"""Fuzzing of the option lines of every command: values from the parsers' own tables, and what is none.

    PYTHONPATH=. python tests/fuzz_options.py --lines 20000 --seed 1

A line is parsed, or refused with exit code 2 and one line on stderr; a parsed number is in its range.
"""

import argparse
import contextlib
import importlib
import io
import random
from collections import Counter

from captioner.cli.options import Range, flag

COMMANDS = ("prepro", "train_options", "eval", "convert", "score", "sweep", "video", "serve", "download", "completion")
ODD = (
    *("", "-", "--", "-1", "0", "1", "nan", "inf", "-inf", "1e999", "1e-300", str(2**63), str(2**64), "1" * 5000),
    *(
        "0x10",
        "1_0",
        "\u0663",
        "\ud800",
        "\udcff",
        "a\nb",
        "\x1b[31m",
        "\0",
        "true",
        "None",
        "%s",
        "{}",
        "=",
        "=1",
        "@x",
    ),
    *("--beam_size=3", "-h ", "photos", "./a b", "..", "/dev/null", "*", "~", "'", '"', "$(x)", "é", "照片", " 5 "),
)


def value_for(action: argparse.Action, rng: random.Random) -> str:
    """A value of an option: mostly one it takes, from its own table; else a border, or nonsense."""
    if rng.random() < 0.4:
        return rng.choice(ODD)
    if action.choices:
        return str(rng.choice(list(action.choices)))
    if action.type is flag:
        return rng.choice("01")
    if isinstance(action.type, Range):
        borders = [action.type.least, action.type.most, action.type.above, action.type.below, *action.type.besides]
        number = rng.choice(borders)
        if number in (float("inf"), float("-inf")) or rng.random() < 0.5:
            number = rng.choice((rng.randrange(-3, 20), rng.random(), number))
        return str(int(number) if action.type.kind is int and abs(number) < 1e18 and rng.random() < 0.8 else number)
    return rng.choice(ODD)


def line_for(parser: argparse.ArgumentParser, rng: random.Random) -> list[str]:
    """An option line of up to eight options, some misspelt, bare or doubled."""
    actions = [action for action in parser._actions if action.dest not in ("help", "version")]
    line: list[str] = []
    for action in actions:
        if action.required and rng.random() < 0.9:
            line += [*action.option_strings[:1], str(rng.choice(list(action.choices or ["1"])))]
    for action in rng.choices(actions, k=rng.randrange(9)):
        name = rng.choice(action.option_strings) if action.option_strings else ""
        if name and rng.random() < 0.5:
            name = rng.choice((name[1:], name.replace("_", "-"), name + "=" + value_for(action, rng), name[:-1]))
        line += [name] if name else []
        line += [value_for(action, rng) for _ in range(rng.choice((1, 1, 1, 1, 0, 2)))]
    return line


def check_line(name: str, parser: argparse.ArgumentParser, line: list[str]) -> str:
    """Parse a line; says what came of it.

    Raises:
        AssertionError: it ended in another way than it should.
    """
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            parsed = parser.parse_args(line)
        except SystemExit as stopped:
            told = err.getvalue()
            assert stopped.code == 2, (name, line, stopped.code)
            assert told.count("\n") == 1 and told.startswith(f"{parser.prog}: error: "), (name, line, told)
            assert told.isprintable() or told[:-1].isprintable(), (name, line, told)
            return "refused"
    for action in parser._actions:
        value = getattr(parsed, action.dest, None)
        if isinstance(action.type, Range) and isinstance(value, int | float):
            assert value in action.type, (name, line, action.dest, value)
    return "parsed"


def run(lines: int, seed: int) -> dict[str, Counter]:
    """Parse so many lines of all commands; counts of what came of them, by command."""
    rng = random.Random(seed)
    parsers = {name: importlib.import_module(f"captioner.cli.{name}").build_parser() for name in COMMANDS}
    counts = {name: Counter[str]() for name in COMMANDS}
    for number in range(lines):
        name = COMMANDS[number % len(COMMANDS)]
        counts[name][check_line(name, parsers[name], line_for(parsers[name], rng))] += 1
    return counts


if __name__ == "__main__":
    options = argparse.ArgumentParser()
    options.add_argument("--lines", type=int, default=20_000)
    options.add_argument("--seed", type=int, default=1)
    chosen = options.parse_args()
    for command, count in run(chosen.lines, chosen.seed).items():
        told = f"{count.total():,} lines, {count['parsed']:,} parsed, {count['refused']:,} refused"
        print(f"caption-{command.removesuffix('_options')}: {told}")
