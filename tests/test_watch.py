"""caption-eval --watch 1: pictures that arrive whole, in pieces, by renaming, again; restarts and signals."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import captioner.inference.watch
from captioner.inference.watch import WatchedFolder

EXAMPLES = Path(__file__).parents[1] / "examples"


def until(condition: Callable[[], object], seconds: float = 180) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.fixture(params=["watchdog", "polling"])
def folder(request, tmp_path, monkeypatch) -> Iterator[WatchedFolder]:
    monkeypatch.setattr(captioner.inference.watch, "SETTLE_SECONDS", 0.6)
    monkeypatch.setattr(captioner.inference.watch, "POLL_SECONDS", 0.2)
    if request.param == "polling":
        monkeypatch.setitem(sys.modules, "watchdog.observers", None)
    (tmp_path / "in").mkdir()
    yield WatchedFolder(tmp_path / "in", True, ignored=[tmp_path / "in" / "vis"])


def arrived(folder: WatchedFolder, count: int, seconds: float = 20) -> list[str]:
    """The names of the next `count` pictures, in the order of their arrival."""
    names: list[str] = []
    deadline = time.monotonic() + seconds

    def enough() -> bool:
        return len(names) >= count or time.monotonic() > deadline

    for positions in folder.arrivals(enough, 100):
        names.extend([folder.picture(position).relative_to(folder.folder).as_posix() for position in positions])
    return names


def test_pictures_arrive_copied_renamed_in_folders_and_changed(folder):
    into = folder.folder
    shutil.copy(EXAMPLES / "cat.jpg", into / "first.jpg")
    assert arrived(folder, 1) == ["first.jpg"]
    shutil.copy(EXAMPLES / "cat.jpg", into / ".second.jpg.part")
    os.replace(into / ".second.jpg.part", into / "second.jpg")
    (into / "notes.txt").write_text("no picture")
    (into / "vis" / "imgs").mkdir(parents=True)
    shutil.copy(EXAMPLES / "cat.jpg", into / "vis" / "imgs" / "img1.jpg")
    assert arrived(folder, 1) == ["second.jpg"]
    (into.parent / "sub").mkdir()
    shutil.copy(EXAMPLES / "cat.jpg", into.parent / "sub" / "third")
    os.replace(into.parent / "sub", into / "sub")
    assert arrived(folder, 1) == ["sub/third"]
    shutil.copy(EXAMPLES / "coffee.jpg", into / "first.jpg")
    assert arrived(folder, 1) == ["first.jpg"]
    assert arrived(folder, 1, seconds=1) == []
    assert len(folder) == 4


def test_a_file_waits_until_it_is_whole(folder):
    data = (EXAMPLES / "cat.jpg").read_bytes()
    path = folder.folder / "slow.jpg"
    finished = []

    def write_on() -> bool:
        size = path.stat().st_size if path.exists() else 0
        with path.open("ab") as stream:
            stream.write(data[size : size + len(data) // 20 + 1])
        time.sleep(0.05)
        if size == len(data) and not finished:
            finished.append(time.monotonic())
        return bool(finished)

    for positions in folder.arrivals(write_on, 1):
        assert not positions
    assert arrived(folder, 1) == ["slow.jpg"] and path.read_bytes() == data


def test_a_file_that_stays_in_pieces_is_tried_again_and_then_reported(folder, monkeypatch):
    data = (EXAMPLES / "cat.jpg").read_bytes()
    path = folder.folder / "stuck.jpg"
    path.write_bytes(data[:3000])
    assert arrived(folder, 1) == ["stuck.jpg"]
    assert not folder.unreadable("stuck.jpg")
    assert arrived(folder, 1) == ["stuck.jpg"]  # once more, for its writer may only have paused
    monkeypatch.setattr(captioner.inference.watch, "PATIENCE_SECONDS", 0.0)
    assert folder.unreadable("stuck.jpg")
    assert arrived(folder, 1, seconds=1) == []
    path.write_bytes(data)
    assert arrived(folder, 1) == ["stuck.jpg"]
    path.unlink()
    assert not folder.unreadable("stuck.jpg")  # it was taken away again


class Watching:
    """A running caption-eval --watch 1."""

    def __init__(self, folder: Path, out: Path) -> None:
        command = [sys.executable, "-m", "captioner.cli.eval", "--watch", "1", "--image_folder", str(folder)]
        options = [
            "--vis_dir",
            str(out / "vis"),
            "--output",
            str(out / "all.jsonl"),
            "--write_txt",
            "1",
            "--gpuid",
            "-1",
        ]
        self.log = (out / "log").open("w")
        self.process = subprocess.Popen([*command, *options], stdout=subprocess.PIPE, stderr=self.log, text=True)
        self.output = out / "all.jsonl"

    def rows(self) -> list[dict]:
        return [json.loads(line) for line in self.output.read_text().splitlines()] if self.output.exists() else []

    def names(self) -> list[str]:
        return [row["file_name"] for row in self.rows()]

    def stop(self, number: int) -> int:
        self.process.send_signal(number)
        self.process.communicate(timeout=60)
        return self.process.returncode


def test_the_command_captions_what_comes_and_a_restart_what_came_meanwhile(tmp_path):
    photos = tmp_path / "photos"
    photos.mkdir()
    shutil.copy(EXAMPLES / "cat.jpg", photos / "a.jpg")
    watching = Watching(photos, tmp_path)
    until(lambda: watching.names() == ["a.jpg"])
    shutil.copy(EXAMPLES / "coffee.jpg", photos / "b.jpg")
    until(lambda: watching.names() == ["a.jpg", "b.jpg"])
    assert (photos / "b.txt").read_text().strip() == watching.rows()[1]["caption"]
    until(lambda: len(json.loads((tmp_path / "vis" / "vis.json").read_text())) == 2)
    shown = json.loads((tmp_path / "vis" / "vis.json").read_text())
    assert all((tmp_path / "vis" / row["image"]).is_file() for row in shown)
    watching.stop(signal.SIGKILL)
    before = watching.rows()

    shutil.copy(EXAMPLES / "rocket.jpg", photos / "c.jpg")
    shutil.copy(EXAMPLES / "flower.jpg", photos / "a.jpg")  # another picture under the old name
    watching = Watching(photos, tmp_path)
    until(lambda: "c.jpg" in watching.names() and watching.names()[0] != "a.jpg")
    assert watching.stop(signal.SIGTERM) == 0
    after = {row["file_name"]: row for row in watching.rows()}
    assert sorted(after) == sorted(watching.names()) == ["a.jpg", "b.jpg", "c.jpg"]
    assert after["b.jpg"] == before[1]  # not captioned again
    assert after["a.jpg"]["caption"] != before[0]["caption"]
    assert len({row["image_id"] for row in after.values()}) == 3
    assert "Traceback" not in (tmp_path / "log").read_text()


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (["--watch", "1"], "--watch 1 watches a folder"),
        (["--watch", "1", "--image_folder", ".", "--num_images", "3"], "excludes"),
        (["--watch", "1", "--image_folder", ".", "--vis_dir", ""], "nowhere to keep"),
    ],
)
def test_contradictions(command, options, reason):
    done = command("eval", *options)
    assert done.returncode == 1 and reason in done.stderr
