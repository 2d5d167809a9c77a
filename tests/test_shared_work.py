"""A file that several processes compute in parts: whoever is stopped or killed, the others' work counts."""

import shutil
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from captioner.errors import InputError
from captioner.runtime.signals import Stopped
from captioner.training import shared_work
from captioner.training.shared_work import Records, write_together

HEADER, TRAILER, SIZE = b"header", b"the end", 3


class Group:
    """Threads that talk as processes do."""

    def __init__(self, size: int) -> None:
        self.size, self.values = size, {}
        self.barrier = threading.Barrier(size, timeout=20)


@dataclass(frozen=True)
class ProcessOf:
    """What `Processes` offers, for a thread of a group."""

    rank: int
    group: Group

    @property
    def size(self) -> int:
        return self.group.size

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def gather(self, value: Any, patient: bool = False) -> list[Any]:
        assert patient
        self.group.values[self.rank] = value
        self.group.barrier.wait()
        values = [self.group.values[rank] for rank in range(self.size)]
        self.group.barrier.wait()
        return values

    def largest(self, value: int, patient: bool = False) -> int:
        return max(self.gather(value, patient))

    def wait(self) -> None:
        self.group.barrier.wait()


@dataclass
class Work:
    """Computes record i as i, and keeps the book."""

    path: Path
    count: int
    batch: int = 4
    stop_after: int = 10**9  # batches, until all are asked to stop
    computed: list[int] = field(default_factory=list)
    batches: int = 0

    @property
    def content(self) -> bytes:
        return HEADER + b"".join(number.to_bytes(SIZE, "big") for number in range(self.count)) + TRAILER

    def compute(self, numbers: range, trailer: bytes) -> Iterator[bytes]:
        assert trailer == TRAILER
        for first in range(0, len(numbers), self.batch):
            some = numbers[first : first + self.batch]
            self.computed += some
            self.batches += 1
            yield b"".join(number.to_bytes(SIZE, "big") for number in some)

    def run(self, size: int, stop_signal: Callable[[], int] | None = None) -> list[BaseException]:
        """Do it in so many threads; what they raised."""
        group, raised = Group(size), []

        def work(rank: int) -> None:
            try:
                records = Records(HEADER, self.count, SIZE, self.batch)
                asked = stop_signal or (lambda: 15 if self.batches >= self.stop_after else 0)
                process: Any = ProcessOf(rank, group)
                write_together(self.path, records, lambda: TRAILER, self.compute, process, asked, "records")
            except BaseException as error:
                raised.append(error)
                if not isinstance(error, Stopped):  # the others wait in vain
                    group.barrier.abort()

        threads = [threading.Thread(target=work, args=(rank,)) for rank in range(size)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return raised

    def leftovers(self) -> list[str]:
        return sorted(path.name for path in self.path.parent.iterdir() if path != self.path)


@pytest.fixture(autouse=True)
def few_parts(monkeypatch):
    """Of several batches each."""
    monkeypatch.setattr(shared_work, "MOST_PARTS", 5)


@pytest.mark.parametrize("size", [1, 2, 3, 7])
@pytest.mark.parametrize("count", [1, 4, 41, 60])
def test_any_number_of_processes_writes_the_same_file_and_computes_each_record_once(size, count, tmp_path):
    work = Work(tmp_path / "file", count)
    assert work.run(size) == []
    assert work.path.read_bytes() == work.content
    assert sorted(work.computed) == list(range(count)) and work.leftovers() == []


@pytest.mark.parametrize(("size", "then"), [(1, 1), (2, 2), (3, 1), (1, 3)])
def test_others_go_on_where_processes_were_stopped(size, then, tmp_path):
    """With the whole batches of parts that were begun, too."""
    first = Work(tmp_path / "file", 60, stop_after=5)
    raised = first.run(size)
    assert [type(error) for error in raised] == [Stopped] * size and raised[0].signal == 15
    assert not first.path.exists() and 20 <= len(first.computed) < 60
    second = Work(tmp_path / "file", 60)
    assert second.run(then) == []
    assert second.path.read_bytes() == second.content and second.leftovers() == []
    assert sorted(first.computed + second.computed) == list(range(60))


def test_what_was_killed_while_it_was_put_together_is_not_computed_again(tmp_path, monkeypatch):
    copied, whole = [], shutil.copyfileobj

    def copy(source, target, length):
        whole(source, target, length)
        copied.append(source.name)
        if len(copied) == 3:
            target.flush()
            raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(shutil, "copyfileobj", copy)
        assert [type(error) for error in Work(tmp_path / "file", 60).run(1)] == [KeyboardInterrupt]
    assert not (tmp_path / "file").exists() and len(copied) == 3
    work = Work(tmp_path / "file", 60)
    assert work.run(2) == [] and work.computed == []
    assert work.path.read_bytes() == work.content and work.leftovers() == []


def test_what_is_not_of_this_file_is_begun_anew(tmp_path):
    (tmp_path / ".file.partial").write_bytes(b"something else" * 20)
    (tmp_path / ".file.parts").mkdir()
    (tmp_path / ".file.parts" / "000000000-000000012").write_bytes(b"cut off")
    work = Work(tmp_path / "file", 60)
    assert work.run(2) == []
    assert work.path.read_bytes() == work.content and len(work.computed) == 60


def test_two_runs_do_not_write_one_file(tmp_path):
    outer = Work(tmp_path / "file", 60)
    said = []

    def second_run() -> int:
        if not said:
            said.append(None)
            said[:] = Work(tmp_path / "file", 60).run(1)
        return 0

    assert outer.run(1, second_run) == []
    assert outer.path.read_bytes() == outer.content
    assert isinstance(said[0], InputError) and "another process is writing it" in str(said[0])


def test_machines_that_do_not_share_the_folder_are_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr(shared_work, "VISIBLE_WITHIN", 0.1)
    computed, here = shared_work._compute_part, []

    def compute_part(folder: Path, part: range, *rest: Any) -> None:
        """The second part goes into another machine's folder."""
        here.append(part)
        other = tmp_path / "elsewhere"
        other.mkdir(exist_ok=True)
        computed(other if part.start else folder, part, *rest)

    monkeypatch.setattr(shared_work, "_compute_part", compute_part)
    raised = Work(tmp_path / "file", 60).run(2)
    lines = [str(error) for error in raised if isinstance(error, InputError)]
    assert len(here) == 5 and len(lines) == 1
    assert "is not to be seen here; expected a folder that all machines share" in lines[0]
