"""What one service grants all its clients together, and the answer to those who want more."""

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Limits:
    """Bounds that keep memory and waiting times finite, whatever clients send."""

    body_bytes: int = 20 * 2**20  # of one request
    pictures: int = 16  # of one request
    pixels: int = 50_000_000  # of one picture; 150 MB as RGB while it is being decoded
    receive_seconds: float = 20.0  # from the head of a request to the end of its body
    answer_seconds: float = 30.0  # from there to the answer
    header_seconds: float = 10.0  # from the connection, or the last answer, to the end of a request's head
    queue: int = 64  # pictures of all clients that wait for their caption or get it
    queue_seconds: float = 20.0  # how long a picture may be expected to take from its arrival to its caption
    buffered_bytes: int = 256 * 2**20  # of all bodies together
    connections: int = 256  # beyond it the connection that has been idle for longest is closed
    batch_size: int = 8  # pictures captioned at once
    batch_seconds: float = 0.01  # how long a picture waits for others to share its batch


class Refusal(Exception):
    """A request that gets no captions.

    Args:
        status: HTTP status code.
        reason: for the client: what is wrong and what would be right; nothing about this machine.
        headers: further headers of the answer.
    """

    def __init__(self, status: int, reason: str, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(reason)
        self.status, self.reason, self.headers = status, reason, dict(headers or {})


def busy(reason: str, seconds: float) -> Refusal:
    """The answer where a limit of the whole service is reached, with the time after which to try again."""
    return Refusal(429, f"{reason}; try again later", {"Retry-After": str(min(60, max(1, round(seconds))))})


class ByteBudget:
    """The memory that bodies of requests may take together."""

    def __init__(self, total: int) -> None:
        self.total, self.used = total, 0

    def take(self, count: int) -> None:
        """Use `count` bytes more.

        Raises:
            Refusal: there are not that many left.
        """
        if self.used + count > self.total:
            raise busy("the service holds as many bytes of requests as it may", 5)
        self.used += count

    def give_back(self, count: int) -> None:
        self.used -= count
