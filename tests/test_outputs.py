"""No output of a command replaces an input, a file of somebody else's, a picture, or what is no file."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import h5py
import pytest
from hostile import encoded, photo

from captioner.errors import InputError
from captioner.runtime import outputs
from captioner.runtime.files import atomic_write, remove_left_over

SOMEBODYS = "thesis, final version\n"


@pytest.fixture(autouse=True)
def forget():
    yield
    outputs.begin()


def refused(done: subprocess.CompletedProcess, message: str) -> None:
    assert done.returncode == 1, done
    line = done.stderr.strip().splitlines()[-1]
    assert ": error: " in line and message in line, line


@pytest.fixture
def scored(tmp_path):
    """Arguments of a small caption-score."""
    (tmp_path / "p.json").write_text(json.dumps([{"image_id": 1, "caption": "a dog"}]))
    (tmp_path / "r.json").write_text(json.dumps([{"image_id": 1, "captions": ["a dog runs"]}]))
    return ["--predictions", tmp_path / "p.json", "--references", tmp_path / "r.json", "--metrics", "Bleu"]


def spellings(path: Path) -> list[Path]:
    """Other names of a file."""
    (path.parent / "sub").mkdir()
    link, hard = path.with_name("link.json"), path.with_name("hard.json")
    link.symlink_to(path)
    os.link(path, hard)
    return [path, path.parent / "sub" / ".." / path.name, link, hard]


def test_an_input_is_never_replaced_whatever_it_is_called(scored, command, tmp_path):
    before = (tmp_path / "r.json").read_bytes()
    for name in spellings(tmp_path / "r.json"):
        for more in ([], ["--overwrite", 1]):
            refused(command("score", *scored, "--output", name, *more), "is an input of this command")
    assert (tmp_path / "r.json").read_bytes() == before


def test_what_we_wrote_is_replaced_and_what_others_wrote_is_not(scored, command, tmp_path):
    output = tmp_path / "scores.json"
    assert command("score", *scored, "--output", output).returncode == 0
    first = output.read_bytes()
    assert outputs.kind_of(output) == "scores"
    assert command("score", *scored, "--output", output).returncode == 0
    assert output.read_bytes() == first
    output.write_text(SOMEBODYS)
    refused(command("score", *scored, "--output", output), "was not written by this program")
    assert output.read_text() == SOMEBODYS
    assert command("score", *scored, "--output", output, "--overwrite").returncode == 0
    assert output.read_bytes() == first


@pytest.mark.parametrize("name", ["/dev/null", "/dev/full", "folder", "pipe", "p" * 300])
def test_outputs_that_cannot_be_files_fail_before_the_work(name, scored, command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    before = os.stat(name) if len(name) < 256 else None
    done = command("score", *scored, "--output", name)
    refused(done, f"--output: {name}: ")
    assert done.stdout == ""
    if before:
        assert os.stat(name).st_mode == before.st_mode


def test_a_dataset_replaces_datasets_only(command, tmp_path):
    (tmp_path / "photos").mkdir()
    for number in range(3):
        (tmp_path / "photos" / f"{number}.png").write_bytes(encoded(photo(8, 8, number), "PNG"))
        (tmp_path / "photos" / f"{number}.txt").write_text("a dog\n")
    argv = ["--input_json", tmp_path / "photos", "--num_val", 1, "--word_count_threshold", 0, "--num_workers", 0]
    files = ["--output_json", tmp_path / "d.json", "--output_h5", tmp_path / "d.h5"]
    for _ in range(2):
        assert command("prepro", *argv, *files).returncode == 0
    assert [outputs.kind_of(tmp_path / name) for name in ("d.json", "d.h5")] == ["dataset", "dataset"]
    assert command("prepro", *argv, *files, "--check").returncode == 0
    for name in ("d.json", "d.h5"):
        whole = (tmp_path / name).read_bytes()
        if name == "d.h5":
            with h5py.File(tmp_path / name, "w") as file:
                file["measurements"] = [1.0, 2.0]
        else:
            (tmp_path / name).write_text(json.dumps({"ix_to_word": {}, "images": []}))  # another program's
        foreign = (tmp_path / name).read_bytes()
        refused(command("prepro", *argv, *files), f"{name}: exists, and was not written by this program")
        assert (tmp_path / name).read_bytes() == foreign
        (tmp_path / name).write_bytes(whole)
    refused(command("prepro", *argv, "--check", 1, "--output", tmp_path / "d.json"), "holds something else (dataset)")
    refused(command("prepro", *argv, "--output_json", tmp_path / "x", "--output_h5", tmp_path / "x"), "are both")
    annotations = tmp_path / "a.json"
    annotations.write_text(json.dumps([{"file_path": "photos/0.png", "captions": ["a dog"]}]))
    before = annotations.read_bytes()
    check = ["--input_json", annotations, "--num_val", 0, "--check", 1, "--output", annotations]
    refused(command("prepro", *check), "is an input of this command")
    assert annotations.read_bytes() == before


def test_pictures_are_never_replaced_by_the_way(tmp_path):
    picture = tmp_path / "holiday.txt"
    picture.write_bytes(encoded(photo(), "JPEG"))
    with pytest.raises(InputError, match="is a picture"), atomic_write(picture, "w") as stream:
        stream.write("a dog\n")
    assert picture.read_bytes() == encoded(photo(), "JPEG")


def test_a_link_is_followed_and_odd_text_is_kept(tmp_path):
    (tmp_path / "link.json").symlink_to(tmp_path / "target.json")
    with atomic_write(tmp_path / "link.json", "w") as stream:
        json.dump("bytes \udcff", stream, ensure_ascii=False)
    assert (tmp_path / "link.json").is_symlink()
    assert json.loads((tmp_path / "target.json").read_text()) == "bytes \udcff"


def test_temporary_files_of_killed_processes_go_those_of_living_ones_stay(tmp_path):
    program = """
import os, sys
from captioner.runtime.files import atomic_write
with atomic_write(sys.argv[1]) as stream:
    stream.write(b"half")
    stream.flush()
    print("written", flush=True)
    sys.stdin.read()
"""
    argv = [sys.executable, "-c", program, str(tmp_path / "model.pt")]
    start = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "cwd": Path(__file__).parents[1]}
    killed, living = subprocess.Popen(argv, **start), subprocess.Popen(argv, **start)
    for process in (killed, living):
        assert process.stdout.readline() == b"written\n"
    killed.kill()
    killed.wait()
    (tmp_path / ".notes.abcdefgh.tmp").write_text(SOMEBODYS)
    assert len(list(tmp_path.iterdir())) == 3
    done = subprocess.run([*argv], cwd=Path(__file__).parents[1], input=b"", capture_output=True, check=True)
    assert done.stdout == b"written\n"
    assert len([path for path in tmp_path.iterdir() if path.name.startswith(".model")]) == 1
    living.communicate(b"")
    assert sorted(path.name for path in tmp_path.iterdir()) == [".notes.abcdefgh.tmp", "model.pt"]


def test_temporary_files_are_found_by_relative_names_in_whatever_folder_the_process_is(tmp_path, monkeypatch):
    for name in ("one", "two"):
        (tmp_path / name / "run").mkdir(parents=True)
        monkeypatch.chdir(tmp_path / name)
        left = Path("run", ".model.pt.abcdefgh.tmp")
        left.write_bytes(b"half")
        remove_left_over(Path("run", "model.pt"))
        assert not left.exists(), name


def test_models_are_told_from_other_archives(tmp_path):
    shutil.make_archive(str(tmp_path / "photos"), "zip", Path(__file__).parent / "data")
    assert outputs.kind_of(tmp_path / "photos.zip") is None
