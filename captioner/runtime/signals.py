"""What the first and the second SIGINT or SIGTERM do to a command that has something to save."""

import logging
import os
import signal
from types import FrameType
from typing import Any, TypeVar

log = logging.getLogger(__name__)

Stop = TypeVar("Stop", bound="_StopSignals")


class _StopSignals:
    """Takes both signals while it is entered. `signal` is 0 until one comes, afterwards the first one's number."""

    def __init__(self) -> None:
        self.signal = 0
        self._previous: dict[int, Any] = {}

    def __enter__(self: Stop) -> Stop:
        for number in (signal.SIGINT, signal.SIGTERM):
            self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _handle(self, number: int, _: FrameType | None) -> None:
        raise NotImplementedError


class StopRequest(_StopSignals):
    """Turns the first signal into a polite request; the second one ends the process at once."""

    def _handle(self, number: int, _: FrameType | None) -> None:
        if self.signal:
            os._exit(128 + number)
        self.signal = number
        log.info("stopping after this iteration; once more stops at once, without saving")


class Stopped(Exception):
    """A StopRequest was heeded in the midst of work that goes on when the command is repeated.

    Attributes:
        signal: its number.
    """

    def __init__(self, signal: int) -> None:
        super().__init__(f"stopped by signal {signal}")
        self.signal = signal


class Interruption(_StopSignals):
    """Makes the first signal a KeyboardInterrupt; ignores more, since saving takes time."""

    def _handle(self, number: int, _: FrameType | None) -> None:
        if not self.signal:
            self.signal = number
            raise KeyboardInterrupt
