"""Shards in, shards out: a result file for each shard, whole or absent, from wherever and to wherever."""

import functools
import http.server
import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import fsspec
import numpy as np
import pyarrow as pa
import pytest
from PIL import Image
from pyarrow import parquet

from captioner.cli import prepro
from captioner.data.dataset import Dataset
from captioner.data.images import decode_image
from captioner.data.records import read_records
from captioner.data.shards import FETCHED, Member, read_members
from captioner.errors import InputError

CPU = ["--gpuid", -1, "--precision", "fp32"]


def picture(number: int) -> bytes:
    """A JPEG of a few colours, that differ from picture to picture."""
    colours = np.random.default_rng(number).integers(0, 256, size=(1, 2, 3), dtype=np.uint8)
    target = io.BytesIO()
    Image.fromarray(colours).resize((80, 60), Image.Resampling.BICUBIC).save(target, "JPEG", quality=95)
    return target.getvalue()


PICTURES = {number: picture(number) for number in range(12)}


def write_tar(path: Path, numbers: range, broken: dict[int, bytes] | None = None) -> None:
    with tarfile.open(path, "w") as archive:
        for number in numbers:
            for name, data in ((f"{number:05}.jpg", PICTURES[number]), (f"{number:05}.txt", b"a dog")):
                member = tarfile.TarInfo(name)
                data = (broken or {}).get(number, data) if name.endswith("jpg") else data
                member.size = len(data)
                archive.addfile(member, io.BytesIO(data))


def write_parquet(path: Path, numbers: range, column: str = "jpg", **columns: list) -> None:
    images = [PICTURES[number] for number in numbers]
    if column == "image":  # as Hugging Face's datasets have it
        images = [{"bytes": data, "path": f"{number}.jpg"} for data, number in zip(images, numbers, strict=True)]
    table = {"key": [f"{number:05}" for number in numbers], column: images, **columns}
    parquet.write_table(pa.table(table), path, row_group_size=2)


def rows_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def without_place(row: dict) -> dict:
    """What does not depend on where a picture stood."""
    return {key: value for key, value in row.items() if key not in ("image_id", "file_name")}


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve pictures: two tars and a Parquet file of four each."""
    folder = tmp_path_factory.mktemp("shards")
    write_tar(folder / "00000.tar", range(4))
    write_tar(folder / "00001.tar", range(4, 8))
    write_parquet(folder / "00002.parquet", range(8, 12))
    return folder


@pytest.fixture(scope="module")
def plain(shards: Path, tiny_model: Path, command: Callable, tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    """What caption-eval says of the twelve pictures as files."""
    folder = tmp_path_factory.mktemp("plain")
    for number, data in PICTURES.items():
        (folder / f"{number:05}.jpg").write_bytes(data)
    output = folder / "rows.jsonl"
    done = command("eval", folder, "--model", tiny_model, *CPU, "--vis_dir", "", "--output", output)
    assert done.returncode == 0, done.stderr
    return rows_of(output)


def test_one_file_of_results_for_each_shard(shards, plain, tiny_model, command, tmp_path):
    argv = ["eval", shards, "--model", tiny_model, *CPU, "--output_dir", tmp_path]
    done = command(*argv)
    assert done.returncode == 0, done.stderr
    assert "3 shards with 12 images captioned" in done.stderr
    found = [rows_of(tmp_path / f"0000{number}.jsonl") for number in range(3)]
    assert [row["image_id"] for rows in found for row in rows] == [f"{number:05}" for number in range(12)]
    assert [row["file_name"] for row in found[1]] == [f"00001.tar/{number:05}.jpg" for number in range(4, 8)]
    assert [row["file_name"] for row in found[2]] == [f"00002.parquet/{number}" for number in range(4)]
    assert [without_place(row) for rows in found for row in rows] == [without_place(row) for row in plain]
    assert len({row["caption"] for row in plain}) > 3 and len({row["logprob"] for row in plain}) == 12

    # A repeated command does what is left.
    (tmp_path / "00001.jsonl").unlink()
    before = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*.jsonl")}
    done = command(*argv)
    assert done.returncode == 0 and "1 of 3 shards are left" in done.stderr
    assert rows_of(tmp_path / "00001.jsonl") == found[1]
    assert {path: path.stat().st_mtime_ns for path in before} == before

    # Another model or other options are another run.
    done = command(*argv, "--beam_size", 1)
    assert done.returncode == 1 and "of another model or options" in done.stderr
    assert {path: path.stat().st_mtime_ns for path in before} == before
    done = command(*argv, "--beam_size", 1, "--overwrite")
    assert done.returncode == 0 and "3 of 3 shards are left" in done.stderr


def test_results_as_parquet(shards, plain, tiny_model, command, tmp_path):
    argv = [shards / "00000.tar", "--model", tiny_model, *CPU, "--n_best", 2, "--output_dir", tmp_path]
    done = command("eval", *argv, "--output_format", "parquet")
    assert done.returncode == 0, done.stderr
    found = parquet.read_table(tmp_path / "00000.parquet").to_pylist()
    assert [row["caption"] for row in found] == [row["caption"] for row in plain[:4]]
    for row in found:
        assert row["logprob"] == pytest.approx(row["n_best"][0]["logprob"]) and len(row["n_best"]) == 2
        assert [word["word"] for word in row["words"]] == row["caption"].split()
    assert [row["image_id"] for row in found] == ["00000", "00001", "00002", "00003"]


def test_what_is_broken_is_listed_and_costs_nothing_else(shards, plain, tiny_model, command, tmp_path):
    whole = (shards / "00001.tar").read_bytes()
    write_tar(tmp_path / "members.tar", range(4), broken={1: b"no picture", 2: b""})
    (tmp_path / "cut.tar").write_bytes(whole[: whole.index(b"00006.jpg") + 700])
    (tmp_path / "garbage.tar").write_bytes(b"garbage" * 1000)
    (tmp_path / "garbage.parquet.parquet").write_bytes(b"PAR1" + bytes(100))
    write_tar(tmp_path / "sound.tar", range(8, 12))
    argv = ["eval", tmp_path, "--model", tiny_model, *CPU, "--output_dir", tmp_path / "out"]
    done = command(*argv)
    assert done.returncode == 1
    assert "2 of 5 shards could not be read" in done.stderr.splitlines()[-1]
    out = tmp_path / "out"
    assert not (out / "garbage.jsonl").exists() and not (out / "garbage.parquet.jsonl").exists()
    assert [row["caption"] for row in rows_of(out / "sound.jsonl")] == [row["caption"] for row in plain[8:]]
    assert [row["image_id"] for row in rows_of(out / "members.jsonl")] == ["00000", "00003"]
    assert rows_of(out / "members.errors.jsonl") == [
        {"file_name": "members.tar/00001.jpg", "error": "is text, not a picture"},
        {"file_name": "members.tar/00002.jpg", "error": "is empty"},
    ]
    assert [row["image_id"] for row in rows_of(out / "cut.jsonl")] == ["00004", "00005"]
    (cut,) = rows_of(out / "cut.errors.jsonl")
    assert cut["file_name"] == "cut.tar" and cut["error"].startswith("damaged or cut off after 2 pictures (")
    assert not (out / "sound.errors.jsonl").exists()
    # The next time only what has no results is tried again; once it is sound, its list of errors goes.
    write_tar(tmp_path / "garbage.tar", range(1))
    done = command(*argv)
    assert done.returncode == 1 and "2 of 5 shards are left" in done.stderr
    assert len(rows_of(out / "garbage.jsonl")) == 1


def test_processes_share_the_shards_and_a_broken_one_ends_none_of_them(shards, plain, tiny_model, tmp_path):
    """The process that meets it has nothing else to do; it must not end before the other is done."""
    (tmp_path / "in").mkdir()
    for path in (shards / "00000.tar", shards / "00002.parquet"):
        shutil.copy(path, tmp_path / "in")
    (tmp_path / "in" / "00001.tar").write_bytes(b"garbage" * 1000)
    (tmp_path / "slow.py").write_text(
        "import os, time\n"
        "from captioner.cli.eval import main\n"
        "from captioner.scale.captions import CaptionItems\n"
        "call = CaptionItems.__call__\n"
        "CaptionItems.__call__ = lambda self, batches: call(self, (time.sleep(3) or one for one in batches))\n"
        "raise SystemExit(main())\n"
    )
    argv = [tmp_path / "in", "--model", tiny_model, *CPU, "--output_dir", tmp_path / "out"]
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", 2, tmp_path / "slow.py"]
    done = subprocess.run(
        [sys.executable, *map(str, [*torchrun, *argv])], capture_output=True, text=True, timeout=200, check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode != 0
    errors = [line for line in done.stderr.splitlines() if "caption-eval: error:" in line]
    assert len(errors) == 1 and "1 of 3 shards could not be read" in errors[0], done.stderr
    found = [row for name in ("00000", "00002") for row in rows_of(tmp_path / "out" / f"{name}.jsonl")]
    assert not (tmp_path / "out" / ".lock").exists()
    assert [row["caption"] for row in found] == [row["caption"] for row in [*plain[:4], *plain[8:]]]
    assert not (tmp_path / "out" / "00001.jsonl").exists()


HOLD = """
import sys
from captioner.scale.shard_results import sole_writer
with sole_writer(sys.argv[1]):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.mark.parametrize("address", ["", "file://"])
def test_two_runs_in_one_folder(shards, tiny_model, command, tmp_path, address):
    """The second one says who is there, whatever it calls the folder; a killed one's lock is taken over."""
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path / "out")], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    argv = ["eval", shards / "00000.tar", "--model", tiny_model, *CPU, "--output_dir", f"{address}{tmp_path}/out"]
    try:
        assert holder.stdout.readline() == b"held\n"
        done = command(*argv)
        assert done.returncode == 1
        assert f"out is in use by process {holder.pid} on" in done.stderr.splitlines()[-1]
        assert [path.name for path in (tmp_path / "out").iterdir()] == [".lock"]
    finally:
        holder.kill()
        holder.wait()
    assert command(*argv).returncode == 0
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"00000.jsonl", "captioner-run.json"}


def test_an_address_of_this_machine_replaces_no_input(shards, tiny_model, command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copy(shards / "00002.parquet", tmp_path / "00002.parquet")
    shutil.copy(tiny_model, tmp_path / "00000.parquet")
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    options = [*CPU, "--output_dir", f"file://{tmp_path}", "--output_format", "parquet", "--overwrite"]
    for given in (["00002.parquet", "--model", tiny_model], [shards / "00000.tar", "--model", "00000.parquet"]):
        done = command("eval", *given, *options)
        assert done.returncode == 1, done.stderr
        assert {name: (tmp_path / name).read_bytes() for name in before} == before


@pytest.mark.parametrize("cut", ["header", "boundary", "middle"])
def test_no_member_is_lost_in_silence(shards, tmp_path, cut):
    """Python's tarfile takes a damaged header for the end of the archive."""
    whole = bytearray((shards / "00000.tar").read_bytes())
    place = whole.index(b"00002.jpg")
    if cut == "header":
        whole[place + 148 : place + 156] = b"xxxxxxxx"  # its checksum
    shard = tmp_path / "a.tar"
    shard.write_bytes(whole if cut == "header" else whole[: place + (100 if cut == "middle" else 0)])
    members = list(read_members(str(shard)))
    assert [member.id for member in members] == ["00000", "00001", ""]
    assert "damaged or cut off after 2 pictures" in members[-1].error
    assert [record.file_path for record in read_records(shard)] == ["00000.jpg", "00001.jpg"]


def test_a_damaged_row_group_costs_its_own_rows(tmp_path):
    path = tmp_path / "a.parquet"
    write_parquet(path, range(6, 12))
    pages = parquet.ParquetFile(path).metadata.row_group(1).column(1)
    assert pages.path_in_schema == "jpg"
    whole = bytearray(path.read_bytes())
    whole[pages.data_page_offset : pages.data_page_offset + 40] = b"x" * 40
    path.write_bytes(whole)
    members = list(read_members(str(path)))
    assert [member.file_name for member in members] == [f"a.parquet/{number}" for number in range(6)]
    assert [member.data for member in members] == [PICTURES[6], PICTURES[7], b"", b"", PICTURES[10], PICTURES[11]]
    assert all("damaged Parquet file" in member.error for member in members[2:4])


def test_parquet_is_read_as_a_folder_too(shards, plain, tiny_model, command, tmp_path):
    """In plain caption-eval, and in caption-prepro with its captions."""
    argv = ["eval", shards / "00002.parquet", "--model", tiny_model, *CPU, "--vis_dir", tmp_path / "vis"]
    done = command(*argv, "--output", tmp_path / "o.jsonl")
    assert done.returncode == 0, done.stderr
    rows = rows_of(tmp_path / "o.jsonl")
    assert [row["caption"] for row in rows] == [row["caption"] for row in plain[8:]]
    assert rows[1]["file_name"] == f"{shards}/00002.parquet/1"
    assert all((tmp_path / "vis" / row["image"]).is_file() for row in rows if "image" in row)

    captions = [["A dog.", "Two dogs."], ["A cat."], None, ["A red bus."]]
    write_parquet(tmp_path / "a.parquet", range(4), "image", captions=captions)
    argv = ["--input_json", str(tmp_path / "a.parquet"), "--num_val", "1", "--word_count_threshold", "0"]
    for workers in ("0", "2"):
        h5, described = f"{tmp_path}/{workers}.h5", f"{tmp_path}/{workers}.json"
        assert prepro.main([*argv, "--num_workers", workers, "--output_h5", h5, "--output_json", described]) == 0
        dataset = Dataset.open(h5, described)
        assert [entry["file_path"] for entry in dataset.info] == ["0", "1", "3"]
        for image, number in zip(dataset.images, (0, 1, 3), strict=True):
            assert np.array_equal(image, decode_image(PICTURES[number]))
        assert dataset.vocab.decode(dataset.captions_of(2)[0].tolist()) == "a red bus"


def test_columns_of_parquet_files(tmp_path):
    named = {"a.parquet": "image", "b.parquet": "webp", "c.parquet": "anything"}
    for name, column in named.items():
        write_parquet(tmp_path / name, range(2), column)
        assert list(read_members(str(tmp_path / name))) == [
            Member("00000", f"{name}/0", PICTURES[0]),
            Member("00001", f"{name}/1", PICTURES[1]),
        ]
    parquet.write_table(pa.table({"text": ["a"], "caption": ["b"]}), tmp_path / "none.parquet")
    with pytest.raises(InputError, match="no column of pictures.*its columns: text, caption"):
        list(read_members(str(tmp_path / "none.parquet")))
    parquet.write_table(pa.table({"jpg": [PICTURES[0], None]}), tmp_path / "null.parquet")
    assert list(read_members(str(tmp_path / "null.parquet")))[1] == Member(
        "1", "null.parquet/1", error="the row has no bytes of a picture"
    )


@pytest.fixture
def memory() -> Iterator[str]:
    """An object store that lasts as long as the test."""
    system = fsspec.filesystem("memory")
    yield "memory://bucket"
    system.rm("/bucket", recursive=True)


def test_shards_at_addresses(shards, plain, tiny_model, command, memory):
    for path in shards.iterdir():
        fsspec.filesystem("memory").pipe_file(f"/bucket/in/{path.name}", path.read_bytes())
    argv = ["eval", f"{memory}/in/*", "--model", tiny_model, *CPU, "--output_dir", f"{memory}/out"]
    done = command(*argv)
    assert done.returncode == 0, done.stderr
    stored = fsspec.filesystem("memory")
    names = {path.rpartition("/")[2] for path in stored.ls("/bucket/out", detail=False)}
    assert names == {"00000.jsonl", "00001.jsonl", "00002.jsonl", "captioner-run.json"}
    lines = [line for number in range(3) for line in stored.cat(f"/bucket/out/0000{number}.jsonl").splitlines()]
    assert [without_place(json.loads(line)) for line in lines] == [without_place(row) for row in plain]
    stored.rm("/bucket/out/00002.jsonl")
    done = command(*argv)
    assert done.returncode == 0 and "1 of 3 shards are left" in done.stderr
    done = command("eval", f"{memory}/in/*.zip", *argv[2:])
    assert done.returncode == 1 and "no file matches this pattern" in done.stderr


def test_a_dataset_of_shards_at_addresses(shards, memory, tmp_path):
    """The same files as from the shards themselves; copies last until it is done."""
    for path in sorted(shards.glob("*.tar")):
        fsspec.filesystem("memory").pipe_file(f"/bucket/in/{path.name}", path.read_bytes())
    written = {}
    for name, inputs in {"near": sorted(map(str, shards.glob("*.tar"))), "far": [f"{memory}/in/*.tar"]}.items():
        h5, described = f"{tmp_path}/{name}.h5", f"{tmp_path}/{name}.json"
        argv = ["--input_json", *inputs, "--num_val", "2", "--num_workers", "0", "--word_count_threshold", "0"]
        broken = Path(f"{h5}.fetched", "00001.tar")
        if name == "far":  # an interrupted run has left a copy: it is not fetched again
            broken.parent.mkdir()
            (broken.parent / FETCHED).touch()
            broken.write_bytes((shards / "00001.tar").read_bytes())
            fsspec.filesystem("memory").pipe_file("/bucket/in/00001.tar", b"changed")
        assert prepro.main([*argv, "--output_h5", h5, "--output_json", described]) == 0
        written[name] = [Path(h5).read_bytes(), Path(described).read_bytes()]
        assert not broken.parent.exists()
    assert written["near"] == written["far"]
    assert prepro.main(["--input_json", f"{memory}/gone/*.tar", "--num_val", "0"]) == 1


def test_a_store_that_cannot_put_atomically_gets_a_renamed_file(shards, tiny_model, command, tmp_path, monkeypatch):
    """file:// goes through fsspec and is such a store; a crash while writing leaves nothing under the result's name."""
    from fsspec.implementations.local import LocalFileSystem

    argv = [f"file://{shards}/00000.tar", "--model", tiny_model, *CPU, "--output_dir", f"file://{tmp_path}/out"]
    whole, written = LocalFileSystem.pipe_file, []

    def pipe_half(self, path, value, **more):
        written.append(path)
        whole(self, path, value[: len(value) // 2], **more)
        if ".jsonl" in path:
            raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(LocalFileSystem, "pipe_file", pipe_half)
        done = command("eval", *argv)
    assert done.returncode == 1 and "No space left on device" in done.stderr.splitlines()[-1]
    assert written and not list(tmp_path.glob("out/*.jsonl*"))
    done = command("eval", *argv, "--overwrite")
    assert done.returncode == 0, done.stderr
    assert len(rows_of(tmp_path / "out" / "00000.jsonl")) == 4
    assert not list(tmp_path.glob("out/*.tmp"))


def test_shards_over_http_and_one_that_fails_on_the_way(shards, tiny_model, command, tmp_path):
    handler = functools.partial(_Flaky, directory=str(shards))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        names = [f"http://127.0.0.1:{server.server_port}/0000{number}.tar" for number in range(2)]
        done = command("eval", *names, "--model", tiny_model, *CPU, "--output_dir", tmp_path)
        assert done.returncode == 1 and "1 of 2 shards could not be read" in done.stderr, done.stderr
        assert sorted(path.name for path in tmp_path.glob("*.jsonl")) == ["00000.jsonl"]
        _Flaky.refused.clear()
        done = command("eval", *names, "--model", tiny_model, *CPU, "--output_dir", tmp_path)
        assert done.returncode == 0, done.stderr
        server.shutdown()
    assert [row["image_id"] for row in rows_of(tmp_path / "00001.jsonl")] == ["00004", "00005", "00006", "00007"]


class _Flaky(http.server.SimpleHTTPRequestHandler):
    """Answers 500 for what is in `refused`."""

    refused = {"/00001.tar"}

    def do_GET(self) -> None:
        if self.path in self.refused:
            self.send_error(500)
        else:
            super().do_GET()

    def log_message(self, *_: object) -> None:
        pass


def test_refusals(shards, tiny_model, command, tmp_path):
    def last_line(*argv: object) -> str:
        done = command("eval", "--model", tiny_model, *CPU, *argv)
        assert done.returncode == 1, done
        return done.stderr.splitlines()[-1]

    assert "no shards are named" in last_line("--output_dir", tmp_path)
    assert "--write_txt and --output_dir exclude each other" in last_line(
        shards, "--output_dir", tmp_path, "--write_txt", 1
    )
    assert "say where with --output_dir" in last_line(shards, "--engine", "ray")
    assert "add --engine ray" in last_line(shards, "--output_dir", tmp_path, "--actors", 2)
    assert "is no shard" in last_line(tiny_model, "--output_dir", tmp_path)
    assert "no such shard" in last_line(tmp_path / "gone.tar", "--output_dir", tmp_path)
    assert "foo://a/b.tar: cannot be used" in last_line("foo://a/b.tar", "--output_dir", tmp_path)
    assert "foo://a/out: cannot be used" in last_line(shards, "--output_dir", "foo://a/out")
    (tmp_path / "00000.jsonl").write_text("mine")
    assert "is not of this run" in last_line(shards, "--output_dir", tmp_path)
    assert (tmp_path / "00000.jsonl").read_text() == "mine"
    other = tmp_path / "other"
    other.mkdir()
    write_tar(other / "00000.tar", range(1))
    assert "another shard has this name" in last_line(shards, other, "--output_dir", tmp_path / "out")
