"""caption-serve: captions over HTTP, with a page to upload pictures."""

import argparse
import contextlib
import dataclasses
import logging
import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from captioner.cli.options import Parser, Range, add_precision, gpu_number, images_at_once, run, workers
from captioner.cli.search_options import add_search_options, search_keywords
from captioner.errors import InputError
from captioner.runtime.files import read_small

if TYPE_CHECKING:
    import numpy as np

    from captioner.inference.model import Model
    from captioner.service.requests import Options

log = logging.getLogger(__name__)

TOKEN_VARIABLE = "CAPTION_SERVE_TOKEN"
seconds = Range(int, 1, 3600)
LOOPBACK = ("127.0.0.1", "::1", "localhost")


def build_parser() -> Parser:
    """The command's options."""
    p = Parser(prog="caption-serve", description="Answer pictures with captions over HTTP. Nothing is kept on disk.")
    p.add_argument(
        "--model", nargs="+", default=[], help="checkpoints; several are averaged (default: the bundled one)"
    )
    net = p.add_argument_group("network")
    net.add_argument("--host", default="127.0.0.1", help="address to listen on; 0.0.0.0 is all of this machine's")
    net.add_argument("--port", type=Range(int, 0, 65535), default=8000, help="0 takes any free one")
    net.add_argument(
        "--token_file", default="", help=f"file with the bearer token clients need (or environment {TOKEN_VARIABLE})"
    )
    net.add_argument("--workers", type=workers, default=1, help="always 1: one process shares its model in batches")
    limits = p.add_argument_group("limits")
    limits.add_argument("--max_mb", type=Range(int, 1, 2**10), default=20, help="MiB of a request's body")
    limits.add_argument("--max_megapixels", type=Range(int, 1, 178), default=50, help="millions of pixels of a picture")
    limits.add_argument("--max_pictures", type=Range(int, 1, 10_000), default=16, help="pictures of a request")
    limits.add_argument("--max_queue", type=Range(int, 1, 10**6), default=64, help="pictures of all clients at a time")
    limits.add_argument(
        "--queue_seconds", type=seconds, default=20, help="a picture that would wait for longer is sent away (429)"
    )
    limits.add_argument("--max_clients", type=Range(int, 1, 10**6), default=256, help="open connections")
    limits.add_argument("--receive_seconds", type=seconds, default=20, help="for a request's body to arrive")
    limits.add_argument("--answer_seconds", type=seconds, default=30, help="from then to the answer")
    add_search_options(p, sampling=False)
    machine = p.add_argument_group("machine")
    machine.add_argument("--batch_size", type=images_at_once, default=8, help="pictures captioned at once")
    machine.add_argument(
        "--max_wait", type=Range(int, 0, 10_000), default=10, help="milliseconds to wait for a fuller batch"
    )
    machine.add_argument("--num_workers", type=Range(int, 1, 1024), default=2, help="processes that decode pictures")
    machine.add_argument("--gpuid", type=gpu_number, default=0, help="GPU to use; -1 is the CPU")
    add_precision(machine)
    return p


def main(argv: Sequence[str] | None = None) -> int:
    opt = build_parser().parse_args(argv)
    return run("caption-serve", lambda: serve_captions(opt))


def serve_captions(opt: argparse.Namespace) -> None:
    """Load the model, listen, and answer until told to stop."""
    if opt.workers != 1:
        raise InputError(
            f"--workers {opt.workers}: a service is one process, which shares its model in batches",
            remedy="raise --batch_size instead, or start one caption-serve per GPU on its own port behind a proxy",
        )
    token = read_token(opt.token_file)
    try:
        from captioner.service.app import Service
        from captioner.service.server import listen, serve
    except ModuleNotFoundError as error:
        if str(error.name).partition(".")[0] == "captioner":
            raise
        raise InputError(f"the package {error.name} is missing", remedy='pip install "captioner[serve]"') from error
    from captioner.service.decoding import Decoders
    from captioner.service.limits import Limits

    limits = Limits(
        body_bytes=opt.max_mb * 2**20,
        pixels=opt.max_megapixels * 1_000_000,
        pictures=opt.max_pictures,
        queue=max(opt.max_queue, opt.max_pictures),
        queue_seconds=opt.queue_seconds,
        connections=opt.max_clients,
        receive_seconds=opt.receive_seconds,
        answer_seconds=opt.answer_seconds,
        batch_size=opt.batch_size,
        batch_seconds=opt.max_wait / 1000,
    )
    limits = dataclasses.replace(limits, buffered_bytes=max(limits.buffered_bytes, 2 * limits.body_bytes))
    with contextlib.closing(listen(opt.host, opt.port)) as listener:
        captioner = load(opt)
        with contextlib.closing(Decoders(opt.num_workers, limits.pixels, image_mode=captioner.image_mode)) as decoders:
            address = f"http://{f'[{opt.host}]' if ':' in opt.host else opt.host}:{listener.getsockname()[1]}/"
            if opt.host not in LOOPBACK and not token:
                log.warning("everyone who reaches %s may use it: consider --token_file", address)
            service = Service(captioner, decoders, limits, token)
            serve(service.app(), listener, limits, lambda: print(f"listening on {address}", flush=True))
    log.info("stopped")


def read_token(token_file: str) -> str:
    """The bearer token, from a file or the environment, where other users of the machine do not see it; "" for none.

    Raises:
        InputError: the file cannot be read, or holds no token.
    """
    if not token_file:
        return os.environ.get(TOKEN_VARIABLE, "").strip()
    try:
        token = read_small(token_file).decode("ascii").strip()
    except (OSError, UnicodeError) as error:
        raise InputError(f"{token_file}: the token cannot be read ({error})") from error
    if not token or len(token.split()) != 1:
        raise InputError(f"{token_file}: holds no token", expected="one line without blanks")
    return token


class Captioner:
    """A model as the service wants it (see `captioner.service.app.Captioner`).

    Args:
        search: how captions are searched where a request says nothing else.

    Raises:
        InputError: the model cannot search in this way.
    """

    def __init__(self, model: "Model", search: Mapping[str, Any]) -> None:
        self._model, self._search = model, search
        self.image_mode = model.image_mode
        model.search_options(**search)

    def check(self, options: "Options") -> None:
        self._model.search_options(**options.over(self._search))

    def caption(self, pictures: "Sequence[np.ndarray]", options: "Options") -> list[dict[str, Any]]:
        from captioner.output.rows import caption_row

        captions = self._model.caption(
            list(pictures),
            explain=options.explain,
            batch_size=len(pictures),
            num_workers=0,
            **options.over(self._search),
        )
        rows = map(caption_row, captions)
        return [{key: value for key, value in row.items() if key not in ("image_id", "file_name")} for row in rows]


def load(opt: argparse.Namespace) -> Captioner:
    """The model, ready for requests."""
    from captioner.inference.model import load_model
    from captioner.runtime.device import choose_device
    from captioner.runtime.memory import keep_freed_memory

    keep_freed_memory()
    return Captioner(load_model(opt.model or None, choose_device(opt.gpuid), opt.precision), search_keywords(opt))


if __name__ == "__main__":
    raise SystemExit(main())
