"""The page's folder: nothing of anybody else's in it is replaced, and what we wrote is replaced whole."""

import json
import shutil
from pathlib import Path

import pytest

from captioner.errors import InputError
from captioner.output.manifest import NAME, Manifest
from captioner.output.page import VisWriter
from captioner.runtime.locks import sole_run

PHOTO = Path(__file__).parents[1] / "examples" / "cat.jpg"


def write_page(folder: Path, *ids: str) -> None:
    writer = VisWriter(folder)
    rows = [{"image_id": name, "caption": "a cat", **writer.add_pictures([(name, PHOTO)])[0]} for name in ids]
    writer.finish(rows)


@pytest.mark.parametrize("name", ["index.html", "page.js", "vis.json", "scores.json", "imgs/img2.jpg", "imgs/IMG7.JPG"])
def test_a_strangers_file_survives_byte_for_byte(name, tmp_path):
    (tmp_path / "imgs").mkdir()
    for content in (b"<!DOCTYPE html><title>my thesis</title>", PHOTO.read_bytes()):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(InputError, match=f"{name}: exists, and was not written by this program.*--overwrite 1"):
            VisWriter(tmp_path)
        assert (tmp_path / name).read_bytes() == content
        assert not (tmp_path / NAME).exists()
    VisWriter(tmp_path, overwrite=True)


def test_what_we_wrote_is_replaced_whole_with_its_pictures(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    write_page(tmp_path, "1", "2", "3")
    write_page(tmp_path, "2")
    assert [path.name for path in (tmp_path / "imgs").iterdir()] == ["img2.jpg"]
    assert (tmp_path / "notes.txt").read_text() == "mine"
    shutil.copytree(tmp_path, tmp_path / "copied")  # the list goes with its folder
    write_page(tmp_path / "copied", "2", "5")


def test_what_somebody_changed_since_is_his(tmp_path):
    write_page(tmp_path, "1")
    (tmp_path / "page.js").write_text("// mine now")
    with pytest.raises(InputError, match="page.js: exists"):
        VisWriter(tmp_path)


def test_a_killed_run_leaves_nothing_that_looks_like_somebody_elses(tmp_path):
    writer = VisWriter(tmp_path)
    writer.add_pictures([("1", PHOTO), ("2", PHOTO)])
    del writer
    write_page(tmp_path, "2")
    assert [path.name for path in (tmp_path / "imgs").iterdir()] == ["img2.jpg"]


@pytest.mark.parametrize(
    "name", ["../precious", "/etc/hostname", "imgs/../../precious", "a/b", "..", "imgs/..", 5, None]
)
def test_a_list_that_names_files_elsewhere_removes_nothing(name, tmp_path):
    (tmp_path / "precious").write_text("mine")
    folder = tmp_path / "vis"
    folder.mkdir()
    (folder / NAME).write_text(json.dumps([name, None]) + "\n{\n[1]\n\udcff", errors="surrogateescape")
    Manifest(folder).finish([])
    assert (tmp_path / "precious").read_text() == "mine"


def test_a_second_run_into_the_folder_leaves(command, tmp_path):
    (tmp_path / "vis").mkdir()
    argv = ["--image_folder", PHOTO.parent, "--vis_dir", tmp_path / "vis", "--gpuid", -1, "--num_images", 1]
    with sole_run(tmp_path / "vis" / ".lock", "the page"):
        done = command("eval", *argv)
        assert done.returncode == 1
        assert f"the page in {tmp_path / 'vis'} is in use by process " in done.stderr.splitlines()[-1]
        assert done.stdout == ""
    assert not list((tmp_path / "vis").iterdir())
