"""Captions as metadata of photos, read back by ExifTool; and that nothing else of a photo changes."""

import hashlib
import io
import json
import os
import struct
import subprocess
import zlib
from pathlib import Path

import numpy as np
import pytest
from hostile import png_chunk
from PIL import Image, ImageCms, PngImagePlugin

import captioner.inference.watch
from captioner.errors import InputError
from captioner.inference.watch import WatchedFolder
from captioner.output.photo_metadata import PhotoMetadata
from captioner.runtime import files
from captioner.runtime.files import rewrite

CPU = ["--gpuid", -1, "--precision", "fp32", "--vis_dir", ""]
XMP = (
    b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">'
    b'<rdf:Description rdf:about="" xmlns:xmp="http://ns.adobe.com/xap/1.0/" xmlns:dc="http://purl.org/dc/elements/1.1/"'
    b' xmlns:mine="http://example.org/mine/" xmp:Rating="4" mine:history="gz00eJw">'
    b"<dc:subject><rdf:Bag><rdf:li>holiday</rdf:li></rdf:Bag></dc:subject>%s</rdf:Description></rdf:RDF></x:xmpmeta>"
)
GERMAN = b'<dc:description><rdf:Alt><rdf:li xml:lang="de">ein Hund</rdf:li></rdf:Alt></dc:description>'


# In PNG's iTXt: no deflated bytes, no such fields, 200 MB of nothing in 200 kB, and deflated bytes that are cut off.
ODD_XMP = (
    *(b"\1\0\0\0no deflated bytes", b"\1\0", b"\1\0\0\0" + zlib.compress(bytes(2 * 10**8), 9)),
    b"\1\0\0\0" + zlib.compress(b"<x:xmpmeta/>" * 9)[:-5],
)


def with_compressed_xmp(data: bytes) -> bytes:
    png = saved(noise(), "PNG")
    return png[:33] + png_chunk(b"iTXt", b"XML:com.adobe.xmp\0" + data) + png[33:]


def noise(size=(48, 40), seed=0) -> Image.Image:
    rng = np.random.default_rng(seed)
    return Image.fromarray(rng.integers(0, 256, size=(*size, 3), dtype=np.uint8))


def saved(image: Image.Image, kind: str, **options) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def exif() -> bytes:
    tags = Image.Exif()
    tags[0x010F], tags[0x0112], tags[0x010E] = "Maker", 6, "OLYMPUS DIGITAL CAMERA"
    tags.get_ifd(0x8769)[0x927C] = b"maker's own \x00\x01\x02"
    tags.get_ifd(0x8825)[1] = "N"
    return tags.tobytes()


def segment(marker: int, data: bytes) -> bytes:
    return struct.pack(">BBH", 0xFF, marker, len(data) + 2) + data


def iptc(caption: bytes = b"") -> bytes:
    records = b"\x1c\x02\x50\x00\x04Anna" + (
        b"\x1c\x02\x78" + struct.pack(">H", len(caption)) + caption if caption else b""
    )
    padded = records + b"\0" * (len(records) % 2)
    return segment(0xED, b"Photoshop 3.0\0" + b"8BIM\x04\x04\0\0" + struct.pack(">I", len(records)) + padded)


def photos() -> dict[str, bytes]:
    """Files of all kinds, with all that people's programs put into them."""
    icc = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    jpeg = saved(noise(), "JPEG")
    text = PngImagePlugin.PngInfo()
    text.add_text("Author", "Anna")
    frames = [noise(seed=i) for i in range(3)]
    full = {"exif": exif(), "icc_profile": icc}
    return {
        "plain.jpg": jpeg,
        "full.jpg": saved(noise(), "JPEG", **full, comment=b"by Anna", progressive=True, quality=90),
        "cmyk.jpg": saved(noise().convert("CMYK"), "JPEG"),
        "grey.jpg": saved(noise().convert("L"), "JPEG", exif=exif()),
        "iptc.jpg": jpeg[:2] + iptc() + jpeg[2:],
        "rated.jpg": jpeg[:2] + segment(0xE1, b"http://ns.adobe.com/xap/1.0/\0" + XMP % b"") + jpeg[2:],
        "motion.jpg": saved(noise(), "JPEG", exif=exif()) + b"\0\0\0\x18ftypmp42 a film after the picture",
        "plain.png": saved(noise(), "PNG"),
        "full.png": saved(noise().convert("RGBA"), "PNG", **full, pnginfo=text, dpi=(300, 300)),
        "palette.png": saved(noise().convert("P"), "PNG", transparency=3),
        "sixteen.png": saved(Image.fromarray(np.arange(1600, dtype=np.uint16).reshape(40, 40)), "PNG"),
        "moving.png": saved(frames[0], "PNG", save_all=True, append_images=frames[1:]),
        "plain.webp": saved(noise(), "WEBP"),
        "lossless.webp": saved(noise().convert("RGBA"), "WEBP", lossless=True),
        "full.webp": saved(noise(), "WEBP", **full),
        "moving.webp": saved(frames[0], "WEBP", save_all=True, append_images=frames[1:], **full),
    }


def frames_of(content: bytes) -> list[bytes]:
    """Each frame's pixels, and what Pillow knows of colours and camera."""
    with Image.open(io.BytesIO(content)) as image:
        found = [repr((image.mode, image.size, image.info.get("icc_profile"), dict(image.getexif()))).encode()]
        for number in range(getattr(image, "n_frames", 1)):
            image.seek(number)
            found.append(image.tobytes())
    return found


@pytest.fixture(scope="module")
def exiftool():
    """All tags of files as ExifTool reads them, by file name."""

    def read(*paths: Path) -> dict[str, dict]:
        done = subprocess.run(
            ["exiftool", "-json", "-G1", "-a", "-charset", "utf8", *map(str, paths)], capture_output=True, check=True
        )
        return {Path(tags["SourceFile"]).name: tags for tags in json.loads(done.stdout)}

    return read


def test_descriptions_go_into_photos_and_nothing_else_changes(tmp_path, exiftool):
    before = photos()
    for name, content in before.items():
        (tmp_path / name).write_bytes(content)
        os.chmod(tmp_path / name, 0o640)
        os.utime(tmp_path / name, ns=(1_500_000_000_123_456_789, 1_400_000_000_987_654_321))
    paths = [tmp_path / name for name in before]
    tags_before = exiftool(*paths)
    metadata = PhotoMetadata("embed")
    for path in paths:
        assert not metadata.is_captioned(path)
        metadata.write(path, 'a dog & a "café" <in> 東京')
        assert metadata.is_captioned(path)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(before)  # no sidecar: all took it
    tags_after = exiftool(*paths)
    of_the_file = (
        "System:",
        "SourceFile",
        "XMP-x:XMPToolkit",
        "XMP-dc:Description",
        "ExifTool:",
        "Composite:",
        "RIFF:",
        "File:FileType",
    )
    for name, content in before.items():
        after = (tmp_path / name).read_bytes()
        assert frames_of(after) == frames_of(content), name
        if name.endswith(".webp"):  # the header says how long the file is, and that there is more than a picture
            assert after.find(content[12 if content[12:16] != b"VP8X" else 30 :]) > 0, name
        elif name != "rated.jpg":  # whose packet was replaced
            same = next(i for i, (a, b) in enumerate(zip(after, content, strict=False)) if a != b)
            assert after.endswith(content[same:]), name
        assert tags_after[name]["XMP-dc:Description"] == 'a dog & a "café" <in> 東京', name
        kept, now = (
            {tag: value for tag, value in tags[name].items() if not tag.startswith(of_the_file)}
            for tags in (tags_before, tags_after)
        )
        assert now == kept, name
        status = (tmp_path / name).stat()
        assert (status.st_mode & 0o777, status.st_mtime_ns) == (0o640, 1_400_000_000_987_654_321)
        assert "Warning" not in str(tags_after[name].keys() - tags_before[name].keys())
    assert (tmp_path / "motion.jpg").read_bytes().endswith(b"a film after the picture")
    sums = [hashlib.sha256(path.read_bytes()).digest() for path in paths]
    for path in paths:
        metadata.write(path, 'a dog & a "café" <in> 東京')  # nothing to do
        metadata.write(path, "a cat")  # it has a description
        metadata.write(path, "")
    assert [hashlib.sha256(path.read_bytes()).digest() for path in paths] == sums
    PhotoMetadata("embed", "replace").write(paths[0], "a cat")
    assert exiftool(paths[0])["plain.jpg"]["XMP-dc:Description"] == "a cat"


def test_sidecars_keep_what_other_programs_wrote(tmp_path, exiftool):
    jpeg = photos()["plain.jpg"]
    for name in ("new.jpg", "edited.jpg", "described.jpg", "broken.jpg"):
        (tmp_path / name).write_bytes(jpeg)
    (tmp_path / "edited.jpg.xmp").write_bytes(XMP % b"")
    (tmp_path / "described.jpg.xmp").write_bytes(XMP % GERMAN)
    (tmp_path / "broken.jpg.xmp").write_bytes(b"no xmp at all")
    (tmp_path / "new.xmp").write_bytes(b"of new.cr2")
    metadata = PhotoMetadata("xmp")
    done = [name for name in ("new", "edited", "described") if metadata.is_captioned(tmp_path / f"{name}.jpg")]
    assert done == ["described"]
    for name in ("new.jpg", "edited.jpg", "described.jpg", "broken.jpg"):
        metadata.write(tmp_path / name, "ein <Hund> läuft")
        assert (tmp_path / name).read_bytes() == jpeg
    tags = exiftool(*(tmp_path / f"{name}.jpg.xmp" for name in ("new", "edited", "described")))
    assert tags["new.jpg.xmp"]["XMP-dc:Description"] == "ein <Hund> läuft"
    edited = tags["edited.jpg.xmp"]
    assert edited["XMP-dc:Description"] == "ein <Hund> läuft"
    assert (edited["XMP-xmp:Rating"], edited["XMP-dc:Subject"]) == (4, "holiday")
    assert b"gz00eJw" in (tmp_path / "edited.jpg.xmp").read_bytes()
    assert (tmp_path / "described.jpg.xmp").read_bytes() == XMP % GERMAN
    assert (tmp_path / "broken.jpg.xmp").read_bytes() == b"no xmp at all"
    assert (tmp_path / "new.xmp").read_bytes() == b"of new.cr2"
    PhotoMetadata("xmp", "replace").write(tmp_path / "described.jpg", "a dog")
    described = exiftool(tmp_path / "described.jpg.xmp")["described.jpg.xmp"]
    assert (described["XMP-dc:Description"], described["XMP-dc:Description-de"]) == ("a dog", "ein Hund")


def test_what_cannot_take_it_inside_gets_a_sidecar(tmp_path, caplog, monkeypatch):
    jpeg = photos()["plain.jpg"]
    several = {
        "moving.gif": saved(noise(), "GIF"),
        "scan.tif": saved(noise(), "TIFF"),
        "cut.jpg": jpeg[:300],
        "readonly.jpg": jpeg,
        **{f"odd{number}.png": with_compressed_xmp(data) for number, data in enumerate(ODD_XMP)},
        "long.jpg": jpeg[:2] + segment(0xE1, b"http://ns.adobe.com/xmp/extension/\0" + b"0" * 900) + jpeg[2:],
    }
    for name, content in several.items():
        (tmp_path / name).write_bytes(content)
    os.chmod(tmp_path / "readonly.jpg", 0o444)
    metadata = PhotoMetadata("embed")
    for name, content in several.items():
        metadata.write(tmp_path / name, "a dog")
        if name != "long.jpg":
            assert (tmp_path / name).read_bytes() == content, name
            assert (tmp_path / f"{name}.xmp").exists() and f"its caption goes into {name}.xmp" in caplog.text
        assert metadata.is_captioned(tmp_path / name)
    after = (tmp_path / "long.jpg").read_bytes()  # either way nothing of it is lost
    assert several["long.jpg"][2:920] in after and after.endswith(jpeg[-200:])


@pytest.mark.parametrize("odd", ["pipe", "endless", "sparse"])
def test_what_came_in_a_photo_s_place_is_not_read(tmp_path, odd):
    photo = tmp_path / "photo.jpg"
    if odd == "pipe":
        os.mkfifo(photo)
    elif odd == "endless":
        photo.symlink_to("/dev/zero")
    else:
        with photo.open("wb") as stream:
            stream.truncate(30 * 2**30)
    with pytest.raises(InputError, match=r"photo\.jpg|/dev/zero"):
        rewrite(photo, lambda content: content + b"x")
    assert os.listdir(tmp_path) == ["photo.jpg"]


def test_a_library_that_would_lose_something_is_not_believed(tmp_path, caplog, monkeypatch):
    jpeg = photos()["rated.jpg"]
    (tmp_path / "good.jpg").write_bytes(jpeg)
    metadata = PhotoMetadata("embed")
    real = metadata._exiv2.ImageData.modify_xmp
    monkeypatch.setattr(
        metadata._exiv2.ImageData, "modify_xmp", lambda self, data: real(self, {**data, "Xmp.xmp.Rating": "5"})
    )
    metadata.write(tmp_path / "good.jpg", "a dog")
    assert (tmp_path / "good.jpg").read_bytes() == jpeg
    assert "other metadata would change" in caplog.text


def test_iptcs_caption_counts_as_a_description(tmp_path):
    jpeg = photos()["plain.jpg"]
    content = jpeg[:2] + iptc(b"by Anna, 1999") + jpeg[2:]
    (tmp_path / "a.jpg").write_bytes(content)
    metadata = PhotoMetadata("embed")
    assert metadata.is_captioned(tmp_path / "a.jpg")
    metadata.write(tmp_path / "a.jpg", "a dog")
    assert (tmp_path / "a.jpg").read_bytes() == content


@pytest.mark.parametrize("at_fault", ["write", "replace", "another program"])
def test_a_photo_survives_what_goes_wrong(tmp_path, monkeypatch, at_fault):
    path = tmp_path / "a.jpg"
    ours = photos()["full.jpg"]
    path.write_bytes(ours)
    theirs = ours + b"more"

    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    def change(content: bytes) -> bytes:
        if at_fault == "another program":
            path.write_bytes(theirs)
        return content + b"metadata"

    if at_fault != "another program":
        monkeypatch.setattr(files.os, "fsync" if at_fault == "write" else "replace", fail)
    with pytest.raises(InputError, match="changed meanwhile" if at_fault == "another program" else "No space left"):
        rewrite(path, change)
    assert path.read_bytes() == (theirs if at_fault == "another program" else ours)
    assert list(tmp_path.iterdir()) == [path]


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "photos").mkdir()
    for seed, name in enumerate(("a", "b", "c")):
        noise((64, 64), seed).save(tmp_path / "photos" / f"{name}.jpg")
    return tmp_path / "photos"


def said(done) -> dict[str, str]:
    parts = [line.split(": ", 1)[1].rsplit("  ", 1) for line in done.stdout.splitlines()]
    return {Path(name.strip("()")).name: caption for caption, name in parts}


def test_the_command_embeds_only_when_asked_and_then_only_what_is_missing(
    tiny_model, command, folder, tmp_path, exiftool
):
    paths = sorted(folder.iterdir())
    before = {path: path.read_bytes() for path in paths}
    run = [*paths, "--model", tiny_model, *CPU]
    assert command("eval", *run, "--output", tmp_path / "o.json").returncode == 0
    assert {path: path.read_bytes() for path in folder.iterdir()} == before

    done = command("eval", *run, "--write_metadata", "embed")  # photos that are named are inputs of the command
    assert done.returncode == 0, done.stderr
    captions = said(done)
    assert {name: tags["XMP-dc:Description"] for name, tags in exiftool(*paths).items()} == captions
    assert sorted(folder.iterdir()) == paths

    noise((64, 64), 9).save(folder / "d.png")
    done = command("eval", folder, "--model", tiny_model, *CPU, "--write_metadata", "embed", "--only_missing")
    assert said(done).keys() == {"d.png"} and "3 of 4 photos have their caption" in done.stderr
    done = command("eval", folder, "--model", tiny_model, *CPU, "--write_metadata", "embed", "--write_txt")
    assert said(done).keys() == {"a.jpg", "b.jpg", "c.jpg", "d.png"} and "kept" not in done.stderr  # the same captions
    done = command(
        "eval", folder, "--model", tiny_model, *CPU, "--write_metadata", "xmp", "--write_txt", "--only_missing"
    )
    assert sorted(path.name for path in folder.glob("*.xmp")) == [
        f"{name}.xmp" for name in sorted(captions | {"d.png": ""})
    ]


def test_an_interrupted_run_goes_on_though_photos_have_grown(tiny_model, command, folder, tmp_path, monkeypatch):
    from captioner.output.results import Journal

    run = ["eval", folder, "--model", tiny_model, *CPU, "--write_metadata", "embed", "--output", tmp_path / "o.jsonl"]
    append, calls = Journal.append, []

    def once(self, *arguments):
        calls.append(arguments)
        if len(calls) == 2:
            raise KeyboardInterrupt
        append(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(Journal, "append", once)
        assert command(*run, "--batch_size", 2).returncode == 130
    done = command(*run, "--batch_size", 2, "--resume")
    assert done.returncode == 0, done.stderr
    assert said(done).keys() == {"c.jpg"} and "going on after 2" in done.stderr
    rows = [json.loads(line)["caption"] for line in (tmp_path / "o.jsonl").read_text().splitlines()]
    metadata = PhotoMetadata("embed")
    for path, caption in zip(sorted(folder.iterdir()), rows, strict=True):
        assert f">{caption}<".encode() in path.read_bytes() and metadata.is_captioned(path)


def test_a_watched_folder_takes_no_photo_for_new_because_of_our_metadata(folder, monkeypatch):
    monkeypatch.setattr(captioner.inference.watch, "SETTLE_SECONDS", 0.1)
    monkeypatch.setattr(captioner.inference.watch, "POLL_SECONDS", 0.1)
    metadata, rows = PhotoMetadata("embed"), []

    def arrivals(watched: WatchedFolder, looks: int) -> list[str]:
        names: list[str] = []
        left = iter(range(looks))
        for positions in watched.arrivals(lambda: next(left, None) is None, 100):
            for position in positions:
                photo = watched.picture(position)
                names.append(photo.name)
                rows.append(
                    {"file_name": photo.name, "image_id": str(position + 1), "modified": watched.modified(position)}
                )
                metadata.write(photo, "a dog")
            watched.written_by_us(positions)
            watched.forget(positions)
        return names

    watched = WatchedFolder(folder, False)
    assert sorted(arrivals(watched, 12)) == ["a.jpg", "b.jpg", "c.jpg"]
    assert all(metadata.is_captioned(path) for path in folder.iterdir())
    assert arrivals(watched, 6) == []
    again = WatchedFolder(folder, False)
    again.skip(rows)
    assert arrivals(again, 6) == []
    noise((64, 64), 9).save(folder / "b.jpg")  # changed by its owner
    assert arrivals(again, 12) == ["b.jpg"]


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--write_metadata", "embed", "https://example.org/a.jpg"], "--write_metadata writes beside photos, and addr"),
        (
            ["--write_metadata", "xmp", "https://a.org", "--write_txt"],
            "--write_txt writes beside photos, and addresses",
        ),
        (["--only_missing", "a.jpg"], "add --write_txt or --write_metadata"),
    ],
)
def test_contradictions_are_one_line(command, arguments, told):
    done = command("eval", *arguments)
    assert done.returncode == 1 and told in done.stderr.splitlines()[-1]
