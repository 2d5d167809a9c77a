"""caption-serve under 16 parallel clients for a minute, against caption-eval on the same photos, in one run.

Then its memory over 10,000 requests. All traffic stays on 127.0.0.1.
"""

import concurrent.futures
import http.client
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from bench.eval import NUM_PHOTOS, make_photos

CLIENTS = 16
SECONDS = 60
NUM_REQUESTS = 10_000
MACHINE = ["--gpuid", "-1"]


def run() -> None:
    """Print throughput, latencies and memory as a Markdown table."""
    with tempfile.TemporaryDirectory() as folder:
        photos = Path(folder) / "photos"
        photos.mkdir()
        make_photos(photos)
        bodies = [path.read_bytes() for path in sorted(photos.iterdir())]
        eval_rate = _eval_rate(photos)
        command = [sys.executable, "-m", "captioner.cli.serve", "--port", "0", *MACHINE]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
            try:
                assert server.stdout
                port = int(re.findall(r":(\d+)/", server.stdout.readline())[0])
                _clients(port, bodies, lambda done, began: done >= 2 * CLIENTS)  # all processes have started
                began_bytes = _resident_bytes(port)
                latencies, seconds = _clients(port, bodies, lambda done, began: time.perf_counter() - began > SECONDS)
                after_minute = _resident_bytes(port)
                _clients(port, bodies, lambda done, began: done >= NUM_REQUESTS)
                after_all = _resident_bytes(port)
            finally:
                server.terminate()
        rate = len(latencies) / seconds
        cuts = statistics.quantiles(latencies, n=100)
        print("| what | value |\n|---|---|")
        print(f"| caption-eval after its first batch, pictures/s | {eval_rate:.2f} |")
        print(f"| caption-serve, {CLIENTS} clients, pictures/s | {rate:.2f} |")
        print(f"| ratio | {rate / eval_rate:.2f} |")
        for percent in (50, 95, 99):
            print(f"| p{percent} of the answers, ms | {1000 * cuts[percent - 1]:.0f} |")
        for name, size in (("at first", began_bytes), ("after a minute", after_minute), ("at the end", after_all)):
            print(f"| memory of the service {name}, MB | {size / 1e6:.0f} |")
        print(f"| requests between the last two | {NUM_REQUESTS} |")


def _eval_rate(photos: Path) -> float:
    command = [sys.executable, "-m", "captioner.cli.eval", "--image_folder", str(photos), "--vis_dir", "", *MACHINE]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        assert process.stdout
        process.stdout.readline()
        first = time.perf_counter()
        rest = sum(1 for _ in process.stdout)
        seconds = time.perf_counter() - first
    assert rest == NUM_PHOTOS - 1
    return (NUM_PHOTOS - 8) / seconds  # the first batch came at once


def _clients(port: int, bodies: list[bytes], enough: Callable[[int, float], bool]) -> tuple[list[float], float]:
    """Seconds of each answer, and of all together; any answer other than 200 is an error."""
    latencies: list[float] = []
    began = time.perf_counter()

    def client(number: int) -> None:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=120)
        while not enough(len(latencies), began):
            asked = time.perf_counter()
            body = bodies[(number * 17 + len(latencies)) % len(bodies)]
            connection.request("POST", "/v1/captions", body, {"Content-Type": "image/jpeg"})
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
