"""Results of shards: one file for each, written when the last of its pictures is there, whole or not at all."""

import contextlib
import io
import json
import logging
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from captioner.data.shards import name_of
from captioner.errors import InputError
from captioner.runtime.locks import sole_run
from captioner.runtime.storage import (
    join,
    make_folder,
    names_in,
    on_this_machine,
    read_whole,
    remove,
    write_whole,
)
from captioner.scale.items import Item

log = logging.getLogger(__name__)

FORMATS = ("jsonl", "parquet")
RUN_FILE = "captioner-run.json"  # in the folder of results: what makes another run the same
_ERRORS = ".errors.jsonl"


@contextlib.contextmanager
def sole_writer(folder: str) -> Iterator[None]:
    """Hold a folder of results, which is made if needed: two runs in it would do each other's shards, or mix models.

    At an address nothing can be held: two runs of the same models and options there do the same work twice, and every
    file is still whole.

    Raises:
        InputError: another run is at it, or it cannot be written.
    """
    make_folder(folder, "results")
    here = on_this_machine(folder)
    if here is None:
        log.info("%s: an address cannot be locked; see that no other run writes there at the same time", folder)
        yield
        return
    with sole_run(here / ".lock", f"the folder {folder}"):
        yield


@dataclass
class _Open:
    """A shard some of whose items have come."""

    items: dict[int, Item] = field(default_factory=dict)
    count: int | None = None  # of its pictures, once its end has come


@dataclass
class Tally:
    """What became of the shards of a run so far."""

    shards: int = 0
    captioned: int = 0
    broken: int = 0  # pictures
    failed: dict[str, str] = field(default_factory=dict)  # shards without results → why

    @classmethod
    def sum_of(cls, parts: Sequence["Tally"]) -> "Tally":
        """All parts together."""
        return cls(
            sum(part.shards for part in parts),
            sum(part.captioned for part in parts),
            sum(part.broken for part in parts),
            {shard: reason for part in parts for shard, reason in part.failed.items()},
        )


class ShardResults:
    """Takes items with their rows in any order, any of them more than once.

    Args:
        shards: names of the run's shards, each with another last part.
        folder: of results, on this machine or at an address; it is there, and held by `sole_writer`.
        format: of FORMATS.
        run: what makes this run the same as an earlier one: model and options.
        overwrite: whether results of other runs, or of anybody, may be replaced.

    Raises:
        InputError: two shards are called alike, or the folder has results of another run, or cannot be written.
    """

    def __init__(
        self, shards: Sequence[str], folder: str, format: str, run: dict[str, object], overwrite: bool
    ) -> None:
        self.shards, self.folder, self.format = shards, folder, format
        self.tally = Tally()
        self._open: dict[int, _Open] = {}
        self._closed: set[int] = set()
        targets = [self._target(shard) for shard in shards]
        for target, shard in zip(targets, shards, strict=True):
            if targets.count(target) > 1:
                raise InputError(f"{shard}: another shard has this name, too", remedy="give each folder its own run")
            if _is_same(join(folder, target), shard):
                raise InputError(f"{shard}: its results would stand in its place", remedy="choose another --output_dir")
        there = names_in(folder)
        wanted = json.dumps(run, sort_keys=True).encode()
        known = read_whole(join(folder, RUN_FILE)) if RUN_FILE in there else None
        names = [name for target in targets for name in (target, _errors_of(target))]
        foreign = next((name for name in names if name in there), None) if known is None else RUN_FILE
        if (foreign and known != wanted) and not overwrite:
            whose = (
                "is not of this run" if known is None else "says that the results here are of another model or options"
            )
            raise InputError(
                f"{join(folder, foreign)}: {whose}", remedy="choose another --output_dir, or --overwrite 1"
            )
        if known != wanted:
            there = set()  # nothing here is ours yet
            for name in names:
                remove(join(folder, name))
            write_whole(join(folder, RUN_FILE), wanted)
        self.left = [number for number, target in enumerate(targets) if target not in there]

    def gather(self, items: Iterable[Item]) -> Tally:
        """Take what comes, and show how far it is; what became of the shards is in the result.

        Raises:
            InputError: results cannot be written.
        """
        hidden = None if log.isEnabledFor(logging.INFO) else True  # None: on a terminal
        with logging_redirect_tqdm(), tqdm(unit=" images", disable=hidden) as bar:
            for item in items:
                self.add(item)
                bar.update(not item.end)
        assert not self._open, f"no end of {[self.shards[number] for number in self._open]}"
        return self.tally

    def add(self, item: Item) -> None:
        """Take an item; with the last one of a shard its results are written.

        Raises:
            InputError: they cannot be written.
        """
        if item.shard in self._closed:
            return
        if item.end and item.error:
            self._open.pop(item.shard, None)
            self._closed.add(item.shard)
            self.tally.failed[self.shards[item.shard]] = item.error
            log.warning("skipped %s", item.error)
            return
        found = self._open.setdefault(item.shard, _Open())
        if item.end:
            found.count = item.index
        else:
            found.items[item.index] = item
        if found.count is not None and len(found.items) == found.count:
            self._write(item.shard, [found.items[index] for index in range(found.count)])
            del self._open[item.shard]
            self._closed.add(item.shard)

    def finish(self, tally: Tally) -> None:
        """Say what became of it all, in all processes.

        Raises:
            InputError: some shards have no results.
        """
        broken = f", {tally.broken} broken pictures" if tally.broken else ""
        log.info(
            "%d shards with %d images captioned%s; results: %s", tally.shards, tally.captioned, broken, self.folder
        )
        if tally.failed:
            count, first = len(tally.failed), next(iter(tally.failed.values()))
            raise InputError(
                f"{count} of {len(self.shards)} shards could not be read: {first}",
                remedy="see the lines above; the same command tries them again",
            )

    def _target(self, shard: str) -> str:
        return f"{name_of(shard).rpartition('.')[0]}.{self.format}"

    def _write(self, shard: int, items: Sequence[Item]) -> None:
        target = self._target(self.shards[shard])
        broken = [{"file_name": item.file_name, "error": item.error} for item in items if item.error]
        rows = [item.row for item in items if not item.error]
        errors = join(self.folder, _errors_of(target))
        if broken:  # first: where there are results, their list of errors is complete
            write_whole(errors, _lines([json.dumps(one, ensure_ascii=False) for one in broken]))
        else:
            remove(errors)
        write_whole(join(self.folder, target), _parquet(rows) if self.format == "parquet" else _lines(rows))
        self.tally.shards += 1
        self.tally.captioned += len(rows)
        self.tally.broken += len(broken)
        more = f", {len(broken)} broken: see {errors}" if broken else ""
        log.info("%s: %d captioned%s", name_of(self.shards[shard]), len(rows), more)


def _errors_of(target: str) -> str:
    return target.rpartition(".")[0] + _ERRORS


def _is_same(one: str, other: str) -> bool:
    here, there = on_this_machine(one), on_this_machine(other)
    if here is None or there is None:
        return one == other
    return here.exists() and there.exists() and here.samefile(there)


def _lines(rows: Sequence[str]) -> bytes:
    return "".join(row + "\n" for row in rows).encode("utf-8", "backslashreplace")


def _parquet(rows: Sequence[str]) -> bytes:
    import pyarrow as pa
    from pyarrow import parquet

    words = pa.list_(pa.struct([("word", pa.string()), ("logprob", pa.float64())]))
    scores = [("logprob", pa.float64()), ("confidence", pa.float64()), ("words", words)]
    schema = pa.schema(
        [
            ("image_id", pa.string()),
            ("file_name", pa.string()),
            ("caption", pa.string()),
            *scores,
            ("abstained", pa.bool_()),
            ("n_best", pa.list_(pa.struct([("caption", pa.string()), *scores]))),
            ("arithmetic", pa.string()),
        ]
    )
    target = io.BytesIO()
    parquet.write_table(pa.Table.from_pylist([json.loads(row) for row in rows], schema=schema), target)
    return target.getvalue()
