"""Shards through a worker on a Ray cluster: read and decoded by tasks, captioned by actors, gathered by the driver.

What becomes of a machine that is lost, of a stage that is slower than the one before it, and of machines that come or
go is Ray's affair. Here stands only what a task and an actor do, and how much of a machine they take.
"""

import itertools
import logging
import os
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import numpy as np

from captioner.errors import InputError
from captioner.runtime.memory import KEEP_FREED_MEMORY
from captioner.scale.items import Item, Worker

if TYPE_CHECKING:
    import pyarrow

log = logging.getLogger(__name__)

BLOCK_BYTES = 32 * 2**20  # of Ray's blocks: 170 pictures; what a lost worker has to do again at most
CPUS_PER_ACTOR = 4  # beyond it the CNN of few pictures gains little
_SHARE_OF_DECODING = 0.5  # CPUs that a decoding task reckons with beside an actor without a GPU, which needs far more
_PICTURES_AT_ONCE = 16
_GPU_BATCHES = 4  # that a GPU's actor is given at once: all but the first are encoded beside the search of another
# Attempts at a cluster of its own: Ray gives a node's helpers 15 s and the node 30 s to come up, which nothing raises.
# On a busy machine the next attempt finds their files in memory, or the machine less busy.
STARTS = 5


def run_on_ray(
    shards: Sequence[str],
    numbers: Iterable[int],
    read: Callable[[int, str], Iterator[Item]],
    make_worker: Callable[[str, int], Worker],
    *,
    address: str | None,
    batch_size: int | None,
    actors: tuple[int, int] | None,
    gpus: bool,
) -> Iterator[Item]:
    """The pictures of the shards that are asked for, in any order; after a loss some may come twice.

    Args:
        read: gives a shard's items; called in tasks.
        make_worker: from a device's name and a number of threads; called once in each actor.
        address: of a cluster ("auto": the one of this machine); None: what RAY_ADDRESS says, else a cluster of this
            machine's CPUs and GPUs that lasts as long as this run.
        batch_size: pictures at once; None: what is fast.
        actors: least and most; None: one per GPU, or per `CPUS_PER_ACTOR` CPUs where there is no GPU.
        gpus: whether to use GPUs.

    Raises:
        InputError: Ray is not installed, the cluster cannot be reached, or a worker cannot be made.
    """

    def decode(batch: Mapping[str, np.ndarray]) -> Iterator["pyarrow.Table"]:
        for number, path in zip(batch["shard"].tolist(), batch["path"].tolist(), strict=True):
            items = read(number, path)
            while some := list(itertools.islice(items, _PICTURES_AT_ONCE)):
                yield _table(some)

    ray = _connect(address)
    try:
        ref = ray.put(make_worker)
        claim, count, device, threads = _resources(ray.nodes(), gpus, actors[1] if actors else None)
        least, most = actors or (count, count)
        log.info("ray: %d to %d actors on %s, %d CPU threads each", least, most, device, threads)
        context = ray.data.DataContext.get_current()
        context.target_max_block_size = BLOCK_BYTES
        context.enable_progress_bars = False
        left = [{"shard": number, "path": shards[number]} for number in numbers]
        pictures = ray.data.from_items(left, override_num_blocks=min(len(left), 10_000)).map_batches(
            decode, batch_size=1, batch_format="numpy", num_cpus=1 if device == "cuda" else _SHARE_OF_DECODING
        )
        batch_size = batch_size or (128 if device == "cuda" else 8)
        rows = pictures.map_batches(
            _Caption,
            fn_constructor_args=(ref, device, threads, batch_size),
            batch_size=batch_size * (_GPU_BATCHES if device == "cuda" else 1),
            batch_format="pyarrow",
            zero_copy_batch=True,
            compute=ray.data.ActorPoolStrategy(min_size=least, max_size=most),
            runtime_env={"env_vars": KEEP_FREED_MEMORY},
            **claim,
        )
        for table in rows.iter_batches(batch_size=None, batch_format="pyarrow"):
            yield from _items(table)
    except ray.exceptions.RayError as error:
        raise _input_error_in(error) or error from error
    finally:
        ray.shutdown()


def _connect(address: str | None) -> Any:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing leaves the user's machines
    try:
        import ray
        import ray.data
    except ImportError as error:
        raise InputError("--engine ray needs Ray", remedy='pip install "captioner[ray]"') from error
    address = address or os.environ.get("RAY_ADDRESS")
    quiet = {"log_to_driver": False, "logging_level": logging.ERROR}
    for name in ("ray", "ray.data"):
        logging.getLogger(name).setLevel(logging.ERROR)
    for left in reversed(range(1 if address else STARTS)):
        try:
            ray.init(address=address or "local", **quiet, **({} if address else {"include_dashboard": False}))
            break
        except Exception as error:  # Ray's own reasons come as bare Exceptions, too
            reason = f"{type(error).__name__}: {error}"
            if address:
                raise InputError(
                    f"--address {address}: no Ray cluster answers ({reason})", remedy="see ray status"
                ) from error
            _end_half_started(error)
            if not left:
                raise InputError(f"Ray does not start here ({reason})", remedy="is the machine too busy?") from error
            log.warning("Ray has not started (%s): trying again", reason)
    return ray


def _end_half_started(error: Exception) -> None:
    """Ray lets the processes of a start that failed run on until this one ends; only the traceback knows them."""
    from ray._private.node import Node

    for frame, _ in traceback.walk_tb(error.__traceback__):
        if isinstance(node := frame.f_locals.get("self"), Node):
            node.kill_all_processes(check_alive=False, allow_graceful=False)


def _resources(
    nodes: Sequence[Mapping[str, Any]], gpus: bool, wanted: int | None
) -> tuple[dict[str, float], int, str, int]:
    """What an actor claims, how many there is room for, where they compute, and with how many threads.

    Args:
        wanted: so many actors shall find room on the CPUs there are.
    """
    alive = [node["Resources"] for node in nodes if node["Alive"]]
    count = int(sum(node.get("GPU", 0) for node in alive)) if gpus else 0
    if count:
        return {"num_gpus": 1, "num_cpus": 1}, count, "cuda", 1
    cpus = [int(node.get("CPU", 0)) for node in alive]
    threads = max(1, min(CPUS_PER_ACTOR, max(cpus, default=1), sum(cpus) // (wanted or 1)))
    count = max(1, sum(own // threads for own in cpus))
    # Beside each actor there is room for a task that decodes: without it nothing would ever arrive.
    return {"num_cpus": threads - _SHARE_OF_DECODING}, count, "cpu", threads


class _Caption:
    """An actor: pictures → rows, so many at a time."""

    def __init__(self, make_worker: Any, device: str, num_threads: int, batch_size: int) -> None:
        import ray

        self.batch_size = batch_size
        # In a thread that ends, and OpenMP's with it: Ray calls the worker in another thread than this one, and with
        # more of OpenMP's than there are CPUs they all go to sleep wherever one waits for another.
        with ThreadPoolExecutor(1) as thread:
            self.worker = thread.submit(ray.get(make_worker), device, num_threads).result()

    def __call__(self, table: "pyarrow.Table") -> "pyarrow.Table":
        items = _items(table)
        batches = iter(lambda: list(itertools.islice(items, self.batch_size)), [])
        return _table(list(itertools.chain.from_iterable(self.worker(batches))))


def _table(items: Sequence[Item]) -> "pyarrow.Table":
    import pyarrow as pa

    return pa.table(
        {
            "shard": pa.array([item.shard for item in items], pa.int64()),
            "index": pa.array([item.index for item in items], pa.int64()),
            "id": pa.array([item.id for item in items], pa.string()),
            "file_name": pa.array([item.file_name for item in items], pa.string()),
            "pixels": pa.array([None if item.pixels is None else item.pixels.tobytes() for item in items], pa.binary()),
            "error": pa.array([item.error for item in items], pa.string()),
            "row": pa.array([item.row for item in items], pa.string()),
            "end": pa.array([item.end for item in items], pa.bool_()),
        }
    )


def _items(table: "pyarrow.Table") -> Iterator[Item]:
    names = [name for name in table.column_names if name != "pixels"]
    for pixels, fields in zip(table["pixels"], table.select(names).to_pylist(), strict=True):
        buffer = pixels.as_buffer()
        yield Item(**fields, pixels=None if buffer is None else np.frombuffer(buffer, np.uint8).reshape(3, 256, 256))


def _input_error_in(error: BaseException | None) -> InputError | None:
    """Ray wraps what a task or an actor raised, more than once."""
    seen: list[BaseException] = []
    while error is not None and error not in seen:
        if isinstance(error, InputError):
            return error
        seen.append(error)
        error = getattr(error, "cause", None) or error.__cause__ or error.__context__
    return None
