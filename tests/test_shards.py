"""Shards as WebDataset and img2dataset write them: the same dataset as from the unpacked files."""

import io
import json
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hostile import encoded, photo

from captioner.cli import eval as caption_eval
from captioner.cli import prepro
from captioner.data.dataset import Dataset
from captioner.data.images import read_file, read_image
from captioner.data.records import read_records
from captioner.errors import InputError


def add(archive: tarfile.TarFile, name: str, data: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(data)
    archive.addfile(member, io.BytesIO(data))


def write_shard(path: Path, first: int, count: int) -> dict[str, bytes]:
    """Pictures with a text each, every third with a json instead, in a tar archive; returns what is in it."""
    files: dict[str, bytes] = {}
    for number in range(first, first + count):
        files[f"{number:05}.jpg"] = encoded(photo(64, 48, seed=number), "JPEG")
        if number % 3:
            files[f"{number:05}.txt"] = f"A dog number {number}.\nTwo dogs.".encode()
        else:
            described = {"caption": f"A cat number {number}.", "key": f"{number:05}", "url": "http://a/b.jpg"}
            files[f"{number:05}.json"] = json.dumps(described).encode()
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as archive:
        for name, data in files.items():
            add(archive, name, data)
    return files


def test_members_read_as_files(tmp_path: Path) -> None:
    files = write_shard(tmp_path / "0.tar", 0, 4)
    for name, data in files.items():
        assert read_file(tmp_path / "0.tar" / name) == data
    for missing in (tmp_path / "0.tar" / "nothing.jpg", tmp_path / "nothing.tar" / "a.jpg"):
        with pytest.raises(InputError, match="no such file"):
            read_file(missing)
    assert [(record.file_path, record.captions) for record in read_records(tmp_path / "0.tar")] == [
        ("00000.jpg", ["A cat number 0."]),
        ("00001.jpg", ["A dog number 1.", "Two dogs."]),
        ("00002.jpg", ["A dog number 2.", "Two dogs."]),
        ("00003.jpg", ["A cat number 3."]),
    ]
    assert read_records(tmp_path / "0.tar", tmp_path)[0].file_path == "0.tar/00000.jpg"


@pytest.mark.parametrize("workers", ["0", "2"])
def test_several_shards_are_one_dataset(tmp_path: Path, workers: str) -> None:
    shards = [tmp_path / "0.tar", tmp_path / "1.tar"]
    for number, shard in enumerate(shards):
        write_shard(shard, 5 * number, 5)
    argv = ["--input_json", *map(str, shards), "--num_val", "2", "--num_workers", workers]
    argv += ["--word_count_threshold", "0"]
    assert prepro.main([*argv, "--output_h5", f"{tmp_path}/data.h5", "--output_json", f"{tmp_path}/data.json"]) == 0
    dataset = Dataset.open(tmp_path / "data.h5", tmp_path / "data.json")
    assert [entry["file_path"] for entry in dataset.info] == [f"{n // 5}.tar/{n:05}.jpg" for n in range(10)]
    assert [entry["source"] for entry in dataset.info] == ["0"] * 5 + ["1"] * 5
    for entry, pixels in zip(dataset.info, dataset.images, strict=True):
        assert np.array_equal(pixels, read_image(tmp_path / entry["file_path"]))
    assert dataset.vocab.decode(dataset.captions_of(4)[0].tolist()) == "a dog number 4"


def test_caption_eval_takes_shards(tmp_path: Path, tiny_model: Path, command: Callable) -> None:
    """The same captions as of the unpacked files."""
    unpacked = tmp_path / "0"
    unpacked.mkdir()
    for name, data in write_shard(tmp_path / "0.tar", 0, 3).items():
        (unpacked / name).write_bytes(data)
    lines = []
    for source in (tmp_path / "0.tar", unpacked):
        argv = ["--model", tiny_model, "--gpuid", -1, "--dump_images", 0, "--vis_dir", tmp_path / "vis"]
        done = command("eval", source, *argv)
        assert done.returncode == 0, done.stderr
        lines.append([line.rpartition("  (")[0] for line in done.stdout.splitlines()])
    assert lines[0] == lines[1] and len(lines[0]) == 3
    assert f"({tmp_path}/0.tar/00001.jpg)" in command("eval", f"{tmp_path}/*.tar", *argv).stdout
    done = command("eval", tmp_path / "0.tar", *argv, "--write_txt", 1)
    assert done.returncode == 1 and "not into archives" in done.stderr


def test_what_is_broken_costs_nothing_else(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    shard = tmp_path / "0.tar"
    with tarfile.open(shard, "w") as archive:
        add(archive, "broken.jpg", b"no picture")
        add(archive, "broken.json", b'{"caption": "A dog."}')
        add(archive, "whole.jpg", encoded(photo(), "JPEG"))
        add(archive, "whole.json", b"{")
        add(archive, "other.jpg", encoded(photo(seed=1), "JPEG"))
        add(archive, "other.txt", b"A cat.")
    argv = ["--input_json", str(shard), "--num_val", "0", "--word_count_threshold", "0", "--num_workers", "0"]
    assert prepro.main([*argv, "--output_h5", f"{tmp_path}/data.h5", "--output_json", f"{tmp_path}/data.json"]) == 0
    described = json.loads((tmp_path / "data.json").read_text())
    assert [entry["file_path"] for entry in described["images"]] == ["other.jpg"]
    assert {entry["file_path"]: entry["reason"] for entry in described["skipped"]} == {
        "whole.jpg": "has no caption",
        "broken.jpg": "is text, not a picture",
    }
    whole = shard.read_bytes()
    shard.write_bytes(whole[: whole.index(b"other.txt") + 600])  # within the last text
    assert [record.file_path for record in read_records(shard)] == ["broken.jpg", "whole.jpg", "other.jpg"]
    assert "is damaged or cut off after byte" in capsys.readouterr().err
    (tmp_path / "damaged.tar").write_bytes(bytes(257) + b"ustar" + b"x" * 1000)
    with pytest.raises(InputError, match="damaged.tar: cannot be read"):
        read_records(tmp_path / "damaged.tar")


def test_shards_that_are_damaged_are_listed_and_cost_nothing_else(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    for number in range(3):
        write_shard(tmp_path / f"{number}.tar", 3 * number, 3)
    whole = (tmp_path / "1.tar").read_bytes()
    (tmp_path / "1.tar").write_bytes(whole[: whole.index(b"00004.txt") + 520])
    (tmp_path / "garbage.tar").write_bytes(b"garbage" * 1000)
    (tmp_path / "garbage.parquet").write_bytes(b"PAR1" + bytes(100))
    with tarfile.open(tmp_path / "empty.tar", "w") as archive:
        add(archive, "note.txt", b"No picture.")
    damaged = ["garbage.parquet", "garbage.tar", "empty.tar"]
    inputs = [str(tmp_path / name) for name in ("0.tar", "1.tar", *damaged, "2.tar")]
    argv = ["--input_json", *inputs, "--num_val", "0", "--word_count_threshold", "0", "--num_workers", "0"]
    argv += ["--output_h5", f"{tmp_path}/data.h5", "--output_json", f"{tmp_path}/data.json"]
    assert prepro.main([*argv, "--on_error", "fail"]) == 1
    assert "garbage.parquet: cannot be read (damaged Parquet file" in capsys.readouterr().err.splitlines()[-1]
    assert prepro.main(argv) == 0
    told = capsys.readouterr()
    described = json.loads((tmp_path / "data.json").read_text())
    names = [entry["file_path"] for entry in described["images"]]
    assert names == [f"{n // 3}.tar/{n:05}.jpg" for n in (0, 1, 2, 3, 6, 7, 8)]
    reasons = {Path(entry["file_path"]).name: entry["reason"] for entry in described["skipped"]}
    assert list(reasons) == [*damaged, "1.tar", "00004.jpg"] and "skipped     5 " in told.out
    assert reasons["garbage.parquet"].startswith("cannot be read (damaged Parquet file")
    assert reasons["garbage.tar"] == "is no .tar file, or a damaged one"
    assert reasons["empty.tar"] == "describes no pictures"
    assert reasons["1.tar"].startswith("damaged or cut off after byte ")
    assert all(f"skipped {tmp_path}/{name}: " in told.err for name in damaged)
    assert prepro.main([*argv, "--check"]) == 0
    assert "4 shards are damaged" in capsys.readouterr().out
    assert prepro.main(["--input_json", *inputs[2:5], "--num_val", "0"]) == 1
    assert "none of 3 shards can be read" in capsys.readouterr().err.splitlines()[-1]


def test_where_pyarrow_is_missing_one_line_says_so_before_any_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    write_shard(tmp_path / "0.tar", 0, 2)
    (tmp_path / "1.parquet").write_bytes(b"PAR1" + bytes(100))
    for module in ("pyarrow", "pyarrow.parquet"):
        monkeypatch.setitem(sys.modules, module, None)  # as if it were not installed
    shards, out = [str(tmp_path / name) for name in ("0.tar", "1.parquet")], str(tmp_path / "out")
    dataset = ["--num_val", "0", "--output_h5", f"{out}.h5", "--output_json", f"{out}.json"]
    for main, argv in (
        (prepro.main, ["--input_json", *shards, *dataset]),
        (prepro.main, ["--input_json", shards[1], *dataset, "--check"]),
        (prepro.main, ["--input_json", "memory://nothing/a.parquet", *dataset]),
        (caption_eval.main, [*shards, "--vis_dir", out]),
        (caption_eval.main, [*shards, "--output_dir", out]),
        (caption_eval.main, [shards[0], "--output_dir", out, "--output_format", "parquet"]),
    ):
        assert main([*argv] if main is prepro.main else [*argv, "--gpuid", "-1"]) == 1
        (line,) = capsys.readouterr().err.splitlines()
        assert line.endswith('error: Parquet files need pyarrow; pip install "captioner[shards]"')
        assert sorted(path.name for path in tmp_path.iterdir()) == ["0.tar", "1.parquet"]


def test_a_damaged_shard_among_others_is_named_and_costs_nothing_else(
    tmp_path: Path, tiny_model: Path, capsys: pytest.CaptureFixture
) -> None:
    write_shard(tmp_path / "0.tar", 0, 2)
    (tmp_path / "1.tar").write_bytes(bytes(257) + b"ustar" + b"x" * 1000)
    (tmp_path / "2.parquet").write_bytes(b"PAR1" + bytes(100))
    argv = ["--model", str(tiny_model), "--gpuid", "-1", "--vis_dir", ""]
    damaged = [f"{tmp_path}/1.tar", f"{tmp_path}/2.parquet"]
    for shards in ([damaged[0], f"{tmp_path}/0.tar", damaged[1]], [f"{tmp_path}/*.*"]):
        assert caption_eval.main([*shards, *argv]) == 0
        told = capsys.readouterr()
        assert [line.split("(")[-1] for line in told.out.splitlines()] == [
            f"{tmp_path}/0.tar/0000{n}.jpg)" for n in (0, 1)
        ]
        assert f"skipped {damaged[0]}: cannot be read (damaged tar archive: bad checksum)" in told.err
        assert f"skipped {damaged[1]}: cannot be read (damaged Parquet file" in told.err
    for shards, reason in ((damaged[:1], "1.tar: cannot be read"), (damaged, "no pictures to caption")):
        assert caption_eval.main([*shards, *argv]) == 1
        assert reason in capsys.readouterr().err.splitlines()[-1]
