"""Bytes from strangers → pixels, in processes of their own: a decoder that crashes or hangs costs one picture."""

import asyncio
import contextlib
import multiprocessing
import os
import signal
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection

import numpy as np

from captioner.data.image_mode import ImageMode
from captioner.data.images import decode_image
from captioner.errors import InputError

SECONDS_PER_PICTURE = 10.0


class Decoders:
    """Processes that decode pictures held in memory.

    Args:
        count: how many, and so how many pictures at once.
        max_pixels: larger pictures are refused by their header.
        image_mode: what becomes of pictures that are no squares: the model's.
    """

    def __init__(
        self, count: int, max_pixels: int, seconds: float = SECONDS_PER_PICTURE, image_mode: ImageMode = "squash"
    ) -> None:
        self._max_pixels, self._seconds = max_pixels, seconds
        self._image_mode: ImageMode = image_mode
        methods = multiprocessing.get_all_start_methods()
        # A clean process to fork from: no threads and no sockets of ours.
        self._context = multiprocessing.get_context("forkserver" if "forkserver" in methods else "spawn")
        if "forkserver" in methods:
            self._context.set_forkserver_preload(["captioner.service.decoding", "simplejpeg", "torch"])
        self._threads = ThreadPoolExecutor(count, "decoders")
        self._free: asyncio.Queue[_Decoder] = asyncio.Queue()
        for _ in range(count):
            self._free.put_nowait(_Decoder(self._context, max_pixels, image_mode))

    async def decode(self, data: bytes) -> np.ndarray:
        """uint8 RGB of shape (256, 256, 3).

        Raises:
            InputError: the bytes are no picture that can be decoded, with the reason.
        """
        decoder = await self._free.get()
        work = asyncio.get_running_loop().run_in_executor(self._threads, decoder.decode, data, self._seconds)
        work.add_done_callback(lambda _: self._release(decoder))
        # Shielded: a process whose request ends early would answer the next request with this picture.
        result = await asyncio.shield(work)
        if isinstance(result, str):
            raise InputError(result)
        return result.transpose(1, 2, 0)

    def _release(self, decoder: "_Decoder") -> None:
        if not decoder.alive:
            decoder = _Decoder(self._context, self._max_pixels, self._image_mode)
        self._free.put_nowait(decoder)

    def close(self) -> None:
        """End the processes; none may be at work."""
        while not self._free.empty():
            self._free.get_nowait().stop()
        self._threads.shutdown()


class _Decoder:
    def __init__(self, context: multiprocessing.context.BaseContext, max_pixels: int, image_mode: ImageMode) -> None:
        self._connection, theirs = context.Pipe()
        arguments = (theirs, max_pixels, image_mode)
        self._process = context.Process(target=_work, args=arguments, daemon=True)  # type: ignore[attr-defined]
        self._process.start()
        theirs.close()
        self._started = False
        self.alive = True

    def decode(self, data: bytes, seconds: float) -> np.ndarray | str:
        """uint8 (3, 256, 256), or why there is none. Blocks; after a crash or too long a time `alive` is False."""
        try:
            if not self._started:
                self._connection.recv()  # its start takes seconds, for which no picture is to blame
                self._started = True
            self._connection.send_bytes(data)
            if self._connection.poll(seconds):
                return self._connection.recv()
            self.stop()
            return f"its decoder did not finish within {seconds:.0f} s"
        except (EOFError, OSError):
            self.stop()
            return "its decoder crashed, or ran out of memory"

    def stop(self) -> None:
        self.alive = False
        self._connection.close()
        self._process.kill()
        self._process.join()


def _work(connection: Connection, max_pixels: int, image_mode: ImageMode) -> None:
    """A decoder's process: bytes come in, pixels or a reason go out, until the service closes the pipe."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)  # the service ends it, after the last picture
    import torch

    torch.set_num_threads(1)  # the parallelism is between pictures
    # libjpeg writes remarks on damaged files to stderr, without saying whose they are.
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    with contextlib.suppress(EOFError, OSError):
        connection.send("started")
        while True:
            data = connection.recv_bytes()
            try:
                result: np.ndarray | str = decode_image(data, max_pixels, image_mode)
            except InputError as error:
                result = str(error)
            connection.send(result)
