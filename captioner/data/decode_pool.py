"""Many pictures through worker processes, in order; a decoder that crashes or hangs costs one picture, not the run."""

import contextlib
import itertools
import multiprocessing
import os
import shutil
import signal
import sys
import time
from collections import deque
from collections.abc import Generator, Iterator, Sequence
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from multiprocessing.shared_memory import SharedMemory
from pathlib import Path

import numpy as np

from captioner.data.crops import IMAGE_SIZE
from captioner.data.image_mode import ImageMode
from captioner.data.images import read_image
from captioner.errors import InputError

SECONDS_PER_IMAGE = 60.0  # a decoder that takes longer is hanging on purpose

# Pictures handed out ahead: enough to keep a worker busy while the others report, few enough to stay small.
_TASKS_PER_WORKER = 16
_WINDOW_PER_WORKER = 64

_IMAGE_BYTES = 3 * IMAGE_SIZE * IMAGE_SIZE


def available_cpus() -> int:
    """The CPUs this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def read_images(
    paths: Sequence[str],
    num_workers: int,
    seconds_per_image: float = SECONDS_PER_IMAGE,
    image_mode: ImageMode = "squash",
) -> Generator[np.ndarray | str, None, None]:
    """Decode pictures in parallel; for each path in turn uint8 (3, 256, 256), or the reason why there is none.

    Memory does not grow with the number of paths. `num_workers` 0 decodes in this process, where nothing can
    guard against a decoder that crashes or hangs.
    """
    if num_workers == 0 or not paths:
        for path in paths:
            yield _read_or_reason(path, image_mode)
        return
    num_workers = min(num_workers, len(paths), _workers_that_fit())
    with contextlib.closing(_Pool(paths, num_workers, seconds_per_image, image_mode)) as pool:
        yield from pool.results()


def _read_or_reason(path: str, image_mode: ImageMode) -> np.ndarray | str:
    try:
        return read_image(path, image_mode)
    except InputError as error:
        # The path stands before the reason in every message of read_image; callers name the file themselves.
        return str(error).removeprefix(" ".join(f"{path}:".split()) + " ")


def _workers_that_fit() -> int:
    """Containers often have little shared memory, and who writes more than there is, is killed."""
    folder = Path("/dev/shm")
    if not folder.is_dir():
        return sys.maxsize
    return max(1, shutil.disk_usage(folder).free // (2 * _TASKS_PER_WORKER * _IMAGE_BYTES))


class _Worker:
    def __init__(self, context: multiprocessing.context.BaseContext, image_mode: ImageMode) -> None:
        self.connection, theirs = context.Pipe()
        # One slot for each picture handed out: a pipe would copy the pixels four times.
        self.memory = SharedMemory(create=True, size=_TASKS_PER_WORKER * _IMAGE_BYTES)
        self.slots = _slots(self.memory)
        self.num_results = 0
        arguments = (theirs, self.memory.name, image_mode)
        self.process: BaseProcess = context.Process(target=_work, args=arguments, daemon=True)  # type: ignore[attr-defined]
        self.process.start()
        theirs.close()
        self.tasks: deque[int] = deque()
        self.started = False
        self.busy_since = 0.0

    def receive_start(self) -> None:
        """Take note that the process has started; a picture is not to blame for what happens before.

        Raises:
            InputError: it has ended instead.
        """
        try:
            self.connection.recv()
        except (EOFError, OSError):
            raise InputError(
                "a process to read pictures ended while it was starting", remedy="try --num_workers 0"
            ) from None
        self.started = True
        self.busy_since = time.monotonic()

    def receive(self) -> np.ndarray | str:
        """The next result; OSError or EOFError if the process is gone."""
        reason = self.connection.recv()
        slot = self.num_results % _TASKS_PER_WORKER
        self.num_results += 1
        return self.slots[slot].copy() if reason is None else reason

    def stop(self) -> None:
        self.connection.close()
        self.process.kill()
        self.process.join()
        del self.slots  # memory that is still in use cannot be closed
        self.memory.close()
        self.memory.unlink()


class _Pool:
    """Workers, each with a short queue of its own, so that it is known which picture killed which worker."""

    def __init__(self, paths: Sequence[str], num_workers: int, seconds_per_image: float, image_mode: ImageMode) -> None:
        self.paths = paths
        self.seconds_per_image = seconds_per_image
        self.image_mode: ImageMode = image_mode
        # A clean process to fork from: no threads and no open files of ours; torch is imported once.
        methods = multiprocessing.get_all_start_methods()
        self.context = multiprocessing.get_context("forkserver" if "forkserver" in methods else "spawn")
        if "forkserver" in methods:
            self.context.set_forkserver_preload(["captioner.data.decode_pool", "simplejpeg", "torch"])
        self.window = num_workers * _WINDOW_PER_WORKER
        self.waiting: deque[int] = deque()  # handed back by workers that died
        self.next_task = 0
        self.next_result = 0
        self.finished: dict[int, np.ndarray | str] = {}
        self.workers = [_Worker(self.context, image_mode) for _ in range(num_workers)]

    def results(self) -> Iterator[np.ndarray | str]:
        while self.next_result < len(self.paths):
            self._hand_out()
            if self.next_result in self.finished:
                result = self.finished.pop(self.next_result)
                self.next_result += 1
                yield result
            else:
                self._collect()

    def close(self) -> None:
        for worker in self.workers:
            worker.stop()

    def _hand_out(self) -> None:
        for worker in self.workers:
            while len(worker.tasks) < _TASKS_PER_WORKER:
                if self.waiting:
                    index = self.waiting.popleft()
                elif self.next_task < min(len(self.paths), self.next_result + self.window):
                    index = self.next_task
                    self.next_task += 1
                else:
                    return
                if not worker.tasks:
                    worker.busy_since = time.monotonic()
                worker.tasks.append(index)
                with contextlib.suppress(OSError):  # it has just died: _collect finds out
                    worker.connection.send(self.paths[index])

    def _collect(self) -> None:
        ready = wait([worker.connection for worker in self.workers if worker.tasks], timeout=1.0)
        now = time.monotonic()
        for worker in self.workers:
            if worker.connection in ready and not worker.started:
                worker.receive_start()
            elif worker.connection in ready:
                try:
                    result = worker.receive()
                except (EOFError, OSError):
                    self._bury(worker, "its decoder crashed, or ran out of memory")
                    continue
                self.finished[worker.tasks.popleft()] = result
                worker.busy_since = now
            elif worker.tasks and worker.started and now - worker.busy_since > self.seconds_per_image:
                self._bury(worker, f"its decoder did not finish within {self.seconds_per_image:.0f} s")

    def _bury(self, worker: _Worker, reason: str) -> None:
        worker.stop()
        self.finished[worker.tasks.popleft()] = reason
        self.waiting.extendleft(reversed(worker.tasks))
        self.workers[self.workers.index(worker)] = _Worker(self.context, self.image_mode)


def _slots(memory: SharedMemory) -> np.ndarray:
    shape = (_TASKS_PER_WORKER, 3, IMAGE_SIZE, IMAGE_SIZE)
    return np.ndarray(shape, np.uint8, buffer=memory.buf)


def _work(connection: Connection, memory_name: str, image_mode: ImageMode) -> None:
    """A worker process: paths come in, pixels go into the slots in turn, None or a reason goes out."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    import torch

    torch.set_num_threads(1)  # the parallelism is between pictures
    memory = SharedMemory(memory_name)
    slots = _slots(memory)
    # libjpeg writes remarks on damaged files to stderr, without saying which file.
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    with contextlib.suppress(EOFError, OSError):
        connection.send("started")
        for number in itertools.count():
            result = _read_or_reason(connection.recv(), image_mode)
            if isinstance(result, str):
                connection.send(result)
            else:
                slots[number % _TASKS_PER_WORKER] = result
                connection.send(None)
    del slots
    memory.close()
