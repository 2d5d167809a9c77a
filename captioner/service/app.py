"""The service itself: addresses, who may use them, and what they answer."""

import asyncio
import contextlib
import hmac
import logging
import time
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from captioner.errors import InputError
from captioner.service import openapi
from captioner.service.decoding import Decoders
from captioner.service.gathering import Gatherer
from captioner.service.limits import ByteBudget, Limits, Refusal
from captioner.service.metrics import CONTENT_TYPE, Metrics
from captioner.service.requests import Body, Options, Upload, parse_options, uploads_of

log = logging.getLogger(__name__)

Result = dict[str, Any]

DRAIN_SECONDS = 5.0  # how long a refused client may go on sending, so that it reads the answer

_PAGE = Path(__file__).parent / "upload"
_PAGE_TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript"}
_PAGE_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src blob: data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "Cache-Control": "no-cache",
}


class Captioner(Protocol):
    """What the service asks of a model; from any thread."""

    def check(self, options: Options) -> None:
        """Make sure that there are captions with these options.

        Raises:
            InputError: there are none, or the model does not know a word.
        """

    def caption(self, pictures: Sequence[np.ndarray], options: Options) -> Sequence[Result]:
        """Pictures, uint8 RGB (256, 256, 3), with equal options → a JSON object for each."""


class Service:
    """Captions for clients.

    Args:
        captioner: the model.
        decoders: what turns bytes into such pictures.
        limits: what clients are granted.
        token: what they must send as `Authorization: Bearer ..`; "" admits everyone.
    """

    def __init__(
        self,
        captioner: Captioner,
        decoders: Decoders,
        limits: Limits,
        token: str = "",
    ) -> None:
        self.limits, self._decoders, self._token = limits, decoders, token.encode()
        self.metrics = Metrics()
        self._captioner = captioner
        self._budget = ByteBudget(limits.buffered_bytes)
        self._document = openapi.document(limits, bool(token))
        self._gatherer: Gatherer[np.ndarray, Options, Result] | None = None

    def app(self) -> Starlette:
        """The ASGI application."""
        routes = [
            Route("/v1/captions", self._post, methods=["POST"]),
            Route("/healthz", self._health, methods=["GET"]),
            Route("/readyz", self._ready, methods=["GET"]),
            Route("/metrics", self._metrics, methods=["GET"]),
            Route("/openapi.json", self._openapi, methods=["GET"]),
            *(_page_route(path) for path in sorted(_PAGE.iterdir()) if path.suffix in _PAGE_TYPES),
        ]
        handlers: dict[Any, Any] = {HTTPException: _http_exception, Refusal: _refused, Exception: _defect}
        return Starlette(routes=routes, lifespan=self._lifespan, exception_handlers=handlers)

    @contextlib.asynccontextmanager
    async def _lifespan(self, _: Starlette) -> AsyncIterator[None]:
        async with Gatherer(self._captioner.caption, self.limits, self.metrics.observe_batch) as self._gatherer:
            self.metrics.queue.set_function(lambda: self._running.places_taken)
            self.metrics.expected.set_function(lambda: self._running.expected_seconds())
            self.metrics.buffered.set_function(lambda: self._budget.used)
            yield

    @property
    def _running(self) -> Gatherer[np.ndarray, Options, Result]:
        assert self._gatherer is not None
        return self._gatherer

    async def _post(self, request: Request) -> Response:
        started = time.monotonic()
        with Body(request, self.limits, self._budget) as body:
            try:
                response = await self._answer(request, body)
            except Refusal as refusal:
                if refusal.status != 408:
                    await body.drain(DRAIN_SECONDS)
                response = _refused(request, refusal, close=not body.finished)
            except ClientDisconnect:
                response = Response(status_code=499)  # nobody reads it; nginx counts them under this number
            except Exception:
                self.metrics.requests.labels(500).inc()
                raise
        self.metrics.requests.labels(response.status_code).inc()
        self.metrics.request_seconds.observe(time.monotonic() - started)
        return response

    async def _answer(self, request: Request, body: Body) -> Response:
        self._authorise(request)
        options = parse_options(request.query_params)
        uploads = await uploads_of(request.headers, await body.read(), self.limits)
        with self._running.places(len(uploads)):
            try:
                await asyncio.to_thread(self._captioner.check, options)
            except InputError as error:
                raise Refusal(400, str(error)) from error
            results = await self._in_time(request, self._results(uploads, options))
        if all("error" in result for result in results):
            reason = "; ".join(str(result["error"]) for result in results)
            raise Refusal(422, reason)
        return JSONResponse({"results": results})

    async def _in_time(self, request: Request, work: Any) -> list[Result]:
        """The results, unless they take too long or the client hangs up: then their pictures leave the queue.

        Raises:
            Refusal: too long.
            ClientDisconnect: it hung up.
        """
        task = asyncio.ensure_future(work)
        gone = asyncio.ensure_future(_disconnection(request))
        try:
            await asyncio.wait({task, gone}, timeout=self.limits.answer_seconds, return_when=asyncio.FIRST_COMPLETED)
            if task.done():
                return task.result()
            if gone.done():
                raise ClientDisconnect
            raise Refusal(503, "the captions were not ready in time; try again later", {"Retry-After": "10"})
        finally:
            for one in (task, gone):
                one.cancel()

    async def _results(self, uploads: Sequence[Upload], options: Options) -> list[Result]:
        return await asyncio.gather(*(self._result(upload, options) for upload in uploads))

    async def _result(self, upload: Upload, options: Options) -> Result:
        try:
            if not upload.data:
                raise InputError("is empty")
            picture = await self._decoders.decode(upload.data)
        except InputError as error:
            self.metrics.pictures.labels("refused").inc()
            return {"file_name": upload.name, "error": f"the picture cannot be used: {error}"}
        result = await self._running.submit(picture, options)
        self.metrics.pictures.labels("captioned").inc()
        return {"file_name": upload.name, **result}

    def _authorise(self, request: Request) -> None:
        if not self._token:
            return
        scheme, _, given = request.headers.get("authorization", "").partition(" ")
        # Compared in constant time: how long a wrong token takes to refuse tells nothing about the right one.
        same = hmac.compare_digest(given.strip().encode("latin-1", "replace"), self._token)
        if scheme.lower() != "bearer" or not same:
            raise Refusal(401, "a valid bearer token is needed", {"WWW-Authenticate": "Bearer"})

    async def _health(self, _: Request) -> Response:
        return JSONResponse({"status": "ok"})

    async def _ready(self, _: Request) -> Response:
        if self._running.is_full:
            return JSONResponse({"status": "busy"}, 503)
        return JSONResponse({"status": "ok"})

    async def _metrics(self, request: Request) -> Response:
        self._authorise(request)
        return Response(self.metrics.text(), headers={"Content-Type": CONTENT_TYPE})

    async def _openapi(self, _: Request) -> Response:
        return JSONResponse(self._document)


def _page_route(path: Path) -> Route:
    content = path.read_bytes()
    headers = {**_PAGE_HEADERS, "X-Content-Type-Options": "nosniff"}

    async def answer(_: Request) -> Response:
        return Response(content, media_type=_PAGE_TYPES[path.suffix], headers=headers)

    return Route("/" if path.name == "index.html" else f"/{path.name}", answer, methods=["GET"])


async def _disconnection(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _refused(_: Request, refusal: Refusal, close: bool = False) -> Response:
    headers = {**refusal.headers, "Connection": "close"} if close else refusal.headers
    return JSONResponse({"error": refusal.reason}, refusal.status, headers)


def _http_exception(_: Request, error: HTTPException) -> Response:
    return JSONResponse({"error": error.detail}, error.status_code, error.headers)


def _defect(_: Request, error: Exception) -> Response:
    # Starlette raises it once more after the answer, and uvicorn logs it with its traceback.
    return JSONResponse({"error": "internal error"}, 500)
