"""The page's folder: pictures, rows, scores, page files."""

import io
import json
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from captioner import output
from captioner.errors import InputError
from captioner.output.page import LONGEST_SIDE, VisWriter, safe_name

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.fixture
def writer(tmp_path: Path) -> VisWriter:
    return VisWriter(tmp_path / "new" / "vis")


def _add(writer: VisWriter, image_id: object, picture: Path | np.ndarray) -> str:
    (added,) = writer.add_pictures([(image_id, picture)])
    return added["image"]


def _picture(path: Path, size: tuple[int, int], mode: str = "RGB", **save_options: object) -> Path:
    width, height = size
    gradient = np.add.outer(np.arange(height), np.arange(width)) * 255 // (width + height)
    Image.fromarray(gradient.astype(np.uint8)).convert(mode).save(path, **save_options)
    return path


def test_a_finished_folder_holds_page_rows_scores_and_pictures(writer):
    image = _add(writer, "1", EXAMPLES / "cat.jpg")
    rows = [{"image_id": "1", "caption": "a cat, naïve", "file_name": "cat.jpg", "image": image}]
    index = writer.finish(iter(rows), {"CIDEr": 0.5})
    assert index == writer.folder / "index.html"
    assert index.read_bytes() == (EXAMPLES.parent / "vis" / "index.html").read_bytes()
    assert json.loads((writer.folder / "vis.json").read_text(encoding="utf-8")) == rows
    assert json.loads((writer.folder / "scores.json").read_text()) == {"CIDEr": 0.5}
    assert image == "imgs/img1.jpg"
    data = {"vis.json", "scores.json", "about.json"}
    expected = data | {f"{name}.js" for name in data} | {path.name for path in output.page_files.page_files()}
    expected |= {"imgs", ".captioner-files"}
    assert {path.name for path in writer.folder.iterdir()} == expected


def test_rows_know_the_size_of_their_pictures_as_they_are_seen(writer, tmp_path):
    turned = Image.new("RGB", (40, 20))
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter to the right
    turned.save(tmp_path / "turned.jpg", exif=exif)
    pictures = [_picture(tmp_path / "large.png", (2000, 1000)), _picture(tmp_path / "small.jpg", (30, 20))]
    added = writer.add_pictures(list(enumerate([*pictures, tmp_path / "turned.jpg", np.zeros((3, 5, 9), np.uint8)])))
    assert [(row["width"], row["height"]) for row in added] == [(800, 400), (30, 20), (20, 40), (9, 5)]


def test_scores_of_an_earlier_run_do_not_stay(writer):
    writer.finish([], {"CIDEr": 0.5})
    writer.finish([])
    assert json.loads((writer.folder / "scores.json").read_text()) == {}
    assert json.loads((writer.folder / "vis.json").read_text()) == []


def test_a_small_jpeg_is_copied_as_it_is(writer):
    image = _add(writer, 7, EXAMPLES / "cat.jpg")
    assert (writer.folder / image).read_bytes() == (EXAMPLES / "cat.jpg").read_bytes()


@pytest.mark.parametrize(
    ("name", "mode", "size", "options"),
    [
        ("large.jpg", "RGB", (2400, 600), {}),
        ("print.jpg", "CMYK", (300, 200), {}),
        ("palette.gif", "P", (300, 200), {}),
        ("clear.png", "RGBA", (300, 200), {}),
        ("scan.tif", "L", (900, 1800), {}),
        ("web.webp", "RGB", (640, 480), {}),
        ("named-jpg-but-png.jpg", "RGB", (30, 20), {"format": "PNG"}),
    ],
)
def test_any_format_becomes_a_jpeg_that_keeps_its_aspect(writer, tmp_path, name, mode, size, options):
    source = _picture(tmp_path / name, size, mode, **options)
    with Image.open(writer.folder / _add(writer, 1, source)) as copy:
        assert copy.format == "JPEG"
        assert copy.mode in ("RGB", "L")
        assert max(copy.size) == min(LONGEST_SIDE, max(size))
        assert copy.width / copy.height == pytest.approx(size[0] / size[1], rel=0.01)


def test_a_large_photo_taken_sideways_stands_upright(writer, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # the top of the scene is at the right of the stored picture
    stored = np.zeros((600, 1200, 3), np.uint8)
    stored[:, 600:] = 255
    Image.fromarray(stored).save(tmp_path / "phone.jpg", exif=exif)
    with Image.open(writer.folder / _add(writer, 1, tmp_path / "phone.jpg")) as copy:
        pixels = np.asarray(copy)
        assert copy.size == (LONGEST_SIDE // 2, LONGEST_SIDE)
        assert 0x0112 not in copy.getexif()
    # Turned clockwise, what was at the left is on top.
    assert pixels[:390].mean() < 5
    assert pixels[410:].mean() > 250


def test_an_array_becomes_a_picture_of_its_size(writer):
    pixels = np.zeros((3, 256, 256), np.uint8)
    pixels[0] = 200
    with Image.open(writer.folder / _add(writer, 1, pixels)) as copy:
        assert copy.size == (256, 256)
        assert np.allclose(np.asarray(copy).mean((0, 1)), (200, 0, 0), atol=3)


@pytest.mark.parametrize(
    "image_id", ["../../escape", "a/b", "a\\b", "", ".", "..", "CON:", "é", "x" * 300, "a\nb", None]
)
def test_no_id_leaves_the_folder(writer, image_id):
    image = _add(writer, image_id, np.zeros((3, 8, 8), np.uint8))
    folder, name = image.split("/")
    assert folder == "imgs"
    assert name.isascii()
    assert len(name) < 120
    assert [path.name for path in (writer.folder / "imgs").iterdir()] == [name]


def test_ids_keep_the_names_of_the_original():
    assert [safe_name(image_id) for image_id in (1, "42", "photo_7")] == ["img1", "img42", "imgphoto_7"]
    assert safe_name("a/b") != safe_name("a_b")


def test_equal_ids_keep_their_own_pictures(writer):
    greys = (0, 100, 200)
    added = writer.add_pictures(
        [(i, np.full((3, 8, 8), g, np.uint8)) for i, g in zip(("A", "A", "a"), greys, strict=True)]
    )
    images = [row["image"] for row in added]
    assert len({image.lower() for image in images}) == 3
    for image, grey in zip(images, greys, strict=True):
        with Image.open(writer.folder / image) as copy:
            assert np.asarray(copy).mean() == pytest.approx(grey, abs=2)


def test_a_picture_that_cannot_be_read_is_left_out_and_logged(writer, tmp_path, caplog):
    (tmp_path / "broken.jpg").write_bytes((EXAMPLES / "cat.jpg").read_bytes()[:90])
    assert _add(writer, 3, tmp_path / "broken.jpg") == ""
    assert _add(writer, 4, tmp_path / "gone.jpg") == ""
    assert "broken.jpg" in caplog.text
    assert "image 4" in caplog.text
    assert _add(writer, 5, EXAMPLES / "cat.jpg") == "imgs/img5.jpg"


def test_a_folder_that_cannot_be_made_is_refused_at_once(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="file.*choose another folder"):
        VisWriter(tmp_path / "file")


def test_a_run_that_breaks_off_leaves_the_old_rows(writer):
    def broken_rows():
        yield {"image_id": 2, "caption": "new"}
        raise RuntimeError

    writer.finish([{"image_id": 1, "caption": "old"}])
    with pytest.raises(RuntimeError):
        writer.finish(broken_rows())
    assert json.loads((writer.folder / "vis.json").read_text()) == [{"image_id": 1, "caption": "old"}]
    assert not list(writer.folder.glob("*.tmp"))


def test_many_rows_pass_through_little_memory(writer):
    rows = ({"image_id": i, "caption": "a dog runs through the grass " * 5} for i in range(20_000))
    tracemalloc.start()
    writer.finish(rows)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert (writer.folder / "vis.json").stat().st_size > 3_000_000
    assert peak < 1_000_000


def test_the_working_copy_is_its_own_page(tmp_path, monkeypatch):
    page = tmp_path / "index.html"
    page.write_text("<!DOCTYPE html>")
    before = page.stat()
    for module in (output.page, output.page_files):
        monkeypatch.setattr(module, "page_files", lambda: [page])
    VisWriter(tmp_path).finish([])
    assert page.stat().st_ino == before.st_ino


def test_examples_suit_the_page_as_they_are():
    credits = (EXAMPLES / "CREDITS.md").read_text(encoding="utf-8")
    photos = sorted(EXAMPLES.glob("*.jpg"))
    assert len(photos) >= 8
    for photo in photos:
        assert photo.name in credits and photo.stat().st_size < 60_000
        with Image.open(io.BytesIO(photo.read_bytes())) as image:
            assert max(image.size) <= LONGEST_SIDE
