"""Faults of the disk at the n-th call: opening, reading, writing, syncing, linking and renaming files of a command's
folder, making folders and temporary files in it.

    PYTHONPATH=. python tests/fault_injection.py

does small runs of every command once for each call that can fail, and prints how many there were. Each ends in exit
code 1 and one line, or succeeds where the fault is beside the point (a cache, a lock's clock). It leaves every file
that was there before as it was, or whole and new; and the same command again ends well. (What HDF5 and FFmpeg write
from C is out of reach.)
"""

import argparse
import builtins
import contextlib
import errno
import io
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from small_runs import RUNS, files_of, pictures_server, run_in, write_inputs

from captioner.model.checkpoint import load_checkpoint

KINDS = (errno.ENOSPC, errno.EIO, errno.EACCES)
READING = (errno.EIO,)
# These grow, or hold the time.
CHANGING = (
    "report.json",
    ".journal",
    ".partial",
    ".captioner-files",
    "about.json",
    "about.json.js",
    "_losses.jsonl",
    ".notes",
)


class Faults:
    """Counts the calls that concern a folder, and makes one of them fail.

    Args:
        at: which call fails, from 1 on; 0: none.
    """

    def __init__(self, folder: Path, at: int) -> None:
        self.folder, self.at, self.calls = str(folder), at, 0

    def _call(self, what: object, kinds: Sequence[int] = KINDS) -> None:
        self.calls += 1
        if self.calls == self.at:
            number = kinds[self.at % len(kinds)]
            raise OSError(number, os.strerror(number), str(what))

    def _concerns(self, path: object) -> bool:
        return isinstance(path, str | os.PathLike) and os.path.abspath(os.fspath(path)).startswith(self.folder)

    def _watched(self, stream: Any) -> Any:
        """The stream, whose reads and writes are counted. (Iteration over lines, and what C reads, is not.)"""

        def watched(name: str, function: Any, kinds: Sequence[int]) -> Any:
            def called(*arguments: Any) -> Any:
                self._call(name, kinds)
                return function(*arguments)

            return called

        for name, kinds in (("write", KINDS), ("read", READING), ("readinto", READING), ("readline", READING)):
            with contextlib.suppress(AttributeError):  # a kind of stream that has none, or takes no attributes
                setattr(stream, name, watched(name, getattr(stream, name), kinds))
        return stream

    @contextlib.contextmanager
    def injected(self) -> Iterator["Faults"]:
        """The functions are replaced while the block runs."""
        whole_open, fsync, fdopen = io.open, os.fsync, os.fdopen

        def open_(path: Any, *arguments: Any, **options: Any) -> Any:
            if not self._concerns(path):
                return whole_open(path, *arguments, **options)
            self._call(path)
            return self._watched(whole_open(path, *arguments, **options))

        def made(function: Any) -> Any:
            def called(path: Any, *arguments: Any, **options: Any) -> Any:
                if self._concerns(path):
                    self._call(path)
                return function(path, *arguments, **options)

            return called

        def fsync_(descriptor: int) -> None:
            if os.path.realpath(f"/proc/self/fd/{descriptor}").startswith(self.folder):
                self._call("fsync")
            fsync(descriptor)

        def fdopen_(descriptor: int, *arguments: Any, **options: Any) -> Any:
            stream = fdopen(descriptor, *arguments, **options)
            ours = os.path.realpath(f"/proc/self/fd/{descriptor}").startswith(self.folder)
            return self._watched(stream) if ours else stream

        def moving(function: Any) -> Any:
            def called(source: Any, target: Any, *arguments: Any, **options: Any) -> None:
                if self._concerns(target):
                    self._call(target)
                function(source, target, *arguments, **options)

            return called

        with (
            mock.patch.object(builtins, "open", open_),
            mock.patch.object(io, "open", open_),
            mock.patch.object(os, "replace", moving(os.replace)),
            mock.patch.object(os, "rename", moving(os.rename)),
            mock.patch.object(os, "link", moving(os.link)),
            mock.patch.object(os, "open", made(os.open)),
            mock.patch.object(os, "mkdir", made(os.mkdir)),
            mock.patch.object(os, "fsync", fsync_),
            mock.patch.object(os, "fdopen", fdopen_),
        ):
            yield self


def inject(name: str, folder: Path, server: str, every: int = 1) -> tuple[int, int]:
    """Fail each call (or every so many-th) of a run over an earlier one's results.

    Returns:
        How many faults there were, and how many of them ended the command.

    Raises:
        AssertionError: a run ended in another way, or damaged a file.
    """
    command, arguments = RUNS[name]
    write_inputs(folder, name, server)
    _must_work(folder, name)
    before = files_of(folder)
    with Faults(folder, 0).injected() as counted:
        _must_work(folder, name)
    newest = files_of(folder)
    ended = faults = 0
    for at in range(1, counted.calls + 1, every):
        code = _run_with_fault(name, folder, at)
        faults, ended = faults + 1, ended + code
        now = files_of(folder)
        # A fault that a command outlives may cost a picture: its files are whole, and others.
        for path, content in before.items() if code else ():
            if not path.endswith(CHANGING):
                assert now.get(path) in (content, newest.get(path)), (name, at, path)
        before = now
        assert not [path for path in now if path.endswith((".tmp", ".lock"))], (name, at, sorted(now))
    _must_work(folder, name)
    return faults, ended


def inject_into_training(folder: Path, server: str, every: int = 1) -> tuple[int, int]:
    """As `inject`, for trainings that begin over an earlier run: whatever fails, its models are all there still, those
    of the new one are whole, and the same command goes on to the same end."""
    command, arguments = RUNS["train"]
    write_inputs(folder, "train", server)
    _must_work(folder, "train")
    (folder / "run" / "model_id_resume.pt").unlink()  # an earlier run that nobody goes on with
    (folder / "run").rename(folder / "earlier")
    shutil.copytree(folder / "earlier", folder / "run")
    earlier = {content for path, content in files_of(folder / "earlier").items() if path.endswith((".pt", ".json"))}
    with Faults(folder / "run", 0).injected() as counted:
        _must_work(folder, "train")
    wanted = load_checkpoint(folder / "run" / "model_id_last.pt").state_dict
    ended = faults = 0
    for at in range(1, counted.calls + 1, every):
        shutil.rmtree(folder / "run")
        shutil.copytree(folder / "earlier", folder / "run")
        code = _run_with_fault("train", folder, at, folder / "run")
        faults, ended = faults + 1, ended + code
        now = files_of(folder / "run")
        assert earlier <= set(now.values()), (at, sorted(now))
        assert not [path for path in now if path.endswith((".tmp", ".lock"))], (at, sorted(now))
        for path in (folder / "run").glob("*.pt"):
            torch.load(path, weights_only=True)
        _must_work(folder, "train")
        last = load_checkpoint(folder / "run" / "model_id_last.pt").state_dict
        assert all(torch.equal(tensor, last[key]) for key, tensor in wanted.items()), at
        assert earlier <= set(files_of(folder / "run").values()), at
    return faults, ended


def _run_with_fault(name: str, folder: Path, at: int, disk: Path | None = None) -> int:
    command, arguments = RUNS[name]
    with Faults(disk or folder, at).injected():
        code, err = run_in(folder, command, arguments)
    last = err.strip().splitlines()[-1] if err.strip() else ""
    assert code in (0, 1), (name, at, code, err)
    assert "Traceback" not in err, (name, at, err)
    assert code == 0 or last.startswith(f"caption-{command}: error: "), (name, at, err)
    return code


def _must_work(folder: Path, name: str) -> None:
    code, err = run_in(folder, *RUNS[name])
    assert code == 0, (name, err)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--runs", nargs="+", default=list(RUNS), choices=list(RUNS))
    parser.add_argument("--every", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(1)
    print("| run | faults | ended it in one line |\n|---|---|---|", flush=True)
    total, wrong = 0, []
    with pictures_server() as address:
        for one in options.runs:
            place = Path(tempfile.mkdtemp()).resolve() / "run"
            try:
                if one == "train":
                    found = inject_into_training(place, address, options.every)
                else:
                    found = inject(one, place, address, options.every)
            except AssertionError as error:
                wrong.append(one)
                print(f"caption-{one}: {error}; see {place}", flush=True)
                continue
            total += found[0]
            print(f"| caption-{one} | {found[0]:,} | {found[1]:,} |", flush=True)
            shutil.rmtree(place)
    print(f"| all | {total:,} | |")
    assert not wrong, wrong
