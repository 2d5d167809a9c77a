"""The service on a socket: from start to the last answer after SIGTERM."""

import logging
import signal
import socket
from collections.abc import Callable

import uvicorn
from starlette.applications import Starlette

from captioner.errors import InputError
from captioner.service.connections import protocol_with
from captioner.service.limits import Limits

log = logging.getLogger(__name__)


def listen(host: str, port: int) -> socket.socket:
    """A listening socket; port 0 takes any free one.

    Raises:
        InputError: the address cannot be had.
    """
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        return socket.create_server((host, port), family=family, backlog=2048)
    except (OSError, OverflowError, ValueError, TypeError) as error:  # the last two: no name of a host
        reason = getattr(error, "strerror", None) or error
        raise InputError(
            f"cannot listen on {host} port {port} ({reason})", remedy="choose others with --host and --port"
        ) from error


def serve(app: Starlette, listener: socket.socket, limits: Limits, ready: Callable[[], None]) -> None:
    """Answer requests until SIGTERM (returns) or SIGINT (KeyboardInterrupt); what is running is finished first."""
    # Remarks on each malformed request would let strangers fill the log.
    for name in ("uvicorn", "python_multipart", "multipart"):
        logging.getLogger(name).setLevel(logging.ERROR)
    config = uvicorn.Config(
        app,
        http=protocol_with(limits),
        ws="none",
        lifespan="on",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        timeout_keep_alive=5,
        timeout_graceful_shutdown=round(limits.receive_seconds + limits.answer_seconds) + 1,
    )
    # Uvicorn raises the signal once more when it is done; SIGTERM's usual end would then hide that all went well.
    previous = signal.signal(signal.SIGTERM, lambda *_: None)
    try:
        ready()
        uvicorn.Server(config).run(sockets=[listener])
    finally:
        signal.signal(signal.SIGTERM, previous)
        listener.close()
