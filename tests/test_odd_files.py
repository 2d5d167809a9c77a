"""What is no regular file where one is read, what is nested without end, and what a user without a home has."""

import io
import json
import os
import re
import shutil
import tarfile
from pathlib import Path

import pytest
import torch
from hostile import encoded, photo

from captioner.data.dataset import Dataset
from captioner.data.pixel_digest import pixel_digest
from captioner.data.records import known_captions
from captioner.data.shards import read_members
from captioner.data.tar_files import list_members
from captioner.errors import InputError
from captioner.model.checkpoint_fields import plain_digest
from captioner.output.results import Journal
from captioner.output.sidecars import Sidecars
from captioner.runtime.files import cache_folder, read_json, read_small
from captioner.training.resume import load_resume_state


@pytest.fixture
def pipe(tmp_path: Path) -> Path:
    os.mkfifo(tmp_path / "pipe")
    return tmp_path / "pipe"


def test_pipes_and_devices_are_refused_unopened(pipe: Path, tmp_path: Path) -> None:
    for path in (pipe, "/dev/zero", tmp_path):
        with pytest.raises(OSError, match="a folder, a pipe or a device"):
            read_small(path)
        with pytest.raises(InputError, match="cannot be read"):
            read_json(path)


def test_a_file_that_no_memory_holds_is_not_read(tmp_path: Path) -> None:
    with (tmp_path / "sparse").open("wb") as stream:
        stream.truncate(20 * 2**30)
    with pytest.raises(OSError, match="holds 21,474,836,480 bytes"):
        read_small(tmp_path / "sparse")


def test_a_pipe_for_a_text_file_keeps_nobody_waiting(pipe: Path, tmp_path: Path) -> None:
    pipe.rename(tmp_path / "a.txt")
    sidecars = Sidecars(existing="append")
    assert not sidecars.is_captioned(tmp_path / "a.jpg")
    sidecars.write(tmp_path / "a.jpg", "a dog")  # kept, and logged
    assert not (tmp_path / "a.txt").is_file()


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("eval", ["--input_h5", "{h5}", "--input_json", "{file}", "--model", "{model}"]),
        ("eval", ["--image_folder", ".", "--coco_json", "{file}", "--model", "{model}"]),
        ("train", ["--input_h5", "{h5}", "--input_json", "{file}", "--cnn_model", "random"]),
        ("score", ["--predictions", "{file}", "--references", "{file}"]),
        ("prepro", ["--input_json", "{file}", "--num_val", "0"]),
        ("sweep", ["--ranges", "{file}", "--folder", "sweep"]),
        ("download", ["{file}"]),
    ],
)
def test_commands_say_so_in_one_line(name, options, pipe, tiny_dataset, tiny_model, command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "deep.json").write_text("[" * 100_000)
    (tmp_path / "half.json").write_text('{"ix_to_word": {"1": "\\ud83d"}, "images": []}')
    for file in (pipe, tmp_path / "deep.json", tmp_path / "half.json"):
        arguments = [one.format(h5=tiny_dataset[0], file=file, model=tiny_model) for one in options]
        done = command(name, *arguments)
        assert done.returncode == 1, (file, done)
        last = done.stderr.strip().splitlines()[-1]
        assert last.startswith(f"caption-{name}: error: ") and file.name in last, last
        assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    "odd", [{"file_path": 5}, {"id": [1]}, {"id": 1.5}, {"captions": "a dog"}, {"file_path": {"a": 1}}, {"split": 1}]
)
def test_fields_of_a_data_set_of_the_wrong_kind(odd, tiny_dataset, tiny_model, command, tmp_path):
    described = json.loads(tiny_dataset[1].read_text())
    described["images"][20] |= odd
    (tmp_path / "data.json").write_text(json.dumps(described))
    data = ["--input_h5", tiny_dataset[0], "--input_json", tmp_path / "data.json"]
    done = command("eval", "--model", tiny_model, *data, "--vis_dir", tmp_path / "vis")
    assert done.returncode == 1 and "images[20]" in done.stderr.splitlines()[-1]


def test_the_state_of_optimisers_is_vouched_for(tiny_dataset, tiny_cnn, command, tmp_path):
    options = ["--cnn_layer", "pool5", "--rnn_size", 8, "--input_encoding_size", 8, "--batch_size", 4, "--gpuid", -1]
    data = ["--input_h5", tiny_dataset[0], "--input_json", tiny_dataset[1], "--cnn_model", tiny_cnn, *options]
    argv = ["train", *data, "--checkpoint_path", tmp_path, "--resume", "auto"]
    done = command(*argv, "--max_iters", 1)
    assert done.returncode == 0, done.stderr
    path = tmp_path / "model_id_resume.pt"
    sound = torch.load(path, weights_only=True)
    assert plain_digest(sound["optimizers"]) == sound["optimizers_digest"]
    for name, odd in {
        "a changed number": sound["optimizers"] | {"pieces": [1, 2]},
        "no table": [1, 2],
    }.items():
        torch.save(sound | {"optimizers": odd}, path)
        with pytest.raises(InputError, match="is not what was saved"):
            load_resume_state(path)
        assert name
    for odd in ({"lm": 5}, {"lm": {"state": {0: {"exp_avg": 1}}, "param_groups": []}}, {"pieces": 7}):
        torch.save(sound | {"optimizers": odd, "optimizers_digest": plain_digest(odd)}, path)
        done = command(*argv, "--max_iters", 2)
        assert done.returncode == 1 and "its optimiser state does not fit" in done.stderr.splitlines()[-1], done.stderr


def test_a_user_without_a_home_has_a_cache_too(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", no_home)
    assert cache_folder().name == "captioner"


@pytest.mark.parametrize("host", ["a..b", "\u00e9" * 300, "x y", "-", "256.256.256.256"])
def test_hosts_that_are_none_are_one_line(host, command):
    pytest.importorskip("uvicorn")
    done = command("serve", "--host", host, "--port", 0)
    assert done.returncode == 1 and f"cannot listen on {host} port 0" in done.stderr.splitlines()[-1], done


@pytest.mark.parametrize("extension", [".jpg", "WEBP", ".", "..", ".a.", "." + "x" * 300, ".a\nb", "a\\b"])
def test_endings_that_no_text_file_should_have(extension, tiny_model, command, tmp_path):
    done = command("eval", tmp_path, "--model", tiny_model, "--write_txt", "--txt_extension", extension)
    assert done.returncode in (1, 2) and "--txt_extension" in done.stderr.splitlines()[-1], done
    assert not list(tmp_path.iterdir())


def test_a_pipe_or_a_picture_for_a_metadata_file_stays(tmp_path, caplog):
    pytest.importorskip("pyexiv2")
    from captioner.output.photo_metadata import PhotoMetadata

    os.mkfifo(tmp_path / "a.jpg.xmp")
    (tmp_path / "b.jpg.xmp").mkdir()
    (tmp_path / "c.jpg.xmp").write_bytes(encoded(photo(8, 8), "JPEG"))
    for name in ("a.jpg", "b.jpg", "c.jpg", "d" * 250 + ".jpg"):
        PhotoMetadata("xmp").is_captioned(tmp_path / name)
        PhotoMetadata("xmp").write(tmp_path / name, "a dog")
    assert [record.getMessage()[:5] for record in caplog.records] == ["kept "] * 4
    assert (tmp_path / "c.jpg.xmp").read_bytes() == encoded(photo(8, 8), "JPEG")


def test_text_of_a_parquet_file_that_is_no_text(tmp_path, caplog):
    pa = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    broken = pa.Array.from_buffers(
        pa.string(), 2, [None, pa.py_buffer(b"\0\0\0\0\1\0\0\0\2\0\0\0"), pa.py_buffer(b"a\xff")]
    )
    times = pa.array([0, 2**62], pa.timestamp("us"))
    picture = encoded(photo(8, 8), "PNG")
    for column in ({"key": broken}, {"caption": broken}, {"key": times}):
        parquet.write_table(pa.table({"jpg": [picture, picture], **column}), tmp_path / "a.parquet")
        caplog.clear()
        assert [record.captions for record in known_captions(tmp_path / "a.parquet")] == [[], []]
        assert len(caplog.records) == 2 and "row 1: damaged Parquet file" in caplog.text
        members = list(read_members(str(tmp_path / "a.parquet")))
        assert [bool(one.error) for one in members] == ["key" in column] * 2


def test_an_archive_that_leads_back_into_itself_has_an_end(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        for name in ("a.png", "b.png"):
            archive.addfile(tarfile.TarInfo(name))
    data = bytearray((tmp_path / "a.tar").read_bytes())
    data[512 + 124 : 512 + 136] = b"\xff" * 10 + (2**16 - 1024).to_bytes(2, "big")  # b.png's size: -1,024
    data[512 + 148 : 512 + 156] = b" " * 8
    data[512 + 148 : 512 + 156] = b"%06o\0 " % sum(data[512:1024])
    (tmp_path / "a.tar").write_bytes(data)
    assert "a.png" in list_members(str(tmp_path / "a.tar"))
    names = [one.file_name for one in read_members(str(tmp_path / "a.tar"))]
    assert names[0] == "a.tar/a.png" and len(names) == 2


def test_a_picture_with_a_name_as_long_as_names_can_be(tmp_path, command, tiny_model):
    name = "x" * 251 + ".png"
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / name).write_bytes(encoded(photo(8, 8), "PNG"))
    (tmp_path / "photos" / "a.png").write_bytes(encoded(photo(8, 8, 1), "PNG"))
    (tmp_path / "photos" / "a.txt").write_text("a dog\n")
    assert [record.captions for record in known_captions(tmp_path / "photos")] == [["a dog"], []]
    argv = ["eval", tmp_path / "photos", "--model", tiny_model, "--gpuid", -1, "--vis_dir", tmp_path / "vis"]
    done = command(*argv, "--write_txt", "--txt_extension", ".caption")
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == 2 and (tmp_path / "photos" / "a.caption").is_file()
    done = command("eval", "--model", "x" * 5000)
    assert done.returncode == 1 and "no such file" in done.stderr


@pytest.mark.parametrize("damage", [{"file_name": None}, {"file_name": 5}, {"caption": 1}, {"image_id": [1]}])
def test_a_journal_with_a_damaged_row(damage, tmp_path):
    row = {"image_id": "1", "file_name": "a.jpg", "caption": "a dog"} | damage
    lines = [{"run": "r"}, {"row": row}, {"num_done": 1, "totals": {}}]
    (tmp_path / "journal").write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(InputError, match="line 2 is damaged"):
        Journal(tmp_path / "journal", "r", resume=True)


def test_a_pipe_for_pixels_keeps_nobody_waiting(pipe, tiny_dataset, tiny_model, command):
    done = command("eval", "--model", tiny_model, "--input_h5", pipe, "--input_json", tiny_dataset[1])
    assert done.returncode == 1 and "pipe: is not a file" in done.stderr.splitlines()[-1]


def test_broken_pictures_in_a_shard_whose_name_is_no_text(tiny_model, command, tmp_path):
    shard = tmp_path / os.fsdecode(b"\xff.tar")
    with tarfile.open(shard, "w") as archive:
        for name, data in (("a.png", encoded(photo(8, 8), "PNG")), ("b.png", b"broken")):
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    done = command("eval", shard, "--model", tiny_model, "--gpuid", -1, "--output_dir", tmp_path / "results")
    assert done.returncode == 0, done.stderr
    (errors,) = (tmp_path / "results").glob("*.errors.jsonl")
    assert json.loads(errors.read_text())["file_name"].endswith(".tar/b.png")


def test_somebody_elses_file_in_the_place_of_a_digest_stays(tiny_dataset, tmp_path):
    for path in tiny_dataset:
        shutil.copy(path, tmp_path / path.name)
    dataset = Dataset.open(*(tmp_path / path.name for path in tiny_dataset))
    kept = tmp_path / f".{tiny_dataset[0].name}.pixels"
    kept.write_text("my thesis\n")
    assert re.fullmatch("[0-9a-f]{32}", pixel_digest(dataset)) and kept.read_text() == "my thesis\n"
