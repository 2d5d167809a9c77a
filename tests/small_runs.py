"""Small runs of every command, for faults and kills: each in a folder of its own, with paths relative to it."""

import contextlib
import http.server
import importlib
import io
import json
import os
import tarfile
import threading
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from hostile import encoded, photo
from test_hostile_eval import save_model
from torch7_writer import checkpoint, dumps, tensor

from captioner.model.encoder import Encoder

PHOTOS = ("--image_folder", "photos", "--model", "model.pt", "--gpuid", "-1", "--num_workers", "0")
JUDGED = ("--images", "photos", "--model", "model.pt", "--gpuid", "-1", "--num_workers", "0")
DATASET = ("--input_json", "photos", "--num_val", "1", "--num_workers", "0", "--word_count_threshold", "0")
SCORED = ("--predictions", "p.json", "--references", "r.json", "--metrics", "Bleu", "--bootstrap", "2")
TRAINING = (
    *("--input_h5", "train.h5", "--input_json", "train.json", "--cnn_model", "cnn.pth", "--cnn_layer", "pool5"),
    *("--rnn_size", "8", "--input_encoding_size", "8", "--batch_size", "2", "--gpuid", "-1", "--num_workers", "0"),
    *("--max_iters", "4", "--save_checkpoint_every", "2", "--losses_log_every", "1", "--checkpoint_path", "run"),
    *("--cache_features", "1", "--precision", "fp32", "--resume", "auto"),
)
# Name of the run: command and arguments.
RUNS: dict[str, tuple[str, tuple[str, ...]]] = {
    "score": ("score", (*SCORED, "--output", "scores.json")),
    "score, two systems": ("score", (*SCORED, "--compare", "q.json", "--view", "compared", "--output", "scores.json")),
    "convert": ("convert", ("model.pt", "--output", "small.pt", "--dtype", "float16")),
    "convert .t7": ("convert", ("old.t7", "--output", "new.pt")),
    "convert --inspect": ("convert", ("data.t7", "--inspect", "--output", "data.npz")),
    "prepro": ("prepro", (*DATASET, "--output_h5", "data.h5", "--output_json", "data.json")),
    "prepro --check": ("prepro", (*DATASET, "--check", "--output", "report.json", "--mean_image", "mean.png")),
    "prepro, a shard": (
        "prepro",
        (
            *("--input_json", "shard.tar", "--num_val", "1", "--num_workers", "0", "--word_count_threshold", "0"),
            *("--output_h5", "data.h5", "--output_json", "data.json"),
        ),
    ),
    "prepro --view": ("prepro", (*DATASET, "--view", "seen")),
    "eval": ("eval", (*PHOTOS, "--vis_dir", "vis", "--output", "captions.csv")),
    "eval, everything": (
        "eval",
        (
            *PHOTOS,
            *("--vis_dir", "vis", "--output", "o.jsonl", "--share", "album.html", "--write_txt", "--resume", "1"),
            *("--txt_extension", ".cap", "--language_eval", "--references", "photos.json", "--batch_size", "2"),
        ),
    ),
    "eval, metadata": ("eval", (*PHOTOS, "--write_metadata", "embed", "--dump_json", "0", "--output", "o.json")),
    "eval, shards": (
        "eval",
        ("shard.tar", "--output_dir", "results", "--model", "model.pt", "--gpuid", "-1", "--num_workers", "0"),
    ),
    "score, by a model": ("score", (*JUDGED, "--captions", "photos.json", "--output", "judged.csv")),
    "score, by words": ("score", (*JUDGED, "--query", "a dog", "--output", "found.json", "--view", "found")),
    "train": ("train", TRAINING),
    "video": (
        "video",
        (
            *("--input", "clip.mp4", "--model", "model.pt", "--gpuid", "-1", "--output", "said.mp4"),
            *("--overwrite", "1", "--srt", "c.srt", "--vtt", "c.vtt", "--jsonl", "c.jsonl", "--vis_dir", "scenes"),
        ),
    ),
    "download": ("download", ("list.tsv", "--folder", "fetched", "--connections", "2", "--retries", "0")),
}


class _Pictures(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        data = encoded(photo(40, 30), "PNG")
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *arguments: object) -> None:
        pass


@contextlib.contextmanager
def pictures_server() -> Iterator[str]:
    """An address below which every name is a picture."""
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Pictures) as server:
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def write_inputs(folder: Path, name: str, server: str) -> None:
    """The files that the run `name` reads; the same bytes and times in every folder."""
    (folder / "photos").mkdir(parents=True)
    for number in range(4):
        (folder / "photos" / f"{number}.png").write_bytes(encoded(photo(16, 16, number), "PNG"))
        (folder / "photos" / f"{number}.txt").write_text("a dog\n")
    if name.startswith(("eval", "convert", "video", "score, by")):
        save_model(folder / "model.pt")
    with tarfile.open(folder / "shard.tar", "w") as archive:
        for path in sorted((folder / "photos").iterdir()):
            member = tarfile.TarInfo(path.name)
            member.size = path.stat().st_size
            archive.addfile(member, io.BytesIO(path.read_bytes()))
    (folder / "p.json").write_text(json.dumps([{"image_id": 1, "caption": "a dog"}]))
    (folder / "q.json").write_text(json.dumps([{"image_id": 1, "caption": "a cat"}]))
    (folder / "r.json").write_text(json.dumps([{"image_id": 1, "captions": ["a dog runs"]}]))
    known = [{"file_path": f"{number}.png", "captions": ["a dog", "the dog"]} for number in range(4)]
    (folder / "photos.json").write_text(json.dumps(known))
    (folder / "list.tsv").write_text("".join(f"{server}/{number}.png\t{number}.png\n" for number in range(3)))
    if name == "convert .t7":
        (folder / "old.t7").write_bytes(dumps(checkpoint()[0]))
    (folder / "data.t7").write_bytes(dumps({"data": tensor(np.arange(12.0).reshape(3, 4)), "names": {1: "a", 2: "b"}}))
    if name == "video":
        from video_maker import write_video

        frames = [np.full((48, 64, 3), shade, np.uint8) for shade in [20] * 30 + [220] * 30]
        write_video(folder / "clip.mp4", frames)
    if name == "train":
        torch.manual_seed(0)
        state = Encoder("pool5", (2,) * 13).state_dict()
        torch.save({key: value for key, value in state.items() if key.startswith("features.")}, folder / "cnn.pth")
        outputs = ["--output_h5", "train.h5", "--output_json", "train.json"]
        assert run_in(folder, "prepro", [*DATASET, *outputs])[0] == 0
    for path in folder.rglob("*"):
        os.utime(path, (1_700_000_000, 1_700_000_000))


def run_in(folder: Path, command: str, arguments: object) -> tuple[int, str]:
    """Exit code and stderr of a command in this process, in a folder with its own cache, and without Java."""
    assert isinstance(arguments, list | tuple)
    out, err, before = io.StringIO(), io.StringIO(), os.getcwd()
    os.chdir(folder)
    try:
        here = {"PATH": "", "XDG_CACHE_HOME": str(folder / "cache")}
        with mock.patch.dict(os.environ, here), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = importlib.import_module(f"captioner.cli.{command}").main(list(arguments))
    except SystemExit as stopped:  # argparse
        code = int(stopped.code or 0)
    finally:
        os.chdir(before)
    return code, err.getvalue()


def files_of(folder: Path) -> dict[str, bytes]:
    """Name → content of every file below a folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
