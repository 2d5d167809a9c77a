"""The one exception that means: the user's file or option is at fault."""

import re

# Control characters, line and paragraph separators, marks that turn the direction of text, and half characters.
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
_LONGEST = 4000  # characters of a line: paths may have as many


class InputError(Exception):
    """A file or option given by the user cannot be used.

    The commands print it as one line on stderr and exit with 1; every other exception is a defect
    of ours and keeps its traceback.

    Args:
        problem: what is wrong and where, naming the file, entry or option and the offending value.
        expected: what would have been right, if that is not obvious from the problem.
        remedy: what the user can do now.
    """

    def __init__(self, problem: str, *, expected: str = "", remedy: str = "") -> None:
        self.problem = problem
        self.expected = expected
        self.remedy = remedy
        parts = [problem]
        if expected:
            parts.append(f"expected {expected}")
        if remedy:
            parts.append(remedy)
        # One line, whatever a foreign message brought along.
        super().__init__(printable(shortened(" ".join("; ".join(parts).split()))))

    def __reduce__(self) -> tuple[object, ...]:
        # Worker processes send their errors home; the keyword arguments must survive the journey.
        return _rebuild, (self.problem, self.expected, self.remedy)


def _rebuild(problem: str, expected: str, remedy: str) -> InputError:
    return InputError(problem, expected=expected, remedy=remedy)


def shortened(text: str) -> str:
    """Text of a line for people: the middle of what fills a screen, as of a value of megabytes, is left out."""
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST // 2]} [..] {text[-_LONGEST // 2 :]}"


def printable(text: str, keep: str = "") -> str:
    """Text whose control characters are escaped: a file's name must not move a terminal's cursor or forge lines.

    Args:
        keep: control characters that stay.
    """
    return _CONTROL.sub(lambda found: found[0] if found[0] in keep else _escaped(found[0]), text)


def _escaped(character: str) -> str:
    return character.encode("unicode_escape").decode("ascii")
