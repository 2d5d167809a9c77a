"""caption-serve under 16 parallel clients for a minute, against caption-eval on the same photos, in one run.

Then its memory over 10,000 requests, with a model so small that they take a minute or two: what grows with requests
grows there, too. All traffic stays on 127.0.0.1.
"""

import concurrent.futures
import contextlib
import http.client
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from bench.eval import make_photos
from captioner.data.vocabulary import Vocab
from captioner.model.caption_model import CaptionModel
from captioner.model.checkpoint import save_checkpoint
from captioner.model.checkpoint_content import Checkpoint
from captioner.model.config import ModelConfig

CLIENTS = 16
SECONDS = 60
EVAL_PHOTOS = 96
NUM_REQUESTS = 10_000
MACHINE = ["--gpuid", "-1"]
BEAMS = 2


def run() -> None:
    """Print throughput, latencies and memory as a Markdown table."""
    with tempfile.TemporaryDirectory() as name:
        photos = Path(name) / "photos"
        photos.mkdir()
        make_photos(photos)
        for unused in sorted(photos.iterdir())[EVAL_PHOTOS:]:
            unused.unlink()
        bodies = [path.read_bytes() for path in sorted(photos.iterdir())]
        eval_rate = _eval_rate(photos)
        with _service() as port:
            _clients(port, bodies, lambda done, began: done >= 2 * CLIENTS)  # all processes have started
            before = _resident_bytes(port)
            latencies, seconds = _clients(port, bodies, lambda done, began: time.perf_counter() - began > SECONDS)
            after = _resident_bytes(port)
        rate = len(latencies) / seconds
        cuts = statistics.quantiles(latencies, n=100)
        print("| what | value |\n|---|---|")
        print(f"| caption-eval after its first batch, pictures/s | {eval_rate:.2f} |")
        print(f"| caption-serve, {CLIENTS} clients for {SECONDS} s, pictures/s; no error | {rate:.2f} |")
        print(f"| ratio (target 0.9) | {rate / eval_rate:.2f} |")
        for percent in (50, 95, 99):
            print(f"| p{percent} of the answers, ms | {1000 * cuts[percent - 1]:.0f} |")
        print(f"| memory of the service before and after, MB | {before / 1e6:.0f}, {after / 1e6:.0f} |", flush=True)
        model = Path(name) / "tiny.pt"
        _write_tiny_model(model)
        with _service("--model", str(model)) as port:
            sizes = []
            for part in (0.1, 0.5, 1.0):
                left = part * NUM_REQUESTS - sum(count for count, _ in sizes)
                _clients(port, bodies, lambda done, began, left=left: done >= left)  # type: ignore[misc]
                sizes.append((round(left), _resident_bytes(port)))
        for (_, size), part in zip(sizes, ("a tenth", "half", "all"), strict=True):
            print(f"| tiny model: memory after {part} of {NUM_REQUESTS:,} requests, MB | {size / 1e6:.1f} |")


@contextlib.contextmanager
def _service(*options: str) -> Iterator[int]:
    """The port of a running caption-serve."""
    command = [sys.executable, "-m", "captioner.cli.serve", "--port", "0", *MACHINE, *options]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        try:
            assert server.stdout
            yield int(re.findall(r":(\d+)/", server.stdout.readline())[0])
        finally:
            server.terminate()


def _write_tiny_model(path: Path) -> None:
    vocab = Vocab([f"word{number}" for number in range(50)])
    config = ModelConfig(
        vocab_size=50, encoding_size=16, rnn_size=16, cnn_layer="pool5", conv_widths=(2,) * 13, fc_width=1
    )
    save_checkpoint(path, Checkpoint(config, vocab, CaptionModel(config).state_dict()))


def _eval_rate(photos: Path) -> float:
    command = [sys.executable, "-m", "captioner.cli.eval", "--image_folder", str(photos), "--vis_dir", "", *MACHINE]
    command += ["--beam_size", str(BEAMS), "--batch_size", "8"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        assert process.stdout
        process.stdout.readline()
        first = time.perf_counter()
        rest = sum(1 for _ in process.stdout)
        seconds = time.perf_counter() - first
    assert rest == EVAL_PHOTOS - 1
    return (EVAL_PHOTOS - 8) / seconds  # the first batch came at once


def _clients(port: int, bodies: list[bytes], enough: Callable[[int, float], bool]) -> tuple[list[float], float]:
    """Seconds of each answer, and of all together; any answer other than 200 is an error."""
    latencies: list[float] = []
    began = time.perf_counter()

    def client(number: int) -> None:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=120)
        while not enough(len(latencies), began):
            asked = time.perf_counter()
            body = bodies[(number * 17 + len(latencies)) % len(bodies)]
            connection.request("POST", f"/v1/captions?beam_size={BEAMS}", body, {"Content-Type": "image/jpeg"})
            answer = connection.getresponse()
            answer.read()
            if answer.status != 200:
                raise RuntimeError(f"the service answered {answer.status}")
            latencies.append(time.perf_counter() - asked)
        connection.close()

    with concurrent.futures.ThreadPoolExecutor(CLIENTS) as pool:
        list(pool.map(client, range(CLIENTS)))
    return latencies, time.perf_counter() - began


def _resident_bytes(port: int) -> float:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=120)
    connection.request("GET", "/metrics")
    text = connection.getresponse().read().decode()
    connection.close()
    return float(re.findall(r"^process_resident_memory_bytes (\S+)$", text, re.MULTILINE)[0])
