"""caption-download meets every fault that a server can have."""

import hashlib
import http.server
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from hostile import encoded, photo

from captioner.cli.download import main
from captioner.data.address_lists import read_list
from captioner.data.download import Limits, download_lists
from captioner.errors import InputError

PICTURE = encoded(photo(160, 120), "JPEG", quality=95)


class FaultyServer(http.server.BaseHTTPRequestHandler):
    """The path says what goes wrong; `requests` counts who asked for what."""

    protocol_version = "HTTP/1.1"
    requests: Counter[str] = Counter()
    ranges: list[str] = []

    def do_GET(self) -> None:
        name = self.path.strip("/").split(".")[0]
        self.requests[name] += 1
        getattr(self, f"answer_{name.rstrip('0123456789')}", self.answer_good)()

    def log_message(self, *arguments: object) -> None:
        pass

    def reply(self, body: bytes, status: int = 200, length: int | None = None, **headers: str) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body) if length is None else length))
        for key, value in headers.items():
            self.send_header(key.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(body)

    def answer_good(self) -> None:
        self.reply(PICTURE)

    def answer_missing(self) -> None:
        self.reply(b"not here", 404)

    def answer_broken(self) -> None:
        self.reply(b"oops", 500)

    def answer_flaky(self) -> None:
        if self.requests["flaky"] < 3:
            self.reply(b"busy", 503, Retry_After="0")
        else:
            self.reply(PICTURE)

    def answer_page(self) -> None:
        self.reply(b"<html>please log in</html>", Content_Type="text/html")

    def answer_cut(self) -> None:
        """Half the file at first; then, as asked, the rest."""
        if "Range" in self.headers:
            self.ranges.append(self.headers["Range"])
            assert self.headers["If-Range"] == '"v1"'
            start = int(self.headers["Range"].removeprefix("bytes=").rstrip("-"))
            where = f"bytes {start}-{len(PICTURE) - 1}/{len(PICTURE)}"
            self.reply(PICTURE[start:], 206, Content_Range=where, ETag='"v1"')
        else:
            self.reply(PICTURE[:1000], length=len(PICTURE), ETag='"v1"')
            self.close_connection = True

    def answer_changed(self) -> None:
        """Cut off once; then another version of the file, whatever range was asked for."""
        if self.requests["changed"] == 1:
            self.reply(b"x" * 500, length=len(PICTURE), ETag='"old"')
            self.close_connection = True
        else:
            self.reply(PICTURE, ETag='"new"')

    def answer_short(self) -> None:
        """Cut off without a length: only decoding shows it."""
        self.send_response(200)
        self.send_header("Connection", "close")
        self.end_headers()
        self.wfile.write(PICTURE[:1000])
        self.close_connection = True

    def answer_silent(self) -> None:
        time.sleep(3)

    def answer_slow(self) -> None:
        self.send_response(200)
        self.send_header("Content-Length", "100000")
        self.end_headers()
        for _ in range(30):
            self.wfile.write(b"x")
            self.wfile.flush()
            time.sleep(0.1)

    def answer_film(self) -> None:
        """Hours of it, at a good pace."""
        self.send_response(200)
        self.send_header("Connection", "close")
        self.end_headers()
        while True:
            self.wfile.write(bytes(10_000))
            time.sleep(0.02)

    def answer_endless(self) -> None:
        self.send_response(200)
        self.send_header("Connection", "close")
        self.end_headers()
        while True:
            self.wfile.write(bytes(100_000))

    def answer_moved(self) -> None:
        self.reply(b"", 302, Location="/good.jpg")

    def answer_hangup(self) -> None:
        self.close_connection = True


class QuietServer(http.server.ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: object, client_address: object) -> None:
        pass  # the client hung up, as it should


@pytest.fixture
def server() -> Iterator[str]:
    FaultyServer.requests.clear()
    FaultyServer.ranges.clear()
    with QuietServer(("127.0.0.1", 0), FaultyServer) as httpd:
        thread = threading.Thread(target=httpd.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{httpd.server_port}"
        httpd.shutdown()


LIMITS = Limits(retries=2, timeout=2.0, pause=0.01, max_bytes=2_000_000)


def test_every_fault(server: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    outcomes = {
        "good1": "", "good2": "", "moved": "", "flaky": "", "cut": "", "changed": "",
        "missing": "HTTP 404", "broken": "HTTP 500", "page": "web page", "short": "damaged", "silent": "no answer",
        "slow": "too slow", "endless": "goes on after", "hangup": "no answer",
    }  # fmt: skip
    path = tmp_path / "urls.txt"
    path.write_text("".join(f"{server}/{name}.jpg\tsub/{name}.jpg\n" for name in outcomes))
    folder = tmp_path / "images"
    with pytest.raises(InputError, match="8 of 14 files"):
        download_lists([path], folder, connections=14, limits=LIMITS)
    report = (folder / "failed.tsv").read_text()
    for name, reason in outcomes.items():
        target = folder / "sub" / f"{name}.jpg"
        if reason:
            assert not target.exists(), name
            lines = report.splitlines()
            line = lines[lines.index(f"{server}/{name}.jpg\tsub/{name}.jpg") - 1]
            assert reason in line, line
        else:
            assert target.read_bytes() == PICTURE, name
    requests = FaultyServer.requests
    assert requests["missing"] == 1 and requests["endless"] == 1, "no use in asking again"
    assert requests["broken"] == requests["silent"] == LIMITS.retries + 1
    assert requests["flaky"] == 3 and requests["cut"] == 2
    assert FaultyServer.ranges == ["bytes=1000-"]


def test_an_interruption_does_not_wait_for_files_under_way(server: str, tmp_path: Path) -> None:
    path = tmp_path / "urls.txt"
    path.write_text("".join(f"{server}/film{number}.bin\t{number}.bin\n" for number in range(3)))
    main_thread = threading.main_thread().ident
    assert main_thread
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # what started the tests may have it ignored
    threading.Timer(1.0, signal.pthread_kill, (main_thread, signal.SIGINT)).start()
    try:
        with pytest.raises(KeyboardInterrupt):
            download_lists([path], tmp_path / "films", connections=2, limits=Limits(max_bytes=2**40, max_seconds=10**6))
    finally:
        signal.signal(signal.SIGINT, before)
    assert not list((tmp_path / "films").glob("*.bin"))


def test_an_interruption_does_not_wait_for_a_silent_server(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        path = tmp_path / "urls.txt"
        path.write_text(f"http://127.0.0.1:{silent.getsockname()[1]}/1.jpg\n")
        argv = [sys.executable, "-m", "captioner.cli.download", str(path), "--folder", str(tmp_path / "images")]
        # What started the tests may have SIGINT ignored, and children would, too.
        start = "import signal, runpy; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        argv[1:3] = ["-c", start + "runpy.run_module('captioner.cli.download', run_name='__main__')"]
        process = subprocess.Popen(argv, cwd=Path(__file__).parents[1], stderr=subprocess.PIPE, text=True)
        connection, _ = silent.accept()
        with connection:
            process.send_signal(signal.SIGINT)
            _, err = process.communicate(timeout=20)  # the server may be silent for 30
    assert (process.returncode, err) == (130, "caption-download: interrupted\n")


def test_continued_and_repeated(server: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    path = tmp_path / "urls.txt"
    path.write_text(f"# pictures\n{server}/good1.jpg\n\n{server}/good2.jpg\n")
    assert main([str(path), "--folder", str(tmp_path / "images"), "--connections", "2"]) == 0
    assert "all 2 files" in capsys.readouterr().out
    asked = FaultyServer.requests.total()
    assert main([str(path), "--folder", str(tmp_path / "images")]) == 0
    assert FaultyServer.requests.total() == asked
    assert sorted(file.name for file in (tmp_path / "images").iterdir()) == ["good1.jpg", "good2.jpg"]


def test_checksums(server: str, tmp_path: Path) -> None:
    right = hashlib.sha256(PICTURE).hexdigest()
    path = tmp_path / "urls.txt"
    path.write_text(f"{server}/good1.jpg\ta.jpg\tsha256:{right}\n{server}/good2.jpg\tb.jpg\tmd5:{'0' * 32}\n")
    with pytest.raises(InputError, match="its md5 is"):
        download_lists([path], tmp_path / "images", limits=LIMITS)
    assert (tmp_path / "images" / "a.jpg").exists() and not (tmp_path / "images" / "b.jpg").exists()


@pytest.mark.parametrize(
    "line",
    [
        "file:///etc/passwd",
        "ftp://host/a.jpg",
        "not a url",
        "http://[::1/a.jpg",
        "http://host/a.jpg\t../../outside.jpg",
        "http://host/a.jpg\t/etc/a.jpg",
        "http://host/a.jpg\ta.jpg\tcrc:12",
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, line: str) -> None:
    path = tmp_path / "urls.txt"
    path.write_text(f"http://host/good.jpg\n{line}\n")
    with pytest.raises(InputError, match="line 2"):
        read_list(path)


def test_names_from_addresses(tmp_path: Path) -> None:
    path = tmp_path / "urls.txt"
    path.write_text("http://a/x/photo.jpg\nhttp://b/y/photo.jpg?size=2\nhttp://c/a%20b%2F..%2Fc.png\nhttp://d/\n")
    assert [item.path for item in read_list(path)] == ["photo.jpg", "photo_2.jpg", "a b_.._c.png", "index"]


def test_lists_become_folders_with_so_many_pictures(server: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """Dead links are replaced; repeating the command adds nothing; more can be asked for later."""
    for name, stems in {"hot_dog": ["missing1", "good1", "good2", "good3"], "cat": ["good4", "missing2"]}.items():
        (tmp_path / f"{name}.txt").write_text("".join(f"{server}/{stem}.jpg\n" for stem in stems))
    argv = [str(tmp_path / "hot_dog.txt"), str(tmp_path / "cat.txt"), "--folder", str(tmp_path / "images")]

    def there() -> list[str]:
        return sorted(path.relative_to(tmp_path / "images").as_posix() for path in (tmp_path / "images").glob("*/*"))

    assert main([*argv, "--only", "hot_dog", "--limit", "2", "--numbered", "1"]) == 0
    assert there() == ["hot_dog/000002.jpg", "hot_dog/000003.jpg"]
    assert "HTTP 404" in (tmp_path / "images" / "failed.tsv").read_text()
    assert "all 2 files" in capsys.readouterr().out
    asked = FaultyServer.requests.total()
    assert main([*argv, "--only", "hot_dog", "--limit", "2", "--numbered", "1"]) == 0
    assert FaultyServer.requests.total() == asked
    assert main([*argv, "--limit", "3", "--numbered", "1"]) == 1
    assert there() == ["cat/000001.jpg", *(f"hot_dog/00000{number}.jpg" for number in (2, 3, 4))]
    assert "missing2.jpg (HTTP 404" in capsys.readouterr().err
    assert main([*argv, "--only", "dog"]) == 1
    assert "--only dog: no such folder in the lists; expected cat, hot_dog" in capsys.readouterr().err


def test_files_of_others_stay(server: str, tmp_path: Path) -> None:
    (tmp_path / "urls.txt").write_text(f"{server}/good1.jpg\n")
    for name in ("failed.tsv", "good1.jpg.part"):
        (tmp_path / "images").mkdir(exist_ok=True)
        (tmp_path / "images" / name).write_text("mine")
        with pytest.raises(InputError, match=f"{name}.* is there already, but not from"):
            download_lists([tmp_path / "urls.txt"], tmp_path / "images", limits=LIMITS)
        assert (tmp_path / "images" / name).read_text() == "mine"
        (tmp_path / "images" / name).unlink()
