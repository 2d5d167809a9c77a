"""Faults of the disk at the n-th call: opening, writing, syncing and renaming files of a command's folder.

    PYTHONPATH=. python tests/fault_injection.py

runs small caption-score, -convert, -prepro and -eval once for each call that can fail, and prints how many there were.
Each run ends in exit code 1 and one line, or succeeds where the fault is beside the point (a cache, a lock's clock); it
leaves every file that was there before as it was, or whole and new.
"""

import builtins
import contextlib
import errno
import importlib
import io
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

from hostile import encoded, photo
from test_hostile_eval import save_model

KINDS = (errno.ENOSPC, errno.EIO, errno.EACCES)


class Faults:
    """Counts the calls that concern a folder, and makes one of them fail.

    Args:
        at: which call fails, from 1 on; 0: none.
    """

    def __init__(self, folder: Path, at: int) -> None:
        self.folder, self.at, self.calls = str(folder), at, 0

    def _call(self, what: object) -> None:
        self.calls += 1
        if self.calls == self.at:
            number = KINDS[self.at % len(KINDS)]
            raise OSError(number, os.strerror(number), str(what))

    def _concerns(self, path: object) -> bool:
        return isinstance(path, str | os.PathLike) and os.path.abspath(os.fspath(path)).startswith(self.folder)

    @contextlib.contextmanager
    def injected(self) -> Iterator["Faults"]:
        """The functions are replaced while the block runs."""
        whole_open, replace, fsync, fdopen = io.open, os.replace, os.fsync, os.fdopen
        descriptors: set[int] = set()

        def open_(path: Any, *arguments: Any, **options: Any) -> Any:
            if self._concerns(path):
                self._call(path)
            return whole_open(path, *arguments, **options)

        def replace_(source: Any, target: Any, **options: Any) -> None:
            if self._concerns(target):
                self._call(target)
            replace(source, target, **options)

        def fsync_(descriptor: int) -> None:
            if descriptor in descriptors:
                self._call("fsync")
            fsync(descriptor)

        def fdopen_(descriptor: int, *arguments: Any, **options: Any) -> Any:
            stream = fdopen(descriptor, *arguments, **options)
            if os.path.realpath(f"/proc/self/fd/{descriptor}").startswith(self.folder):
                descriptors.add(descriptor)
                write = stream.write

                def write_(data: Any) -> Any:
                    self._call("write")
                    return write(data)

                with contextlib.suppress(AttributeError):  # text streams take attributes, buffered ones do too
                    stream.write = write_
            return stream

        with (
            mock.patch.object(builtins, "open", open_),
            mock.patch.object(io, "open", open_),
            mock.patch.object(os, "replace", replace_),
            mock.patch.object(os, "fsync", fsync_),
            mock.patch.object(os, "fdopen", fdopen_),
        ):
            yield self


def scenes(folder: Path) -> dict[str, list[object]]:
    """Small runs of commands: name → arguments. Their files are made in `folder`."""
    (folder / "photos").mkdir(parents=True)
    for number in range(2):
        (folder / "photos" / f"{number}.png").write_bytes(encoded(photo(16, 16, number), "PNG"))
        (folder / "photos" / f"{number}.txt").write_text("a dog\n")
    save_model(folder / "model.pt")
    (folder / "p.json").write_text(json.dumps([{"image_id": 1, "caption": "a dog"}]))
    (folder / "r.json").write_text(json.dumps([{"image_id": 1, "captions": ["a dog runs"]}]))
    data = ["--output_h5", folder / "data.h5", "--output_json", folder / "data.json"]
    return {
        "score": [
            *("--predictions", folder / "p.json", "--references", folder / "r.json", "--metrics", "Bleu"),
            *("--bootstrap", 2, "--output", folder / "scores.json"),
        ],
        "convert": [folder / "model.pt", "--output", folder / "small.pt", "--dtype", "float16"],
        "prepro": ["--input_json", folder / "photos", "--num_val", 1, "--num_workers", 0, *data],
        "eval": [
            *("--model", folder / "model.pt", "--image_folder", folder / "photos", "--gpuid", -1, "--num_workers", 0),
            *("--vis_dir", folder / "vis", "--output", folder / "captions.csv"),
        ],
    }


def run_command(name: str, arguments: list[object]) -> tuple[int, str]:
    """Exit code and stderr of a command in this process."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = importlib.import_module(f"captioner.cli.{name}").main([str(argument) for argument in arguments])
    return code, err.getvalue()


def _files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def inject(name: str, folder: Path, every: int = 1) -> tuple[int, int]:
    """Fail each call (or every so many-th) of a second run of a command.

    Returns:
        How many faults there were, and how many of them ended the command.

    Raises:
        AssertionError: a run ended in another way, or damaged a file.
    """
    arguments = scenes(folder)[name]
    assert run_command(name, arguments)[0] == 0
    before = _files(folder)
    with Faults(folder, 0).injected() as counted:
        assert run_command(name, arguments)[0] == 0
    newest = _files(folder)
    ended = faults = 0
    for at in range(1, counted.calls + 1, every):
        with Faults(folder, at).injected():
            code, err = run_command(name, arguments)
        faults += 1
        ended += code != 0
        last = err.strip().splitlines()[-1] if err.strip() else ""
        assert code in (0, 1), (name, at, code, err)
        assert "Traceback" not in err, (name, at, err)
        assert code == 0 or last.startswith(f"caption-{name}: error: "), (name, at, err)
        now = _files(folder)
        # A fault that a command outlives may cost a picture: its files are whole, and others.
        for path, content in before.items() if code else ():
            if path.endswith((".journal", ".partial", ".captioner-files", "about.json", "about.json.js")):
                continue  # these grow, or hold the time
            assert now.get(path) in (content, newest.get(path)), (name, at, path)
        before = now
        assert not [path for path in now if path.endswith((".tmp", ".lock"))], (name, at, sorted(now))
    assert run_command(name, arguments)[0] == 0
    return faults, ended


if __name__ == "__main__":
    for command in ("score", "convert", "prepro", "eval"):
        place = Path(tempfile.mkdtemp()).resolve()
        print(f"caption-{command}: %d faults, %d of them ended it in one line" % inject(command, place / "run"))
        shutil.rmtree(place)
