"""HTTP requests → pictures and search options, within the limits and in memory only."""

import re
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass

import anyio
from starlette.datastructures import QueryParams, UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import Request

from captioner.service.limits import ByteBudget, Limits, Refusal

LONGEST_NAME = 200  # characters of a file name that come back in the answer

# Name of each query parameter: its default, least and greatest value.
PARAMETERS = {"beam_size": (2, 1, 10), "n_best": (1, 1, 10), "explain": (0, 0, 1)}

_DIGITS = re.compile(r"[0-9]{1,6}")


@dataclass(frozen=True)
class Options:
    """What a request asks for; pictures with equal options share a batch."""

    beam_size: int
    n_best: int
    explain: int


@dataclass(frozen=True)
class Upload:
    """A picture as it came: the client's own name for it ("" if it has none), and its bytes."""

    name: str
    data: bytes


def parse_options(query: QueryParams) -> Options:
    """Read the query's parameters.

    Raises:
        Refusal: one is unknown, occurs twice, or is no number within its range.
    """
    unknown = sorted(set(query) - PARAMETERS.keys())
    if unknown:
        raise Refusal(400, f"unknown query parameter {unknown[0][:50]!r}; there are {', '.join(PARAMETERS)}")
    values = {}
    for name, (default, least, greatest) in PARAMETERS.items():
        given = query.getlist(name) or [str(default)]
        if len(given) > 1 or not _DIGITS.fullmatch(given[0]) or not least <= int(given[0]) <= greatest:
            raise Refusal(400, f"{name} must be one whole number from {least} to {greatest}")
        values[name] = int(given[0])
    values["beam_size"] = max(values["beam_size"], values["n_best"])
    return Options(**values)


class Body:
    """The body of one request: read once, at most so many bytes, counted against what all may hold.

    Use as a context manager: at its end the bytes no longer count.
    """

    def __init__(self, request: Request, limits: Limits, budget: ByteBudget) -> None:
        self._request, self._limits, self._budget = request, limits, budget
        self._held = 0
        self.finished = False

    def __enter__(self) -> "Body":
        return self

    def __exit__(self, *_: object) -> None:
        self._budget.give_back(self._held)

    async def read(self) -> bytes:
        """All of it.

        Raises:
            Refusal: too large, too slow, or no memory left.
            starlette.requests.ClientDisconnect: the client hung up.
        """
        too_large = Refusal(413, f"the body is too large; {self._limits.body_bytes:,} bytes at most")
        announced = self._request.headers.get("content-length", "")
        if announced.isascii() and announced.isdecimal() and int(announced[:20]) > self._limits.body_bytes:
            raise too_large
        data = bytearray()
        try:
            with anyio.fail_after(self._limits.receive_seconds):
                async for chunk in self._request.stream():
                    if len(data) + len(chunk) > self._limits.body_bytes:
                        raise too_large
                    self._budget.take(len(chunk))
                    self._held += len(chunk)
                    data += chunk
        except TimeoutError:
            raise Refusal(408, f"the body did not arrive within {self._limits.receive_seconds:.0f} s") from None
        self.finished = True
        return bytes(data)

    async def drain(self, seconds: float) -> None:
        """Let the client finish sending, so that it sees the answer instead of a broken connection."""
        if self.finished or self._request.headers.get("expect"):  # who asks first is not sending yet
            return
        with anyio.move_on_after(seconds):
            while (await self._request.receive()).get("more_body", False):
                pass
            self.finished = True


async def uploads_of(headers: Mapping[str, str], body: bytes, limits: Limits) -> list[Upload]:
    """The pictures of a request: its whole body, or the files of a form.

    Raises:
        Refusal: no picture, too many, a broken form or a media type that cannot be a picture.
    """
    media_type = headers.get("content-type", "").partition(";")[0].strip().lower()
    if media_type == "multipart/form-data":
        uploads = await _files_of_form(headers, body, limits)
    elif media_type in ("", "application/octet-stream") or media_type.startswith("image/"):
        uploads = [Upload("", body)] if body else []
    else:
        raise Refusal(415, "send a picture as the body (image/*), or pictures as files of multipart/form-data")
    if not uploads:
        raise Refusal(400, "the request holds no picture")
    return uploads


async def _files_of_form(headers: Mapping[str, str], body: bytes, limits: Limits) -> list[Upload]:
    async def stream() -> AsyncIterator[bytes]:
        yield body
        yield b""

    parser = MultiPartParser(headers, stream(), max_files=limits.pictures, max_fields=0)  # type: ignore[arg-type]
    parser.spool_max_size = len(body) + 1  # in memory: larger files than this would go to disk
    try:
        form = await parser.parse()
    except MultiPartException as error:
        raise Refusal(400, f"not a form of files: {error.message}") from error
    except (ValueError, KeyError, LookupError, UnicodeError) as error:
        raise Refusal(400, "not a form of files") from error
    uploads = []
    for _, part in form.multi_items():
        assert isinstance(part, UploadFile)  # max_fields is 0
        uploads.append(Upload(_plain_name(part.filename or ""), part.file.read()))
    return uploads


def _plain_name(name: str) -> str:
    """The client's name for a file without folders and without what a terminal or a page could take amiss."""
    last = re.split(r"[/\\]", name)[-1]
    return "".join(character for character in last if character.isprintable())[:LONGEST_NAME]
