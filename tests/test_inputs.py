"""Pictures as people name them: files, folders, patterns, lists on stdin, addresses."""

import http.server
import io
import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

CPU = ["--gpuid", -1, "--precision", "fp32", "--vis_dir", ""]


@pytest.fixture
def photos(tmp_path, monkeypatch):
    """photos/{b2,b10}.png, photos/deep/c.png, a.png; the working folder is the one that holds them."""
    rng = np.random.default_rng(5)
    for name in ("photos/b10.png", "photos/b2.png", "photos/deep/c.png", "a.png"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, size=(64, 64, 3), dtype=np.uint8)).save(path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def names(tiny_model, command, photos, monkeypatch):
    """Run caption-eval with these arguments; the file names captioned, and what went to stderr."""

    def captioned(*arguments: object, stdin: bytes = b"") -> tuple[list[str], str]:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin)))
        done = command("eval", *arguments, "--model", tiny_model, *CPU, "--output", "o.json")
        if done.returncode:
            return [], done.stderr
        return [row["file_name"] for row in json.loads(Path("o.json").read_text())], done.stderr

    return captioned


def test_files_folders_and_patterns_in_the_order_given(names):
    assert names("a.png")[0] == ["a.png"]
    assert names("photos")[0] == ["b2.png", "b10.png"]
    assert names("a.png", "photos")[0] == ["a.png", "photos/b2.png", "photos/b10.png"]
    assert names("photos/b*.png")[0] == ["photos/b2.png", "photos/b10.png"]
    assert names("photos", "--recursive")[0] == ["b2.png", "b10.png", "deep/c.png"]
    assert names("**/*.png")[0] == ["a.png", "photos/b2.png", "photos/b10.png", "photos/deep/c.png"]
    assert names("photos", "a.png", "--num_images", 2)[0] == ["photos/b2.png", "photos/b10.png"]


def test_options_may_stand_anywhere(names, tiny_model, command, photos):
    assert names("a.png", "--beam_size", 1, "photos/b2.png")[0] == ["a.png", "photos/b2.png"]
    done = command("eval", *CPU, "--model", tiny_model, "a.png")  # --model takes several
    assert done.returncode == 0 and "(a.png)" in done.stdout


def test_a_picture_named_twice_is_taken_once(names):
    found, log = names("a.png", "./a.png", "*.png")
    assert found == ["a.png"]
    assert "2 pictures are named more than once" in log


@pytest.mark.parametrize("list_", [b"photos/b10.png\r\na.png\n\n", b"photos/b10.png\0a.png\0"])
def test_a_list_on_stdin(names, list_):
    assert names("-", stdin=list_)[0] == ["photos/b10.png", "a.png"]


def test_a_wrong_line_of_a_list_is_skipped(names):
    found, log = names("-", stdin=b"gone.png\na.png\n")
    assert found == ["a.png"]
    assert "skipped gone.png: no such file" in log


def test_what_stands_for_nothing_is_one_line(names, tmp_path):
    os.makedirs(tmp_path / "parent" / "child")
    (tmp_path / "parent" / "child" / "x.png").write_bytes((tmp_path / "a.png").read_bytes())
    for arguments, message in (
        (("gone.png",), "gone.png: no such file or folder"),
        (("*.jpeg",), "*.jpeg: no file matches"),
        (("-",), "the list on stdin is empty"),
        (("parent",), f"but in its subfolders ({Path('parent/child/x.png')}); give --recursive"),
        (("a.png", "--image_folder", "photos"), "one source of pictures"),
        (("http://127.0.0.1:1/a.png", "--write_txt", 1), "addresses have no such place"),
    ):
        found, log = names(*arguments)
        assert found == [] and message in log.splitlines()[-1], log


def test_pictures_left_out_in_subfolders_are_mentioned(names):
    found, log = names("photos")
    assert "--recursive takes them, too" in log
    assert "--recursive" not in names("photos", "--recursive")[1]


class Pictures(http.server.BaseHTTPRequestHandler):
    """/a.png is one; /moved leads to it; /round leads to itself; /large goes on for ever."""

    def do_GET(self):
        if self.path == "/a.png":
            self.answer(200, Path("a.png").read_bytes())
        elif self.path in ("/moved", "/round"):
            self.answer(302, b"", ("Location", "/a.png" if self.path == "/moved" else "/round"))
        elif self.path == "/file":
            self.answer(302, b"", ("Location", "file:///etc/hostname"))
        elif self.path == "/large":
            self.send_response(200)
            self.send_header("Content-Length", str(2**40))
            self.end_headers()
        else:
            self.answer(404, b"no")

    def answer(self, code, body, *headers):
        self.send_response(code)
        for name, value in headers:
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


def test_addresses_are_fetched_within_limits(names):
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Pictures) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        at = f"http://127.0.0.1:{server.server_port}"
        found, log = names(f"{at}/a.png", f"{at}/round", f"{at}/file", "photos/b2.png", f"{at}/large", f"{at}/moved")
        server.shutdown()
    assert found == [f"{at}/a.png", "photos/b2.png", f"{at}/moved"]
    for path, reason in (("round", "HTTP 302"), ("file", "HTTP 302"), ("large", "more than allowed")):
        assert any(f"{at}/{path}: " in line and reason in line for line in log.splitlines()), (path, log)


def test_the_shell_sees_captions_of_a_pipe(tiny_model, photos):
    """As typed: find … -print0 | caption-eval -"""
    done = subprocess.run(
        [sys.executable, "-m", "captioner", "eval", "-", "--model", str(tiny_model), *map(str, CPU)],
        input=b"a.png\0photos/b2.png\0",
        capture_output=True,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1]), "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    assert [line.rsplit("  ", 1)[1] for line in done.stdout.decode().splitlines()] == ["(a.png)", "(photos/b2.png)"]
