"""Shards on a Ray cluster of this machine: faults, the data path alone, and what the engine costs.

`python -m bench scale` runs all three in small sizes. The sizes of docs/scale.md:

    python -m bench.scale faults   --photos coco/ --side 64 --pictures 20000 --shards 40 --width 4
    python -m bench.scale data     --photos coco/ --pictures 1000000 --shards 200
    python -m bench.scale overhead --photos coco/ --pictures 5000 --shards 10 --model bundled
"""

import argparse
import contextlib
import functools
import io
import itertools
import json
import os
import re
import secrets
import signal
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from captioner.data.vocabulary import Vocab
from captioner.model.caption_model import CaptionModel
from captioner.model.checkpoint import Checkpoint, save_checkpoint
from captioner.model.config import ModelConfig
from captioner.scale.items import Item, Worker, read_items
from captioner.scale.ray_engine import run_on_ray
from captioner.scale.shard_results import ShardResults

Photo = bytes | Path
WORDS = ["a", "picture", "red", "green", "blue", "grey", "all", "is", "it", "UNK"]
_PER_TAR = 5000  # of the data path's archives: beyond it they are the same few under many names
_HOLDER = (
    "import ray, sys; ray.init(num_cpus=int(sys.argv[1]), include_dashboard=False, log_to_driver=False);"
    "print(ray.get_runtime_context().gcs_address, flush=True); sys.stdin.read()"
)


def run() -> None:
    """All of it, small."""
    with tempfile.TemporaryDirectory() as folder:
        photos = synthetic_photos(40)
        faults(photos, Path(folder, "faults"), pictures=200, shards=8, actors=2, width=24)
        data(photos, Path(folder, "data"), pictures=2000, shards=10)
        overhead(photos, Path(folder, "overhead"), pictures=200, shards=4, model=None)


def faults(
    photos: Sequence[Photo], folder: Path, *, pictures: int, shards: int, actors: int, width: int, kills: int = 3
) -> None:
    """Plain caption-eval; the same on a cluster whose workers are killed; the same with the driver killed.

    Prints what happened.

    Raises:
        AssertionError: a picture is missing, or there twice, or has another caption.
    """
    make_shards(photos, folder / "shards", pictures, shards)
    model = narrow_model(folder / "narrow.pt", width)
    argv = ["--model", str(model), "--precision", "fp32", "--gpuid", "-1"]
    started = time.monotonic()
    subprocess.run(caption_eval(folder / "shards", folder / "plain", *argv), check=True)
    print(f"plain caption-eval: {pictures} pictures in {time.monotonic() - started:.0f} s", flush=True)
    plain = rows_of(folder / "plain")
    with cluster(num_cpus=2 * actors) as address:
        on_ray = [*argv, "--engine", "ray", "--address", address, "--actors", str(actors)]
        started = time.monotonic()
        driver = subprocess.Popen(caption_eval(folder / "shards", folder / "killed_workers", *on_ray))
        for number in range(kills):
            # Each falls in another part of the run; the last one well before its end.
            wait_for(lambda number=number: len(results(folder / "killed_workers")) >= number * shards // 4, driver)
            wait_for(lambda: workers_of(address), driver)
            os.kill(victim := workers_of(address)[0], signal.SIGKILL)
            print(f"killed worker {victim} after {len(results(folder / 'killed_workers'))} shards", flush=True)
        assert driver.wait() == 0
        print(f"with {kills} workers killed: {time.monotonic() - started:.0f} s", flush=True)
        compare(plain, rows_of(folder / "killed_workers"), pictures)

        command = caption_eval(folder / "shards", folder / "killed_driver", *on_ray)
        driver = subprocess.Popen(command)
        wait_for(lambda: len(results(folder / "killed_driver")) >= max(1, shards // 4), driver)
        driver.kill()
        driver.wait()
        before = {path.name: path.stat().st_mtime_ns for path in results(folder / "killed_driver")}
        again = subprocess.run(command, stderr=subprocess.PIPE, text=True, check=False)
        assert again.returncode == 0, again.stderr
        assert f"{shards - len(before)} of {shards} shards are left" in again.stderr, again.stderr
        after = {path.name: path.stat().st_mtime_ns for path in results(folder / "killed_driver")}
        assert 0 < len(before) < shards and before.items() <= after.items()
        print(f"driver killed after {len(before)} shards: the same command did the other {shards - len(before)}")
        compare(plain, rows_of(folder / "killed_driver"), pictures)


def data(photos: Sequence[Photo], folder: Path, *, pictures: int, shards: int) -> None:
    """Reading, decoding, Ray and writing with nothing in the CNN's place; memory of driver and workers on the way."""
    per_shard = pictures // shards
    distinct = max(1, _PER_TAR // per_shard) if per_shard < _PER_TAR else 1
    make_shards(photos, folder / "tars", distinct * per_shard, distinct)
    tars = sorted((folder / "tars").iterdir())
    (folder / "shards").mkdir()
    for number in range(shards):
        os.link(tars[number % distinct], folder / "shards" / f"{number:05}.tar")
    names = [str(path) for path in sorted((folder / "shards").iterdir())]
    cpus = len(os.sched_getaffinity(0))
    sample = names[: max(2 * cpus, shards // 20)]
    started = time.monotonic()
    with ProcessPoolExecutor(cpus) as pool:
        done = sum(pool.map(_decode_only, sample))
    limit = done / (time.monotonic() - started)
    print(f"reading and decoding alone in {cpus} processes: {limit:.0f} pictures/s over {done}", flush=True)
    (folder / "out").mkdir()
    written = ShardResults(names, str(folder / "out"), "jsonl", {}, overwrite=False)
    read = functools.partial(read_items, image_mode="squash", num_workers=0)
    started = time.monotonic()
    with memory_watched() as samples:
        items = run_on_ray(
            names, written.left, read, _make_stand_in, address=None, batch_size=None, actors=None, gpus=False
        )
        tally = written.gather(items)
    seconds = time.monotonic() - started
    assert (tally.captioned, tally.shards) == (shards * per_shard, shards), tally
    rate = tally.captioned / seconds
    print(f"through Ray: {rate:.0f} pictures/s, {100 * rate / limit:.0f} % of it, with start-up ({seconds:.0f} s)")
    print("\n| done | driver, MiB | largest worker, MiB |\n|---|---|---|")
    for share in range(1, 11):
        driver, worker = samples[(len(samples) - 1) * share // 10]
        print(f"| {10 * share} % of the time | {driver:.0f} | {worker:.0f} |")


def overhead(
    photos: Sequence[Photo], folder: Path, *, pictures: int, shards: int, model: str | None, turns: int = 2
) -> None:
    """`--engine ray` against plain caption-eval, each with its start-up, by turns."""
    make_shards(photos, folder / "shards", pictures, shards)
    chosen = [] if model == "bundled" else ["--model", model or str(narrow_model(folder / "narrow.pt", 24))]
    seconds: dict[str, list[float]] = {"local": [], "ray": []}
    for turn, engine in itertools.product(range(turns), seconds):
        started = time.monotonic()
        command = caption_eval(folder / "shards", folder / f"{engine}{turn}", *chosen, "--engine", engine)
        subprocess.run(command, check=True)
        seconds[engine].append(time.monotonic() - started)
        print(f"{engine}: {seconds[engine][-1]:.1f} s for {pictures} pictures", flush=True)
    compare(rows_of(folder / "local0"), rows_of(folder / "ray0"), pictures)
    print(f"overhead: {100 * (min(seconds['ray']) / min(seconds['local']) - 1):.1f} %")


# What they are made of


def shrunk(paths: Sequence[Path], side: int) -> list[bytes]:
    """JPEGs of photos whose longer side has so many pixels: real ones that take little time to decode."""
    found = []
    for path in paths:
        with Image.open(path) as photo:
            photo.thumbnail((side, side))
            target = io.BytesIO()
            photo.convert("RGB").save(target, "JPEG", quality=90)
        found.append(target.getvalue())
    return found


def content_of(photo: Photo) -> bytes:
    return photo if isinstance(photo, bytes) else photo.read_bytes()


def synthetic_photos(count: int) -> list[bytes]:
    """JPEGs of smooth colours, 480×360."""
    found = []
    for number in range(count):
        colours = np.random.default_rng(number).integers(0, 256, size=(3, 4, 3), dtype=np.uint8)
        target = io.BytesIO()
        Image.fromarray(colours).resize((480, 360), Image.Resampling.BICUBIC).save(target, "JPEG")
        found.append(target.getvalue())
    return found


def make_shards(photos: Sequence[Photo], folder: Path, pictures: int, shards: int) -> None:
    """Tar archives with that many pictures in all, taken in turn; members have keys of their own."""
    folder.mkdir(parents=True)
    bounds = [pictures * number // shards for number in range(shards + 1)]
    for number, (first, end) in enumerate(itertools.pairwise(bounds)):
        with tarfile.open(folder / f"{number:05}.tar", "w") as archive:
            for key in range(first, end):
                content = content_of(photos[key % len(photos)])
                member = tarfile.TarInfo(f"{key:09}.jpg")
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))


def narrow_model(path: Path, width: int) -> Path:
    """A model file with random weights whose captions depend on the picture."""
    config = ModelConfig(
        vocab_size=len(WORDS),
        encoding_size=16,
        rnn_size=24,
        cnn_layer="pool5",
        conv_widths=(width,) * 13,
        fc_width=1,
    )
    torch.manual_seed(23)
    net = CaptionModel(config)
    with torch.no_grad():
        convolutions = [layer for layer in net.encoder.features if isinstance(layer, torch.nn.Conv2d)]
        for layer in convolutions:  # He's scale: else the signal fades away layer by layer
            layer.weight.normal_(0, (2 / layer.weight[0].numel()) ** 0.5)
            layer.bias.zero_()
        convolutions[-1].weight *= 0.03
        net.decoder.output.weight *= 12
        net.decoder.embedding.weight *= 0.3
        net.encoder.embed.weight *= 4
    save_checkpoint(path, Checkpoint(config, Vocab(WORDS), net.state_dict(), decoding={"suppress_unk": 1}))
    return path


def caption_eval(shards: Path, output_dir: Path, *argv: str) -> list[str]:
    return [sys.executable, "-m", "captioner.cli.eval", str(shards), "--output_dir", str(output_dir), *argv]


def results(folder: Path) -> list[Path]:
    return sorted(folder.glob("[0-9]*.jsonl"))


def rows_of(folder: Path) -> list[dict]:
    return [json.loads(line) for path in results(folder) for line in path.read_text("utf-8").splitlines()]


def compare(plain: list[dict], found: list[dict], pictures: int) -> None:
    """Every picture once, with the same caption and, to rounding, the same log-probabilities.

    Pictures share batches with others in other runs, so that sums are rounded otherwise: where two beams are equally
    likely to the last bits another one may go on. More than one of a thousand would be something else.
    """
    assert len(plain) == pictures == len({row["image_id"] for row in plain})
    assert [row["image_id"] for row in found] == [row["image_id"] for row in plain]
    pairs = list(zip(plain, found, strict=True))
    same = [(one, two) for one, two in pairs if one["caption"] == two["caption"]]
    largest = max(abs(one["logprob"] - two["logprob"]) for one, two in same)
    differing = len(pairs) - len(same)
    print(f"every picture once; {differing} captions differ; largest difference of log p {largest:.1e}", flush=True)
    assert differing <= pictures / 1000 and largest < 1e-3
    assert len({row["caption"] for row in plain}) > 3


@contextlib.contextmanager
def cluster(num_cpus: int) -> Iterator[str]:
    """A Ray cluster of this machine that says it has so many CPUs; its address."""
    # Who knows the token may connect: what this process starts from now on.
    os.environ |= {"RAY_USAGE_STATS_ENABLED": "0", "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(16)}
    command = [sys.executable, "-c", _HOLDER, str(num_cpus)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdin and holder.stdout
        try:
            found = next((line.strip() for line in holder.stdout if re.fullmatch(r"\S+:\d+\n", line)), None)
            assert found, "Ray did not start: see above"
            yield found
        finally:
            holder.stdin.close()


def workers_of(address: str) -> list[int]:
    """The processes of this cluster that caption at the moment."""
    found = []
    for status in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError, StopIteration):
            if status.read_bytes().startswith(b"ray::MapWorker"):
                lines = status.with_name("status").read_text().splitlines()
                raylet = next(line.split()[1] for line in lines if line.startswith("PPid:"))
                if address.encode() in Path("/proc", raylet, "cmdline").read_bytes():
                    found.append(int(status.parent.name))
    return found


def wait_for(condition: Callable[[], object], process: subprocess.Popen) -> None:
    while not condition():
        assert process.poll() is None, "the run ended before"
        time.sleep(0.1)


def _decode_only(path: str) -> int:
    return sum(not item.end for item in read_items(0, path, "squash", 0))


def _make_stand_in(device: str, num_threads: int) -> Worker:
    return functools.partial(map, _stand_in)


def _stand_in(items: Sequence[Item]) -> list[Item]:
    """In the CNN's place: looks at a pixel, and writes a row of the usual length."""
    done = []
    for item in items:
        if item.pixels is not None:
            row = json.dumps({"image_id": item.id, "pixel": int(item.pixels[0, 0, 0]), "filler": "x" * 900})
            item = replace(item, pixels=None, row=row)
        done.append(item)
    return done


@contextlib.contextmanager
def memory_watched() -> Iterator[list[tuple[float, float]]]:
    """Private memory of this process, and of the largest of Ray's workers, in MiB every second."""
    samples: list[tuple[float, float]] = []
    done = threading.Event()

    def watch() -> None:
        while not done.wait(1.0):
            workers = [
                path.parent for path in Path("/proc").glob("[0-9]*/cmdline") if _first_bytes(path).startswith(b"ray::")
            ]
            samples.append((_private(Path("/proc/self")), max(map(_private, workers), default=0.0)))

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield samples
    finally:
        done.set()
        thread.join()


def _first_bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()[:64]
    except OSError:  # it has ended
        return b""


def _private(process: Path) -> float:
    """Resident memory less what is shared, as Ray's object store is."""
    try:
        _, resident, shared, *_ = map(int, (process / "statm").read_text().split())
    except OSError:
        return 0.0
    return (resident - shared) * os.sysconf("SC_PAGE_SIZE") / 2**20


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.scale", description=__doc__)
    parser.add_argument("what", choices=("faults", "data", "overhead"))
    parser.add_argument("--photos", help="folder of JPEGs; default: synthetic ones")
    parser.add_argument("--side", type=int, help="shrink them to so many pixels first")
    parser.add_argument("--pictures", type=int, default=200)
    parser.add_argument("--shards", type=int, default=8)
    parser.add_argument("--actors", type=int, default=2)
    parser.add_argument("--width", type=int, default=24, help="channels of the narrow model")
    parser.add_argument("--model", help="of overhead: a file, or bundled (default: a narrow one)")
    parser.add_argument("--turns", type=int, default=2, help="of overhead: how often each runs")
    parser.add_argument("--folder", help="where shards and results go and stay (default: a temporary folder)")
    opt = parser.parse_args()
    photos = sorted(Path(opt.photos).glob("*.jpg"))[: opt.pictures] if opt.photos else synthetic_photos(40)
    if opt.photos and opt.side:
        photos = shrunk(photos, opt.side)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(opt.folder or temporary, opt.what)
        sizes = {"pictures": opt.pictures, "shards": opt.shards}
        if opt.what == "faults":
            faults(photos, folder, **sizes, actors=opt.actors, width=opt.width)
        elif opt.what == "data":
            data(photos, folder, **sizes)
        else:
            overhead(photos, folder, **sizes, model=opt.model, turns=opt.turns)


if __name__ == "__main__":
    main()
