"""Mutation fuzzing of every reader of files but the two of fuzz_readers.py: damage gives InputError, or is read.

    PYTHONPATH=. python tests/fuzz_files.py --files 60000 --seed 1

Files are small valid ones with one to four mutations of their bytes, or, where a file is a table of values, with one to
three values replaced by odd ones. A reader may return, or raise InputError. Anything else, more than ten seconds of
computing, or 2 GB more memory is a defect; the file stays in the folder that is named then.
"""

import argparse
import contextlib
import faulthandler
import io
import json
import logging
import math
import random
import resource
import signal
import sys
import tarfile
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import torch
from fuzz_archives import archive_targets
from fuzz_damage import Target, as_json, by_bytes, by_values
from fuzz_readers import corpus, mutate
from hostile import encoded, photo

from captioner.convert.torch7 import parse_torch7
from captioner.convert.torch7_listing import listing
from captioner.convert.torchvision import read_cnn_weights
from captioner.data.build import PartialPixels
from captioner.data.checked_rows import check_sums, row_type
from captioner.data.dataset import Dataset
from captioner.data.images import read_image
from captioner.data.records import known_captions
from captioner.data.tar_files import list_members, read_member
from captioner.data.vocabulary import Vocab
from captioner.errors import InputError
from captioner.inference.load import _stored_ranges, _sum_of
from captioner.inference.sources import open_coco_list, open_split
from captioner.metrics.pairing import read_predictions, read_references
from captioner.model.caption_model import CaptionModel, build_model
from captioner.model.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from captioner.model.checkpoint_fields import weights_digest
from captioner.model.config import ModelConfig
from captioner.model.encoder import Encoder
from captioner.output.comparison import _pictures
from captioner.output.manifest import Manifest
from captioner.output.results import Journal
from captioner.runtime.locks import sole_run
from captioner.sweep.study import read_ranges
from captioner.training.feature_cache import open_cache
from captioner.training.resume import ResumeState, load_resume_state, save_resume_state

SECONDS = 10.0
MEMORY = 2 * 2**30
CONFIG = ModelConfig(vocab_size=3, encoding_size=4, rnn_size=4, cnn_layer="pool5", conv_widths=(2,) * 13, fc_width=1)


def as_pt(value: Any) -> bytes:
    """As torch.save; half of the files vouch for their weights anew, so that what comes after the digest is read."""
    if isinstance(value, dict) and "weights_digest" in value and len(repr(value.get("opt"))) % 2:
        with contextlib.suppress(Exception):
            value["weights_digest"] = weights_digest(value["state_dict"])
    stream = io.BytesIO()
    torch.save(value, stream)
    return stream.getvalue()


def targets(folder: Path) -> list[Target]:
    """All readers; `folder` holds the sound files that they need besides."""
    torch.manual_seed(0)
    model = CaptionModel(CONFIG)
    state, scales = model.state_dict(), {"ranges": [1.5] * 12, "sum": _sum_of([1.5] * 12)}
    checkpoint = Checkpoint(CONFIG, Vocab(["a", "dog", "UNK"]), state, decoding={"suppress_unk": 1})
    checkpoint.history.loss_history = {0: 2.5}
    checkpoint.history.val_lang_stats_history = {0: {"CIDEr": 0.5}}
    models = []
    for dtype in ("float32", "float16", "int8"):
        save_checkpoint(folder / "sound.pt", checkpoint, dtype)
        models.append((folder / "sound.pt").read_bytes())
    save_resume_state(folder / "resume.pt", ResumeState(checkpoint, {"pieces": [1, 1], "lm": {"state": {}}}, 2.5))
    resume = (folder / "resume.pt").read_bytes()
    cnn = as_pt({k: v for k, v in Encoder("pool5", (2,) * 13).state_dict().items() if k.startswith("features.")})
    plain, resumable = (torch.load(io.BytesIO(data), weights_only=True) for data in (models[0], resume))

    h5 = _h5(folder / "data.h5")
    described = {
        "ix_to_word": {"1": "a", "2": "dog", "3": "UNK"},
        "images": [{"split": "val", "file_path": "a.jpg", "id": 1, "captions": ["a dog"], "source": "x"}],
        "tokenizer": "ascii",
        "image_mode": "squash",
        "fingerprint": "f",
    }
    (folder / "data.json").write_bytes(as_json(described))

    def dataset(h5_path: Path, json_path: Path) -> None:
        opened = Dataset.open(h5_path, json_path)
        np.asarray(opened.images[0])
        split = open_split(opened, "val", "", -1)
        split.references(), split.identity(), list(split.info())

    rows = [{"image_id": 1, "file_name": "a.jpg", "caption": "a dog", "logprob": -1.5, "confidence": 0.5}]
    journal = b"".join(
        line + b"\n"
        for line in map(as_json, ({"run": "r"}, {"row": rows[0]}, {"num_done": 1, "totals": {"loss_sum": 1.5}}))
    )

    def read_journal(path: Path) -> None:
        opened = Journal(path, "r", True)
        list(opened.rows())
        opened.close()

    paths = [str(folder / name) for name in ("a.png", "b.png")]
    Path(paths[0]).write_bytes(encoded(photo(16, 12), "PNG"))
    with PartialPixels(folder / "part.h5", paths) as partial:
        partial.add(np.zeros((3, 256, 256), np.uint8))
        partial.add("is damaged")
        partial.sync()
    pixels, preparation = partial.pixels_path.read_bytes(), partial.journal_path.read_bytes()

    def read_preparation(path: Path) -> None:
        path.with_name("p.h5.partial").write_bytes(pixels)
        path.rename(path.with_name("p.h5.journal"))
        PartialPixels(path.with_name("p.h5"), paths).close()

    lists = {
        "json": as_json([{"file_path": "a.jpg", "id": 1, "split": "val", "captions": ["a dog", "b"]}]),
        "jsonl": b'{"image": "a.jpg", "caption": "a dog"}\n{"image": "b.jpg", "caption": "a cat"}\n',
        "coco": as_json(
            {"images": [{"id": 1, "file_name": "a.jpg"}], "annotations": [{"image_id": 1, "caption": "a"}]}
        ),
        "karpathy": as_json({"images": [{"filename": "a.jpg", "split": "val", "sentences": [{"raw": "a dog"}]}]}),
        "csv": b'image,caption\na.jpg,"a dog, black"\nb.jpg,a cat\n',
        "tsv": "\ufeffid\timage\tcaption\n1\ta.jpg\ta dog\n".encode("utf-16"),
        "token": b"a.jpg#0\ta dog\na.jpg#1\ta black dog\n",
        "labels": b"photos/a.jpg dog\nphotos/b.jpg cat\n",
    }

    def read_list(path: Path) -> None:
        for read in (read_predictions, read_references, lambda one: list(known_captions(one))):
            with contextlib.suppress(InputError):
                read(path)

    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as archive:
        for name, data in (
            ("0.png", Path(paths[0]).read_bytes()),
            ("0.txt", b"a dog"),
            ("1.json", b'{"caption": "a"}'),
        ):
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))

    def read_tar(path: Path) -> None:
        list(known_captions(path))
        with contextlib.suppress(OSError):  # as of any file; readers of pictures turn it into a line
            for name in list_members(str(path)):
                read_member(f"{path}/{name}", 10**6)

    features = io.BytesIO()
    cached = np.zeros((2, 1), row_type("f4", (4,)))
    cached["values"] = [[[1, 2, 3, 4]], [[5, 6, 7, 8]]]
    cached["sum"][:, 0] = check_sums(cached["values"][:, 0], [0, 1])
    np.save(features, cached)
    manifest = as_json(["vis.json", "5 ab"]) + b"\n" + as_json(["imgs/img1.jpg", None]) + b"\n"

    def read_manifest(path: Path) -> None:
        path.rename(path.with_name(".captioner-files"))
        Manifest(path.parent).is_ours("vis.json")

    lock = {"host": "h", "machine": "m", "process": 1, "started": 5, "since": "2020-01-01 00:00:00"}

    def read_lock(path: Path) -> None:
        with sole_run(path, "the folder"):
            pass

    ranges = b'[fixed]\ninput_h5 = "d.h5"\nrnn_size = 24\n[search]\n'
    ranges += b"learning_rate = {low = 1e-3, high = 0.1, log = true}\nbatch_size = [1, 2]\n"
    pictures = [
        encoded(photo(24, 18).convert(mode), kind)
        for kind, mode in {
            "PNG": "RGB",
            "JPEG": "L",
            "GIF": "P",
            "BMP": "RGB",
            "WEBP": "RGB",
            "TIFF": "RGB",
            "PPM": "RGB",
        }.items()
    ]
    torch7 = corpus()
    seeds = [seed for name in ("Torch7 binary", "Torch7 ascii") for seed in torch7[name][0]]

    def read_model(path: Path) -> None:
        build_model(load_checkpoint(path))

    return [
        Target("checkpoint", by_bytes(*models), read_model, ".pt"),
        Target("checkpoint, values", by_values(plain, as_pt), read_model, ".pt"),
        Target("resume state", by_bytes(resume), load_resume_state, ".pt"),
        Target("resume state, values", by_values(resumable, as_pt), load_resume_state, ".pt"),
        Target("CNN weights", by_bytes(cnn), lambda path: read_cnn_weights(str(path), "pool5"), ".pth"),
        Target("any .t7, listed", by_bytes(*seeds), lambda path: list(listing(parse_torch7(path.read_bytes(), "x")))),
        Target("dataset h5", _damaged_h5(h5), lambda path: dataset(path, folder / "data.json"), ".h5"),
        Target("dataset json", by_bytes(as_json(described)), lambda path: dataset(folder / "data.h5", path), ".json"),
        Target("dataset json, values", by_values(described, as_json), lambda path: dataset(folder / "data.h5", path)),
        Target("captions' journal", by_bytes(journal), read_journal),
        Target("preparation's journal", by_bytes(preparation), read_preparation),
        *(Target(f"list: {name}", by_bytes(data), read_list, f".{name}") for name, data in lists.items()),
        Target("list: json, values", by_values(json.loads(lists["json"]), as_json), read_list),
        Target("list: coco, values", by_values(json.loads(lists["coco"]), as_json), read_list),
        Target("list: karpathy, values", by_values(json.loads(lists["karpathy"]), as_json), read_list),
        Target(
            "COCO image list",
            by_values(json.loads(lists["coco"]), as_json),
            lambda path: open_coco_list(str(path), ".", -1),
        ),
        Target("tar", by_bytes(stream.getvalue()), read_tar, ".tar"),
        Target(
            "feature cache",
            by_bytes(features.getvalue()),
            lambda path: open_cache(path, (2, 1), row_type("f4", (4,)), 1).read(np.arange(2)),
            ".npy",
        ),
        Target("8-bit scales", by_bytes(as_json(scales)), lambda path: _stored_ranges(path, model)),
        Target("8-bit scales, values", by_values(scales, as_json), lambda path: _stored_ranges(path, model)),
        Target(
            "page's rows",
            by_values(rows, as_json),
            lambda path: _pictures(path.rename(path.with_name("vis.json")).parent),
        ),
        Target("manifest", by_bytes(manifest), read_manifest),
        Target("lock", by_bytes(as_json(lock)), read_lock),
        Target("lock, values", by_values(lock, as_json), read_lock),
        Target(
            "ranges of a sweep",
            by_bytes(ranges),
            lambda path: read_ranges(path, ["input_h5", "rnn_size", "learning_rate", "batch_size"]),
        ),
        Target("picture", by_bytes(*pictures), lambda path: read_image(path)),
    ]


def _h5(path: Path) -> bytes:
    with h5py.File(path, "w") as file:
        file["labels"] = np.array([[1, 2, 0]], np.uint32)
        file["label_start_ix"] = file["label_end_ix"] = np.ones(1, np.uint32)
        file["label_length"] = np.array([2], np.uint32)
        file["images"] = np.zeros((1, 3, 256, 256), np.uint8)
        file.attrs["fingerprint"] = "f"
    return path.read_bytes()


def _damaged_h5(whole: bytes) -> Callable[[random.Random], bytes]:
    """Damage to what describes the data; among 200 kB of pixels it would mostly do nothing."""
    pixels = whole.index(bytes(3 * 256 * 256))
    head, rest = whole[:pixels], whole[pixels:]

    def damaged(rng: random.Random) -> bytes:
        changed = mutate(head, rng)
        if rng.random() < 0.7:  # of the same length, so that addresses stay right
            changed = (changed + head[len(changed) :])[: len(head)]
        return changed + (rest if rng.random() < 0.9 else rest[: rng.randrange(len(rest))])

    return damaged


def run(files: int, seed: int, folder: Path, only: str = "") -> str:
    """Read so many damaged files; a Markdown table of what came of them.

    Args:
        only: readers whose name has this in it.

    Raises:
        AssertionError: a reader raised what is no InputError; the files stay in `folder`.
    """
    out = [
        "| reader | files | refused | read | longest (kB) | slowest (ms of computing) |",
        "|---|---|---|---|---|---|",
    ]
    (folder / "sound").mkdir()
    all_targets = targets(folder / "sound") + archive_targets(folder / "sound")
    counts: Counter[str] = Counter()
    wrong: list[str] = []
    for target in all_targets:
        if only not in target.name:
            continue
        rng = random.Random(f"{seed} {target.name}")
        results: Counter[str] = Counter()
        slowest = longest = 0.0
        for number in range(math.ceil(files / len(all_targets))):
            place = folder / f"{number}"
            place.mkdir()
            path = place / f"file{target.suffix}"
            data = target.damaged(rng)
            path.write_bytes(data)
            longest = max(longest, len(data))
            started = time.process_time()
            signal.setitimer(signal.ITIMER_PROF, SECONDS)
            try:
                target.read(path)
                results["read"] += 1
            except InputError as error:
                assert "\n" not in str(error)
                results["refused"] += 1
            except Exception as error:
                results["wrong"] += 1
                kept = folder / f"wrong{len(wrong)}{target.suffix}"
                kept.write_bytes(data)
                wrong.append(f"{target.name}: {type(error).__name__}: {error}: {kept}")
                if results["wrong"] <= 3:
                    traceback.print_exc()
                    print(wrong[-1], flush=True)
            finally:
                signal.setitimer(signal.ITIMER_PROF, 0)
            slowest = max(slowest, time.process_time() - started)
            for used in place.iterdir():
                used.unlink()
            place.rmdir()
        counts += results
        out.append(
            f"| {target.name} | {results.total():,} | {results['refused']:,} | {results['read']:,} "
            f"| {longest / 1000:.0f} | {1000 * slowest:.0f} |"
        )
        print(out[-1], file=sys.stderr, flush=True)
    out.append(f"| all | {counts.total():,} | {counts['refused']:,} | {counts['read']:,} | | |")
    assert not wrong, f"{len(wrong)} files: " + "; ".join(wrong[:5])
    return "\n".join(out)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--files", type=int, default=60_000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--only", default="", help="readers whose name has this in it")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    logging.disable(logging.CRITICAL)
    faulthandler.enable()
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, resource.RLIM_INFINITY))
    place = Path(tempfile.mkdtemp(dir="/dev/shm"))
    print(f"files in {place}", file=sys.stderr, flush=True)
    print(run(arguments.files, arguments.seed, place, arguments.only))
