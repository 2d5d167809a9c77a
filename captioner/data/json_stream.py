"""Large JSON files, one value at a time: the array of a million entries is never in memory as a whole."""

import json
from collections.abc import Iterator
from typing import IO, Any

_CHUNK = 2**20


class JsonError(ValueError):
    """The text is not JSON; says at which line."""

    def __init__(self, problem: str, line: int) -> None:
        super().__init__(problem)
        self.problem = problem
        self.line = line


class JsonStream:
    """Reads values from a text stream and counts lines.

    Attributes:
        line: line (from 1) on which the last value or key began.
    """

    def __init__(self, stream: IO[str]) -> None:
        self.line = 1
        self._stream = stream
        self._buffer = ""
        self._position = 0
        self._line_at_position = 1
        self._at_end = False
        self._decoder = json.JSONDecoder()

    def peek(self) -> str:
        """The next character that is no white space ("" at the end); it stays unread."""
        while True:
            while self._position < len(self._buffer):
                character = self._buffer[self._position]
                if not character.isspace():
                    return character
                self._line_at_position += character == "\n"
                self._position += 1
            if not self._more():
                return ""

    def value(self) -> Any:
        """Read one whole value."""
        self.peek()
        self.line = self._line_at_position
        while True:
            try:
                value, end = self._decoder.raw_decode(self._buffer, self._position)
            except RecursionError:
                raise JsonError("is nested too deeply", self.line) from None
            except ValueError as error:
                # Cut off at the end of the buffer, or wrong: only the rest of the file can tell.
                if self._more():
                    continue
                position = getattr(error, "pos", self._position)
                line = self._line_at_position + self._buffer.count("\n", self._position, position)
                raise JsonError(f"is not JSON ({getattr(error, 'msg', error)})", line) from None
            if end < len(self._buffer) or not self._more():  # a number may go on in the next chunk
                self._line_at_position += self._buffer.count("\n", self._position, end)
                self._position = end
                return value

    def elements(self) -> Iterator[Any]:
        """Read an array, one element after the other."""
        self._expect("[")
        if self._accept("]"):
            return
        while True:
            yield self.value()
            if self._accept("]"):
                return
            self._expect(",")

    def members(self) -> Iterator[str]:
        """Read an object, key after key; the caller reads each value before asking for the next key."""
        self._expect("{")
        if self._accept("}"):
            return
        while True:
            key = self.value()
            if not isinstance(key, str):
                raise JsonError("has a key that is no string", self.line)
            self._expect(":")
            yield key
            if self._accept("}"):
                return
            self._expect(",")

    def end(self) -> None:
        """Make sure that nothing follows."""
        if self.peek():
            raise JsonError(f"goes on with {self.peek()!r} after its end", self._line_at_position)

    def skip(self) -> None:
        """Pass over one value; a large array or object is not kept."""
        character = self.peek()
        if character == "[":
            for _ in self.elements():
                pass
        else:
            self.value()

    def _accept(self, character: str) -> bool:
        if self.peek() != character:
            return False
        self._position += 1
        return True

    def _expect(self, character: str) -> None:
        found = self.peek()
        if found != character:
            what = repr(found) if found else "the end of the file"
            raise JsonError(f"is not JSON (expected {character!r}, found {what})", self._line_at_position)
        self._position += 1

    def _more(self) -> bool:
        """Append the next chunk; as much again as is waiting, so that a huge value is not decoded too often."""
        if self._at_end:
            return False
        rest = self._buffer[self._position :]
        chunk = self._stream.read(max(_CHUNK, len(rest)))
        self._at_end = not chunk
        self._buffer = rest + chunk
        self._position = 0
        return bool(chunk)
