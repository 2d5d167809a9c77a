"""Readers of archives, caches, photos with metadata, films, forms over HTTP: what fuzz_files.py damages besides."""

import asyncio
import contextlib
import io
import json
import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
from fuzz_damage import Target, as_json, by_bytes, by_values
from hostile import encoded, photo
from pyarrow import parquet
from starlette.datastructures import Headers
from video_maker import write_video

from captioner.convert.safetensors import read_safetensors, write_safetensors
from captioner.data import download
from captioner.data.address_lists import read_lists
from captioner.data.listing import list_shard
from captioner.data.records import known_captions
from captioner.data.shards import read_members
from captioner.data.vocabulary import Vocab
from captioner.errors import InputError
from captioner.inference.photo_index import PhotoIndex
from captioner.model.caption_model import CaptionModel
from captioner.model.checkpoint import Checkpoint
from captioner.model.config import ModelConfig
from captioner.output.training_page import write_training_page
from captioner.output.xmp_in_pictures import Unsuitable, packet_of, with_packet
from captioner.service.limits import Limits, Refusal
from captioner.service.requests import uploads_of
from captioner.sweep.study import validation_curve
from captioner.training.run_files import Pace
from captioner.video.frames import VideoFile

WORDS = 5  # of the index of photos
PACKET = b'<?xpacket begin="" id="W5M0MpCehiHzreSzNTczkc9d"?><x:xmpmeta xmlns:x="adobe:ns:meta/"/><?xpacket end="w"?>'


def archive_targets(folder: Path) -> list[Target]:
    """These readers; `folder` holds the sound files that they need besides."""
    index, features, words = _index(folder / "index")
    films = [
        write_video(
            folder / f"film.{kind}", [np.full((32, 48, 3), 9 * shade, np.uint8) for shade in range(6)], sound=sound
        )
        for kind, sound in (("mp4", True), ("mkv", False), ("avi", False))
    ]
    pictures = [encoded(photo(24, 18), kind) for kind in ("JPEG", "PNG", "WEBP")]
    report = {
        "loss_history": {"0": 2.5},
        "val_loss_history": {"0": 2.5},
        "val_lang_stats_history": {"0": {"CIDEr": 0.5}},
    }
    pace = {"learning_rate": {"0": 0.1}, "iterations_per_second": {"0": 1.5}}
    listed = b"http://a/1.jpg\nhttp://a/2.jpg\tb/2.jpg\nhttp://a/3.jpg\t3.jpg\tmd5:00\n"
    return [
        Target("parquet", by_bytes(*_parquets()), _read_parquet, ".parquet"),
        Target("safetensors", _damaged_header(_safetensors(folder / "model.safetensors")), read_safetensors),
        Target("index of photos", by_bytes(index), _read_index("index.json", folder / "index")),
        Target(
            "index of photos, values",
            by_values(json.loads(index), as_json),
            _read_index("index.json", folder / "index"),
        ),
        Target("features of photos", by_bytes(features), _read_index("features-00000.npy", folder / "index")),
        Target("words of photos", by_bytes(words), _read_index("words-m-00000.npy", folder / "index")),
        Target(
            "metadata in photos", by_bytes(*pictures, *(with_packet(one, PACKET) for one in pictures)), _read_metadata
        ),
        Target("film", by_bytes(*(film.read_bytes() for film in films)), _read_film),
        Target("form over HTTP", by_bytes(_form(pictures)), _read_form),
        Target("list of addresses", by_bytes(listed), lambda path: read_lists([path])),
        Target("note of a download", by_values([{"etag": "a"}, "b"], as_json), _read_note),
        Target("list of failures", by_bytes(b"# HTTP 404\nhttp://a/1.jpg\t1.jpg\n"), download._require_ours),
        Target("report of a training", by_bytes(as_json(report)), _read_report, ".json"),
        Target("report of a training, values", by_values(report, as_json), _read_report, ".json"),
        Target("pace of a training", by_values(pace, as_json), lambda path: Pace(path, 10)),
    ]


def _parquets() -> list[bytes]:
    picture = encoded(photo(16, 12), "PNG")
    of_bytes = {"key": ["a", "b", "c"], "jpg": [picture, None, b"no"], "caption": ["a dog", None, "\u00e9"]}
    nested = {"image": [{"bytes": picture, "path": "x"}] * 3, "id": [1, 2, 3], "text": [["a"], [], ["b", "c"]]}
    found = []
    for columns in (of_bytes, nested):
        for options in ({"compression": "none"}, {"compression": "snappy", "row_group_size": 1}):
            stream = io.BytesIO()
            parquet.write_table(pa.table(columns), stream, **options)
            found.append(stream.getvalue())
    return found


def _read_parquet(path: Path) -> None:
    for read in (
        lambda: list(known_captions(path)),
        lambda: list(read_members(str(path))),
        lambda: list_shard(str(path)),
    ):
        with contextlib.suppress(InputError):
            read()


def _safetensors(path: Path) -> bytes:
    config = ModelConfig(
        vocab_size=3, encoding_size=4, rnn_size=4, cnn_layer="pool5", conv_widths=(2,) * 13, fc_width=1
    )
    model = Checkpoint(config, Vocab(["a", "dog", "UNK"]), CaptionModel(config).state_dict())
    write_safetensors(path, model, torch.float32)
    return path.read_bytes()


def _damaged_header(whole: bytes) -> Callable[[random.Random], bytes]:
    """Mostly in the header, which says all but the numbers."""
    end = 8 + int.from_bytes(whole[:8], "little")
    head, everything = by_bytes(whole[:end]), by_bytes(whole)
    return lambda rng: head(rng) + whole[end:] if rng.random() < 0.8 else everything(rng)


def _open_index(folder: Path) -> PhotoIndex:
    return PhotoIndex(folder, "m", (4, WORDS), lambda features: np.zeros((len(features), WORDS), np.float16))


def _index(folder: Path) -> tuple[bytes, bytes, bytes]:
    """An index of two photos beside it: its three files."""
    paths = [folder.parent / f"photo{number}.png" for number in range(2)]
    for number, path in enumerate(paths):
        path.write_bytes(encoded(photo(8, 8, number), "PNG"))
    _open_index(folder).update(paths, lambda positions: [(i, np.full(4, 0.5, np.float32)) for i in positions])
    names = ("index.json", "features-00000.npy", "words-m-00000.npy")
    return tuple((folder / name).read_bytes() for name in names)  # type: ignore[return-value]


def _read_index(damaged: str, sound: Path) -> Callable[[Path], None]:
    def read(path: Path) -> None:
        for whole in sound.iterdir():
            if whole.name != damaged:
                path.with_name(whole.name).write_bytes(whole.read_bytes())
        path.rename(path.with_name(damaged))
        index = _open_index(path.parent)
        places = [place for number in range(2) if (place := index.find(sound.parent / f"photo{number}.png"))]
        if places:
            index.words(places), index.features(places)

    return read


def _read_metadata(path: Path) -> None:
    content = path.read_bytes()
    with contextlib.suppress(Unsuitable):
        packet_of(content)
        written = with_packet(content, PACKET)
        assert packet_of(written) == PACKET


def _read_film(path: Path) -> None:
    for frame in VideoFile(path).frames():
        frame.thumbnail(), frame.pixels()


def _form(pictures: list[bytes]) -> bytes:
    parts = [
        b'--cut\r\nContent-Disposition: form-data; name="p"; filename="%d.png"\r\n\r\n' % number + one + b"\r\n"
        for number, one in enumerate(pictures)
    ]
    return b"multipart/form-data; boundary=cut\n" + b"".join(parts) + b"--cut--\r\n"


def _read_form(path: Path) -> None:
    kind, _, body = path.read_bytes().partition(b"\n")
    headers = Headers(raw=[(b"content-type", kind)])
    with contextlib.suppress(Refusal):
        asyncio.run(uploads_of(headers, body, Limits()))


def _read_note(path: Path) -> None:
    path.with_name("x.part").write_bytes(b"half")
    download._left_over(path.with_name("x.part"), path)
    path.with_name("x.part").unlink()
    path.rename(path.with_name("x.part.json"))
    download._drop_note(path.with_name("x"))


def _read_report(path: Path) -> None:
    write_training_page(path.with_name("page.html"), [path])
    for by_cider in (True, False):
        with contextlib.suppress(InputError):
            validation_curve(path, by_cider)
