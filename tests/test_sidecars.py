"""Text files beside photos, and the ways of results to the terminal, as data-set makers need them."""

import fcntl
import json
import os
import pty
import shutil
import struct
import subprocess
import sys
import termios
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

CPU = ["--gpuid", -1, "--precision", "fp32", "--vis_dir", ""]


@pytest.fixture
def folder(tmp_path):
    rng = np.random.default_rng(5)
    (tmp_path / "photos").mkdir()
    for name in ("a", "b", "c"):
        pixels = rng.integers(0, 256, size=(64, 64, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "photos" / f"{name}.png")
    return tmp_path / "photos"


@pytest.fixture
def captioned(tiny_model, command, folder):
    """Run caption-eval --write_txt on the folder; the captions of stdout by file name, and stderr."""

    def run(*arguments: object) -> tuple[dict[str, str], str]:
        done = command("eval", folder, "--model", tiny_model, *CPU, "--write_txt", *arguments)
        assert done.returncode == 0, done.stderr
        parts = [line.split(": ", 1)[1].rsplit("  ", 1) for line in done.stdout.splitlines()]
        return {name.strip("()"): caption for caption, name in parts}, done.stderr

    return run


def test_prefix_suffix_and_extension(captioned, folder):
    captions, _ = captioned("--prefix", "photo of ", "--suffix", ", 2024", "--txt_extension", "caption")
    assert captions.keys() == {"a.png", "b.png", "c.png"}
    for name, caption in captions.items():
        assert (folder / name).with_suffix(".caption").read_text() == f"photo of {caption}, 2024\n"
    assert not list(folder.glob("*.txt"))


def test_only_missing_reads_nothing_that_is_captioned(captioned, folder):
    captioned()
    before = (folder / "b.txt").read_bytes()
    (folder / "a.txt").unlink()
    (folder / "c.txt").write_text(" \n")  # no caption in it
    (folder / "b.png").write_bytes(b"damaged since")
    captions, log = captioned("--only_missing")
    assert captions.keys() == {"a.png", "c.png"} and "skipped" not in log
    assert "1 of 3 photos have their caption" in log
    assert (folder / "b.txt").read_bytes() == before and (folder / "c.txt").read_text() == captions["c.png"] + "\n"
    captions, log = captioned("--only_missing", 1)
    assert captions == {} and "nothing to do" in log


def test_only_missing_with_a_number_takes_the_next_ones(captioned, folder):
    assert captioned("--only_missing", "--num_images", 2)[0].keys() == {"a.png", "b.png"}
    assert captioned("--only_missing", "--num_images", 2)[0].keys() == {"c.png"}


@pytest.mark.parametrize("existing", ["append", "prepend"])
def test_a_caption_joins_the_text_that_is_there(captioned, folder, existing):
    (folder / "a.txt").write_text("mine\nof two lines")
    for _ in range(2):  # a second run adds nothing
        captions, _ = captioned("--existing", existing)
        lines = ["mine", "of two lines"]
        lines.insert(0 if existing == "prepend" else 2, captions["a.png"])
        assert (folder / "a.txt").read_text().splitlines() == lines
        assert (folder / "b.txt").read_text() == captions["b.png"] + "\n"


def test_text_that_is_there_stays_by_default_and_always_if_it_is_no_text(captioned, folder):
    (folder / "a.txt").write_bytes(b"\xff\xfe\xfa not UTF-8")
    for arguments in ((), ("--existing", "append")):
        _, log = captioned(*arguments)
        assert f"kept {folder / 'a.txt'}" in log
        assert (folder / "a.txt").read_bytes() == b"\xff\xfe\xfa not UTF-8"


def test_two_photos_that_share_a_text_file_are_told(captioned, folder):
    shutil.copy(folder / "b.png", folder / "a.webp")
    captions, log = captioned("--overwrite")
    assert f"{folder / 'a.webp'} gets no text file: a.txt is that of a.png" in log
    assert (folder / "a.txt").read_text() == captions["a.png"] + "\n"


def test_contradictions_are_one_line(tiny_model, command, folder):
    for arguments, message in (
        (["--only_missing"], "add --write_txt"),
        (["--prefix", "x"], "add --write_txt"),
        (["--write_txt", "--existing", "append", "--overwrite"], "exclude each other"),
        (["--write_txt", "--txt_extension", "a/b"], "--txt_extension 'a/b'"),
        (["--output", "-", "--resume"], "--resume cannot go on"),
    ):
        done = command("eval", folder, "--model", tiny_model, *CPU, *arguments)
        assert done.returncode == 1 and message in done.stderr.splitlines()[-1], done.stderr


def test_rows_on_stdout_are_json_lines_and_nothing_else(tiny_model, command, folder, tmp_path):
    done = command("eval", folder, "--model", tiny_model, *CPU, "--output", "-")
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert [row["file_name"] for row in rows] == ["a.png", "b.png", "c.png"]
    assert command("eval", folder, "--model", tiny_model, *CPU, "--output", tmp_path / "o.jsonl").returncode == 0
    assert done.stdout == (tmp_path / "o.jsonl").read_text()
    assert not Path("-").exists()


def test_scores_are_results_and_go_to_stdout_unless_rows_do(tiny_model, command, folder, tmp_path):
    known = tmp_path / "known.json"
    known.write_text(json.dumps([{"file_path": f"{name}.png", "captions": ["a red picture"]} for name in "abc"]))
    scored = ["--language_eval", "--references", known]
    done = command("eval", folder, "--model", tiny_model, *CPU, *scored)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == 4 and "CIDEr " in done.stdout.splitlines()[-1]
    assert "CIDEr" not in done.stderr
    done = command("eval", folder, "--model", tiny_model, *CPU, *scored, "--output", "-")
    assert len([json.loads(line) for line in done.stdout.splitlines()]) == 3
    assert "CIDEr " in done.stderr


def test_quiet_says_only_what_went_wrong(tiny_model, command, folder):
    (folder / "d.png").write_text("no picture")
    done = command("eval", folder, "--model", tiny_model, *CPU, "--quiet")
    assert done.returncode == 0 and len(done.stdout.splitlines()) == 3
    assert [line for line in done.stderr.splitlines() if "skipped" not in line] == []
    assert "images captioned" in command("eval", folder, "--model", tiny_model, *CPU).stderr


def test_a_terminal_shows_how_far_it_is(tiny_model, folder):
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    with subprocess.Popen(
        [sys.executable, "-m", "captioner", "eval", str(folder), "--model", str(tiny_model), *map(str, CPU)],
        stdout=subprocess.PIPE,
        stderr=theirs,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1]), "OMP_NUM_THREADS": "1", "TERM": "xterm"},
    ) as process:
        os.close(theirs)
        shown = b""
        while True:
            try:
                data = os.read(ours, 4096)
            except OSError:  # Linux says so when the other end is closed
                break
            if not data:
                break
            shown += data
        printed = process.stdout.read().decode()
    os.close(ours)
    assert process.returncode == 0
    assert b"3/3" in shown and b"images/s" in shown
    assert len(printed.splitlines()) == 3 and "\r" not in printed
