"""What uvicorn leaves to a proxy in front of it: connections that never get to the end of a request's head."""

import asyncio

from uvicorn.protocols.http.h11_impl import H11Protocol

from captioner.service.limits import Limits


class BoundedProtocol(H11Protocol):
    """HTTP/1.1 that closes connections whose request's head takes too long, and idle ones where there are too many.

    Without it a thousand connections that send nothing, or a byte a minute, keep all others out.
    """

    limits = Limits()
    _head_timer: asyncio.TimerHandle | None = None
    _idle_since = 0.0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._expect_head()
        if len(self.connections) > self.limits.connections:
            idle = [one for one in self.connections if isinstance(one, BoundedProtocol) and one._is_idle()]
            min(idle, key=lambda one: one._idle_since).transport.abort()  # there is at least this one

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if not self._is_idle():
            self._stop_timer()
        elif self._head_timer is None:  # the first bytes after an answer
            self._expect_head()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_timer()
        super().connection_lost(exc)

    def on_response_complete(self) -> None:
        self._idle_since = self.loop.time()
        super().on_response_complete()

    def _is_idle(self) -> bool:
        return self.cycle is None or self.cycle.response_complete

    def _expect_head(self) -> None:
        self._idle_since = self.loop.time()
        self._head_timer = self.loop.call_later(self.limits.header_seconds, self._give_up)

    def _stop_timer(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _give_up(self) -> None:
        self._head_timer = None
        if self._is_idle():
            self.transport.abort()


def protocol_with(limits: Limits) -> type[BoundedProtocol]:
    """The class that uvicorn makes an object of for each connection."""
    return type("LimitedProtocol", (BoundedProtocol,), {"limits": limits})
