"""Commands whose output goes nowhere, to a full disk or to a terminal that control characters would move; interrupted
ones."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from captioner.errors import InputError, printable

NASTY = "two\nlines \x1b[31mred\x1b[0m \u202eturned \udcff bytes 照片 👨‍👩‍👧"
SHOWN = r"two\nlines \x1b[31mred\x1b[0m \u202eturned \udcff bytes 照片 👨‍👩‍👧"


def python(code: str, **kwargs: object) -> subprocess.CompletedProcess:
    program = "import logging, sys\nfrom captioner.cli.options import run\n" + code
    return subprocess.run([sys.executable, "-c", program], cwd=Path(__file__).parents[1], timeout=60, **kwargs)


PRINT = """
def body():
    logging.getLogger("x").info("photo %s", "a\\nb\\udcff")
    for i in range(20000):
        print("image", i, "caf\\u00e9 \\x1b[31m \\udcff")
sys.exit(run("caption-x", body))
"""


def test_control_characters_are_escaped():
    assert printable(NASTY) == SHOWN
    assert str(InputError(f"{NASTY}: no such file")) == SHOWN.replace(r"\n", " ") + ": no such file"


def test_a_value_of_megabytes_does_not_fill_the_screen():
    told = str(InputError(f"--query {'x' * 10**7}: means nothing", remedy="say it in other words"))
    assert len(told) < 5000 and told.startswith("--query xx") and told.endswith("means nothing; say it in other words")
    path = "/".join(["x" * 200] * 19)  # the longest that there are stay whole
    assert path in str(InputError(f"{path}: is empty"))


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_any_encoding_takes_any_text(encoding):
    done = python(PRINT, env={**os.environ, "PYTHONIOENCODING": encoding, "PYTHONUTF8": "0"}, capture_output=True)
    assert done.returncode == 0, done.stderr
    assert done.stderr == rb"photo a\nb\udcff" + b"\n"
    first = done.stdout.split(b"\n")[0]
    assert (
        first.replace(b"\xc3\xa9", b"\xe9").replace(rb"\xe9", b"\xe9")
        == rb"image 0 caf" + b"\xe9" + rb" \x1b[31m \udcff"
    )


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs Linux's /dev/full")
def test_a_full_disk_behind_stdout_is_one_line():
    with open("/dev/full", "wb") as full:
        done = python(PRINT.replace("20000", "1"), stdout=full, stderr=subprocess.PIPE)
        assert done.returncode == 1
        lines = done.stderr.decode().splitlines()
        assert lines[1:] == [
            "caption-x: error: the output stream cannot be written (No space left on device); "
            "check where the output goes"
        ]
        quiet = python(PRINT, stdout=subprocess.DEVNULL, stderr=full)
        assert quiet.returncode == 0  # what is only told need not be heard


@pytest.mark.parametrize("closed", [">&-", "2>&-", "<&-", ">&- 2>&- <&-"])
def test_closed_streams_swallow_what_they_get(closed, tmp_path):
    code = PRINT.replace("def body():", f"def body():\n    file = open({str(tmp_path / 'result')!r}, 'w')")
    program = "import logging, sys\nfrom captioner.cli.options import run\n" + code
    done = subprocess.run(
        ["sh", "-c", f'"$0" -c "$1" {closed}', sys.executable, program],
        cwd=Path(__file__).parents[1],
        capture_output=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    assert b"Traceback" not in done.stderr
    assert (tmp_path / "result").read_bytes() == b""  # opened in place of a closed stream it would hold the output


def test_a_reader_that_has_seen_enough():
    program = "import logging, sys\nfrom captioner.cli.options import run\n" + PRINT
    line = '"$0" -c "$1" 2>err | head -n 1; echo $?'
    done = subprocess.run(
        ["sh", "-c", line.replace("2>err", "2>&1"), sys.executable, program],
        cwd=Path(__file__).parents[1],
        capture_output=True,
        timeout=60,
    )
    assert b"Traceback" not in done.stdout + done.stderr


@pytest.mark.parametrize(
    "error",
    [
        "OSError(5, 'Input/output error', 'photo.jpg')",
        "MemoryError()",
        "ImportError('libtorch_cpu.so: failed to map segment from shared object')",
    ],
)
def test_what_the_system_refuses_is_one_line(error):
    done = python(f"def body(): raise {error}\nsys.exit(run('caption-x', body))", capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.startswith("caption-x: error: ") and done.stderr.count("\n") == 1


INTERRUPTED = """
import importlib, os, signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # what started the tests may have it ignored
class Interrupt:
    def find_spec(self, name, *_):
        if name == AT:
            os.kill(os.getpid(), signal.SIGINT)
sys.argv = [NAME, "--input_h5", "no.h5", "--input_json", "no.json"]
sys.meta_path.insert(0, Interrupt())
from captioner.cli.train import main
sys.exit(main())
"""


@pytest.mark.parametrize(
    ("module", "name", "told"),
    [
        ("captioner.cli.options", "/usr/bin/caption-train", "caption-train"),
        ("captioner.cli.options", "/lib/captioner/__main__.py", "captioner"),
        ("captioner.training.presets", "caption-train", "caption-train"),
        ("torch", "caption-train", "caption-train"),
        ("numpy.linalg", "-m", "caption-train"),
    ],
)
def test_an_interruption_while_modules_are_imported_is_130_and_one_line(module, name, told):
    code = INTERRUPTED.replace("AT", repr(module)).replace("NAME", repr(name))
    done = subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[1], capture_output=True, text=True)
    assert done.returncode == 130
    assert done.stderr == f"{told}: interrupted\n"


WITHIN_C = """
import os, signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)
from captioner.cli.options import run
def body():
    try:
        os.kill(os.getpid(), signal.SIGINT)
    except KeyboardInterrupt as error:  # as NumPy does while it is imported
        raise ImportError("IMPORTANT:\\n\\nPLEASE READ THIS") from error
assert run("caption-x", lambda: None) == 0
code = run("caption-x", body)
assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
sys.exit(code)
"""


def test_an_interruption_that_a_module_in_c_turns_into_another_exception():
    done = subprocess.run([sys.executable, "-c", WITHIN_C], cwd=Path(__file__).parents[1], capture_output=True)
    assert (done.returncode, done.stderr) == (130, b"caption-x: interrupted\n")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs Linux's /dev/full")
@pytest.mark.parametrize("arguments", [["eval", "--help"], ["score", "--version"], ["--help"]])
def test_help_goes_where_results_go(arguments):
    argv = [sys.executable, "-m", "captioner", *arguments]
    options = {"cwd": Path(__file__).parents[1], "timeout": 60, "stderr": subprocess.PIPE}
    with open("/dev/full", "wb") as full:
        done = subprocess.run(argv, stdout=full, **options)
    assert done.returncode == 1 and done.stderr.count(b"\n") == 1, done.stderr
    assert b"error: the output stream cannot be written" in done.stderr
    ascii_only = {**os.environ, "PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"}
    done = subprocess.run(argv, stdout=subprocess.PIPE, env=ascii_only, **options)
    assert done.returncode == 0 and done.stdout.isascii() and not done.stderr
    closed = subprocess.run(["sh", "-c", '"$@" >&-', "sh", *argv], **options)
    assert closed.returncode == 0 and not closed.stderr


ASKED = {
    "eval": "x.jpg",
    "train": "",
    "prepro": "--input_json x --num_val 1 --output_h5 x.h5 --output_json y",
    "convert": "x.t7 --output y.pt",
    "score": "--predictions x --references y",
    "video": "--input x.mp4",
    "serve": "",
    "download": "x.txt",
    "sweep": "--ranges x.toml --folder y",
}


@pytest.mark.parametrize("command", ASKED)
def test_a_working_directory_that_was_removed_is_one_line(command, tmp_path):
    """Libraries of mathematics would end the process in their own words."""
    (tmp_path / "gone").mkdir()
    argv = [sys.executable, "-m", f"captioner.cli.{command}", *ASKED[command].split()]
    program = "import os, sys; os.chdir(sys.argv[1]); os.rmdir(sys.argv[1]); os.execv(sys.argv[2], sys.argv[2:])"
    here = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    start = [sys.executable, "-c", program, str(tmp_path / "gone"), *argv]
    done = subprocess.run(start, env=here, capture_output=True, text=True, timeout=60)
    told = f"caption-{command}: error: the working directory has been removed; change to one that is there\n"
    assert (done.returncode, done.stderr) == (1, told)
