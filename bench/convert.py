"""Converting full-width VGG16 files: seconds, and the most memory the process held, against the file's size.

Linux only: memory is read from /proc.
"""

import importlib
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
RUNS = 5
# VmHWM of a process of its own; ru_maxrss would count the parent's memory, inherited through fork.
PEAK = "print(re.search(r'VmHWM:\\s+(\\d+)', open('/proc/self/status').read())[1])"
CHILD = f"""
import re, sys
from captioner.cli.convert import main
assert main([sys.argv[1], "--output", sys.argv[2]]) == 0
{PEAK}
"""
IMPORTS = f"import re, torch, captioner.convert.neuraltalk2; {PEAK}"


def run() -> None:
    """Print the table; about 2 GB of temporary files."""
    from captioner.model.encoder import VGG16_FC_WIDTH, VGG16_WIDTHS

    sys.path.insert(0, str(ROOT / "tests"))
    torch7 = importlib.import_module("torch7_writer")
    caffe = importlib.import_module("caffe_writer")
    widths = {"conv_widths": VGG16_WIDTHS, "fc_width": VGG16_FC_WIDTH, "encoding_size": 512, "rnn_size": 512}
    print("| file | MB | seconds (min-max) | copying it (s) | peak MB | peak / file |")
    print("|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        source, output = Path(folder) / "model.t7", Path(folder) / "out.pt"
        for label, options in (("t7, nn, Float", {}), ("t7, cudnn, Cuda", {"kind": "Cuda", "backend": "cudnn"})):
            source.write_bytes(torch7.dumps(torch7.checkpoint(**widths, words=9000, **options)[0]))
            _row(label, source, output)
        source = Path(folder) / "vgg16.caffemodel"
        source.write_bytes(caffe.written(caffe.net(VGG16_WIDTHS, VGG16_FC_WIDTH), old=True))
        _row("caffemodel, V1", source, output)
    print(f"\nThe imports alone hold {_measure([sys.executable, '-c', IMPORTS])[1]:.0f} MB.")


def _row(label: str, source: Path, output: Path) -> None:
    size = source.stat().st_size / 1e6
    seconds, peaks, copies = [], [], []
    for _ in range(RUNS):
        started = time.perf_counter()
        output.write_bytes(source.read_bytes())
        copies.append(time.perf_counter() - started)
        output.unlink()
        taken, peak = _measure([sys.executable, "-c", CHILD, str(source), str(output)])
        seconds.append(taken)
        peaks.append(peak)
    print(
        f"| {label} | {size:.0f} | {statistics.median(seconds):.1f} ({min(seconds):.1f}-{max(seconds):.1f}) "
        f"| {statistics.median(copies):.1f} | {max(peaks):.0f} | {max(peaks) / size:.2f} |",
        flush=True,
    )


def _measure(command: list[str]) -> tuple[float, float]:
    started = time.perf_counter()
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    return time.perf_counter() - started, int(done.stdout.splitlines()[-1]) * 1024 / 1e6
