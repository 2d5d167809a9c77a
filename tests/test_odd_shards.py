"""Shards as other programs and hands write them: names with ./, links, compressed or empty archives, odd columns."""

import io
import json
import subprocess
import tarfile
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pytest
from hostile import encoded, photo
from pyarrow import parquet

from captioner.data.images import read_file
from captioner.data.records import read_records
from captioner.data.shards import Member, read_members
from captioner.errors import InputError

PICTURES = [encoded(photo(64, 48, seed=number), "JPEG") for number in range(3)]


def write_tar(path: Path, files: dict[str, bytes], mode: str = "w") -> None:
    with tarfile.open(path, mode) as archive:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))


def test_names_that_tar_itself_writes(tmp_path: Path, tiny_model: Path, command: Callable) -> None:
    """`tar cf shard.tar .` begins every name with ./"""
    folder = tmp_path / "photos" / "deep.er"
    folder.mkdir(parents=True)
    for number, data in enumerate(PICTURES):
        (folder / f"{number}.jpg").write_bytes(data)
        (folder / f"{number}.txt").write_text(f"a dog number {number}")
    shard = tmp_path / "0.tar"
    subprocess.run(["tar", "--sort=name", "-cf", shard, "-C", tmp_path / "photos", "."], check=True)
    names = [f"deep.er/{number}.jpg" for number in range(3)]
    assert [(record.file_path, record.captions) for record in read_records(shard)] == [
        (name, [f"a dog number {number}"]) for number, name in enumerate(names)
    ]
    assert [read_file(shard / name) for name in names] == PICTURES
    assert [(one.id, one.file_name, one.data) for one in read_members(str(shard))] == [
        (f"deep.er/{number}", f"0.tar/deep.er/{number}.jpg", data) for number, data in enumerate(PICTURES)
    ]
    argv = ["eval", shard, "--model", tiny_model, "--gpuid", -1, "--vis_dir", ""]
    done = command(*argv)
    assert done.returncode == 0 and done.stdout.count("\n") == 3, done.stderr
    write_tar(tmp_path / "1.tar", {"/root/a.jpg": PICTURES[0], "/root/a.txt": b"a cat"})
    assert [(record.file_path, record.captions) for record in read_records(tmp_path / "1.tar")] == [
        ("root/a.jpg", ["a cat"])
    ]


def test_links_are_followed_where_an_archive_can_be_searched_and_else_listed(tmp_path: Path) -> None:
    shard = tmp_path / "0.tar"
    write_tar(shard, {"a.jpg": PICTURES[0]})
    with tarfile.open(shard, "a") as archive:
        for name, kind in (
            ("hard.jpg", tarfile.LNKTYPE),
            ("soft.jpg", tarfile.SYMTYPE),
            ("folder.jpg", tarfile.DIRTYPE),
        ):
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, "" if kind == tarfile.DIRTYPE else "a.jpg"
            archive.addfile(member)
    assert [(one.id, one.error) for one in read_members(str(shard))] == [
        ("a", ""),
        ("hard", "is a link to a.jpg"),
        ("soft", "is a link to a.jpg"),
    ]
    assert read_file(shard / "hard.jpg") == PICTURES[0]


def test_compressed_and_empty_shards_say_what_they_are(tmp_path: Path, tiny_model: Path, command: Callable) -> None:
    reasons = {"empty.tar": "is empty", "nothing.parquet": "is empty"}
    for name in reasons:
        (tmp_path / name).touch()
    for program, ending in (("gzip", "gz"), ("bzip2", "bz2"), ("xz", "xz")):
        write_tar(tmp_path / f"{program}.tar", {"a.jpg": PICTURES[0], "a.txt": b"a dog"}, f"w:{ending}")
        reasons[f"{program}.tar"] = f"is compressed with {program}: decompress it first"
    (tmp_path / "a.tgz").write_bytes((tmp_path / "gzip.tar").read_bytes())
    for name, reason in [*reasons.items(), ("a.tgz", reasons["gzip.tar"])]:
        with pytest.raises(InputError, match=f"{name}: {reason}$"):
            list(read_members(str(tmp_path / name)))
        with pytest.raises(InputError, match=f"{name}: {reason}$"):
            read_records(tmp_path / name)
    write_tar(tmp_path / "sound.tar", {"a.jpg": PICTURES[0]})
    argv = ["eval", tmp_path, "--model", tiny_model, "--gpuid", -1, "--output_dir", tmp_path / "out"]
    done = command(*argv)
    assert done.returncode == 1 and "5 of 6 shards could not be read" in done.stderr.splitlines()[-1]
    assert all(f"skipped {tmp_path}/{name}: {reason}\n" in done.stderr for name, reason in reasons.items())
    assert [path.name for path in (tmp_path / "out").glob("*.jsonl")] == ["sound.jsonl"]


def test_a_json_without_a_caption_leaves_the_word_to_the_text(tmp_path: Path) -> None:
    files = {"a.jpg": PICTURES[0], "a.txt": b"a dog", "a.json": json.dumps({"url": "u", "caption": None}).encode()}
    files |= {"b.jpg": PICTURES[1], "b.txt": b"a cat", "b.json": b"{"}
    files |= {"c.jpg": PICTURES[2], "c.txt": b"a bus", "c.json": b'{"caption": "a red bus"}'}
    write_tar(tmp_path / "0.tar", files)
    assert [record.captions for record in read_records(tmp_path / "0.tar")] == [["a dog"], ["a cat"], ["a red bus"]]


@pytest.mark.parametrize(
    "column",
    [
        pa.array(PICTURES[:2]).dictionary_encode(),  # as pandas writes categories
        pa.array(PICTURES[:2], pa.large_binary()),
        pa.array(PICTURES[:2], getattr(pa, "binary_view", pa.binary)()),  # as polars does; older pyarrows know none
        pa.array([{"bytes": data, "path": "p.jpg"} for data in PICTURES[:2]]),
    ],
    ids=lambda column: str(column.type).partition("<")[0],
)
def test_kinds_of_columns_however_they_are_spelt(tmp_path: Path, column: pa.Array) -> None:
    table = pa.table({"Mask": [b"x", b"y"], "Image": column, "caption": ["a dog", "a cat"]})
    parquet.write_table(table, tmp_path / "a.parquet")
    assert list(read_members(str(tmp_path / "a.parquet"))) == [
        Member("0", "a.parquet/0", PICTURES[0]),
        Member("1", "a.parquet/1", PICTURES[1]),
    ]
    assert [record.captions for record in read_records(tmp_path / "a.parquet")] == [["a dog"], ["a cat"]]
    assert read_file(tmp_path / "a.parquet" / "1") == PICTURES[1]
