"""HTTP requests → pictures and what is asked of their captions, within the limits and in memory only."""

import re
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from typing import Any

import anyio
from starlette.datastructures import QueryParams, UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import Request

from captioner.inference.wording import banned_of, requirements_of
from captioner.service.limits import ByteBudget, Limits, Refusal

LONGEST_NAME = 200  # characters of a file name that come back in the answer

# The query parameters: numbers with their least and greatest values, and texts. A search takes longer with every beam
# and with every word that has to be said, and everybody waits for it.
NUMBERS = {"beam_size": (1, 10), "n_best": (1, 10), "max_words": (1, 100), "explain": (0, 1)}
TEXTS = ("require", "ban", "caption_prefix")
LONGEST_TEXT = 100  # characters
MOST_REQUIRED = 4  # words or phrases

_DIGITS = re.compile(r"[0-9]{1,6}")


@dataclass(frozen=True)
class Options:
    """What a request asks for; pictures with equal options share a batch.

    What is None or empty is as the service was started. `ban` comes on top of what the service never says.
    """

    beam_size: int | None = None
    n_best: int | None = None
    max_words: int | None = None
    explain: bool = False
    require: tuple[tuple[str, ...], ...] = ()
    ban: tuple[str, ...] = ()
    caption_prefix: str = ""

    def over(self, service: Mapping[str, Any]) -> dict[str, Any]:
        """How to search (see `SearchKeywords`): as the service was started, but for what is asked for here."""
        asked = {
            name: getattr(self, name) for name in ("beam_size", "n_best", "max_words", "require", "caption_prefix")
        }
        given = {name: value for name, value in asked.items() if value not in (None, (), "")}
        return {**service, **given, "ban": [*service.get("ban", ()), *self.ban]}


@dataclass(frozen=True)
class Upload:
    """A picture as it came: the client's own name for it ("" if it has none), and its bytes."""

    name: str
    data: bytes


def parse_options(query: QueryParams) -> Options:
    """Read the query's parameters.

    Raises:
        Refusal: one is unknown, occurs twice, is no number within its range, or too long a text.
    """
    unknown = sorted(set(query) - {*NUMBERS, *TEXTS})
    if unknown:
        raise Refusal(400, f"unknown query parameter {unknown[0][:50]!r}; there are {', '.join([*NUMBERS, *TEXTS])}")
    twice = next((name for name in query if len(query.getlist(name)) > 1), None)
    if twice:
        raise Refusal(400, f"{twice} occurs twice")
    numbers = {name: _number(name, query[name]) for name in NUMBERS if name in query}
    texts = {name: query.get(name, "") for name in TEXTS}
    too_long = next((name for name in TEXTS if len(texts[name]) > LONGEST_TEXT), None)
    if too_long:
        raise Refusal(400, f"{too_long} has more than {LONGEST_TEXT} characters")
    require = requirements_of(texts["require"])
    if len(require) > MOST_REQUIRED:
        raise Refusal(400, f"require has more than {MOST_REQUIRED} words or phrases")
    return Options(
        beam_size=numbers.get("beam_size"),
        n_best=numbers.get("n_best"),
        max_words=numbers.get("max_words"),
        explain=bool(numbers.get("explain")),
        require=tuple(map(tuple, require)),
        ban=tuple(banned_of(texts["ban"])),
        caption_prefix=texts["caption_prefix"].strip(),
    )


def _number(name: str, text: str) -> int:
    least, greatest = NUMBERS[name]
    if not _DIGITS.fullmatch(text) or not least <= int(text) <= greatest:
        raise Refusal(400, f"{name} must be one whole number from {least} to {greatest}")
    return int(text)


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
