import io
import json
from pathlib import Path

import pytest
from hostile import encoded, photo

from captioner.data.json_stream import JsonError, JsonStream
from captioner.data.records import Record, find_images_root, read_records
from captioner.errors import InputError

EXPECTED = [
    Record("a.jpg", ["A dog, running.", "One dog."]),
    Record("b.jpg", ["A cat."]),
]
ORIGINAL = [{"file_path": r.file_path, "captions": r.captions} for r in EXPECTED]
COCO = {
    "info": {"nested": [1, {"a": [2]}]},
    "annotations": [
        {"image_id": 7, "caption": "A dog, running."},
        {"image_id": 8, "caption": "A cat."},
        {"image_id": 7, "caption": "One dog."},
    ],
    "images": [{"id": 7, "file_name": "a.jpg"}, {"id": 8, "file_name": "b.jpg"}],
}
KARPATHY = {
    "dataset": "flickr8k",
    "images": [
        {"filename": r.file_path, "split": split, "imgid": index, "sentences": [{"raw": c} for c in r.captions]}
        for index, (r, split) in enumerate(zip(EXPECTED, ("restval", "test"), strict=True))
    ],
}
FORMS = {
    "original": json.dumps(ORIGINAL),
    "original over many lines": json.dumps(ORIGINAL, indent=2).replace("\n", "\r\n"),
    "with a byte order mark": "\ufeff" + json.dumps(ORIGINAL),
    "JSONL": "".join(json.dumps(entry) + "\n" for entry in ORIGINAL),
    "JSONL, one caption a line": "\n".join(
        json.dumps({"image": r.file_path, "caption": c}) for r in EXPECTED for c in r.captions
    ),
    "CSV": 'image,caption\na.jpg,"A dog, running."\na.jpg,One dog.\nb.jpg,A cat.\n',
    "CSV, not quoted": "image,caption\na.jpg,A dog, running.\na.jpg,One dog.\nb.jpg,A cat.\n",
    "CSV without a header": "a.jpg,A dog, running.\na.jpg,One dog.\n\nb.jpg,A cat.\n",
    "CSV of another order": 'caption,number,file_name\n"A dog, running.",1,a.jpg\nOne dog.,2,a.jpg\nA cat.,1,b.jpg\n',
    "TSV": "image\tcaption\na.jpg\tA dog, running.\na.jpg\tOne dog.\nb.jpg\tA cat.\n",
    "bars": "image_name| comment_number| comment\na.jpg| 0| A dog, running.\na.jpg| 1| One dog.\nb.jpg| 0| A cat.\n",
    "token": "a.jpg#0\tA dog, running.\na.jpg#1\tOne dog.\nb.jpg#0\tA cat.\n",
}


@pytest.mark.parametrize("form", FORMS)
def test_forms_are_told_apart_by_content(tmp_path: Path, form: str) -> None:
    path = tmp_path / "data.whatever"
    path.write_bytes(FORMS[form].encode())
    assert read_records(path) == EXPECTED


def test_utf16_as_spreadsheets_write_it(tmp_path: Path) -> None:
    path = tmp_path / "data.txt"
    path.write_bytes(FORMS["TSV"].encode("utf-16"))
    assert read_records(path) == EXPECTED


@pytest.mark.parametrize("order", [("images", "annotations"), ("annotations", "images")])
def test_coco(tmp_path: Path, order: tuple[str, str]) -> None:
    path = tmp_path / "data"
    path.write_text(json.dumps({key: COCO[key] for key in ("info", *order)}))
    assert [(r.file_path, r.captions, r.id) for r in read_records(path)] == [
        ("a.jpg", ["A dog, running.", "One dog."], 7),
        ("b.jpg", ["A cat."], 8),
    ]


def test_karpathy(tmp_path: Path) -> None:
    path = tmp_path / "data"
    path.write_text(json.dumps(KARPATHY))
    assert [(r.file_path, r.captions, r.id, r.split) for r in read_records(path)] == [
        ("a.jpg", ["A dog, running.", "One dog."], 0, "train"),
        ("b.jpg", ["A cat."], 1, "test"),
    ]


def test_folder(tmp_path: Path) -> None:
    picture = encoded(photo(20, 20), "JPEG")
    for name in ("img10.jpg", "img2.jpg", "sub/c.png", "d.jpg"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(picture)
    (tmp_path / "img2.txt").write_text("\ufeffA dog.\n\n  A running dog.  \n", encoding="utf-8")
    (tmp_path / "img10.jpg.txt").write_text("Ein Hund im Grün.", encoding="utf-8")
    (tmp_path / "sub" / "c.txt").write_bytes(b"\xff\xfe\xfd")
    records = read_records(tmp_path)
    assert records == [
        Record("d.jpg", []),
        Record("img2.jpg", ["A dog.", "A running dog."]),
        Record("img10.jpg", ["Ein Hund im Grün."]),
        Record("sub/c.png", []),
    ]
    assert find_images_root(tmp_path, [record.file_path for record in records], "") == tmp_path
    assert read_records(tmp_path, tmp_path.parent)[0].file_path == f"{tmp_path.name}/d.jpg"


def test_names_of_class_folders_become_captions(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    for name in ("hot_dog/a.jpg", "cat/b.jpg", "top.jpg"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(encoded(photo(20, 20), "JPEG"))
    assert read_records(tmp_path) == [
        Record("cat/b.jpg", ["cat"]),
        Record("hot_dog/a.jpg", ["hot dog"]),
        Record("top.jpg", []),
    ]
    assert "2 names of folders become captions: 'cat', 'hot dog'" in caplog.text


def test_class_folders_of_splits(tmp_path: Path) -> None:
    for name in ("train/dog/a.jpg", "valid/dog/b.jpg", "test/cat/c.jpg"):
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).write_bytes(encoded(photo(20, 20), "JPEG"))
    assert [(r.captions, r.split) for r in read_records(tmp_path)] == [
        (["cat"], "test"),
        (["dog"], "train"),
        (["dog"], "val"),
    ]


def test_lists_of_path_and_label(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "train.txt"
    path.write_text("my photos/a.JPG hot_dog\nb.png cat, sleeping\n")
    expected = [Record("my photos/a.JPG", ["hot dog"]), Record("b.png", ["cat, sleeping"])]
    assert read_records(path) == expected
    path.write_text("my photos/a.JPG 0\nb.png 1\n")
    assert [record.captions for record in read_records(path)] == [["0"], ["1"]]
    assert "its labels are numbers" in caplog.text
    (tmp_path / "labels.txt").write_text("hot_dog\ncat, sleeping\n")
    assert read_records(path) == expected
    path.write_text("b.png 2\n")
    with pytest.raises(InputError, match="label 2, but .*labels.txt has 2 lines"):
        read_records(path)
    path.write_text("a.jpg dog\nb dog\n")
    with pytest.raises(InputError, match="line 2 is 'b dog'"):
        read_records(path)


def test_pictures_beside_the_description(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(b"")
    path = tmp_path / "data.json"
    path.write_text("[]")
    assert find_images_root(path, [record.file_path for record in EXPECTED], "") == tmp_path
    assert find_images_root(path, [], "elsewhere") == Path("elsewhere")
    assert find_images_root(path, ["nowhere.jpg"], "") == Path()


MISTAKES = {
    "": "is empty",
    "  \n ": "is empty",
    "\0\1\2": "is not text",
    "[]": "describes no pictures",
    "just words": "is no description",
    '[{"file_path": "a.jpg", "captions": ["a"]},\n {"captions": ["a"]}]': r"entry 1 \(line 2\): file_path is missing",
    '[{"file_path": "a.jpg"}]': "entry 0 .*: captions is missing",
    '[{"file_path": "a.jpg", "captions": {"a": 1}}]': "captions is {'a': 1}",
    '[{"file_path": "a.jpg", "captions": ["a", 5]}]': r"captions\[1\] is 5",
    '[{"file_path": 5, "captions": ["a"]}]': "file_path is 5",
    '[{"file_path": "", "captions": ["a"]}]': "file_path is ''",
    '[{"file_path": "a", "captions": [], "split": "tset"}]': "split is 'tset'; expected train",
    '[{"file_path": "a", "captions": [], "id": [1]}]': r"id is \[1\]",
    '["a.jpg"]': "entry 0 .* is 'a.jpg'",
    '[{"file_path": "a", "captions": [], "split": "val"}, {"file_path": "b", "captions": []}]': "b has no split",
    '[{"file_path": "a.jpg",\n "captions": ["a"]},\n {"file_path" "b.jpg"}]': "line 3",
    '[{"file_path": "a.jpg", "captions": ["a"]}': "line 1 .*end of the file",
    '[{"file_path": "a.jpg", "captions": ["a"]}] and more': "goes on with 'a'",
    "[" * 100_000: "nested too deeply",
    '{"images": []}': "has no annotations",
    '{"some": "thing"}': "its keys: some",
    '{"images": [{"file_name": "a.jpg"}], "annotations": []}': r"images\[0\] .*: id is missing",
    '{"images": [{"id": 1, "file_name": "a.jpg"}], "annotations": [{"image_id": 2, "caption": "a"}]}': "image_id 2",
    '{"images": [{"id": 1, "file_name": "a.jpg"}], "annotations": [{"image_id": 1}]}': "caption is missing",
    '{"image": "a.jpg", "caption": "x"}\n{"image": "b.jpg"\n': "line 2",
    '{"image": "a.jpg", "caption": "x"}\n\n{"image": "b.jpg"}\n': "line 3: captions is missing",
    '{"image": "a.jpg", "caption": "x"} {"image": "b.jpg"}\n': "one JSON object per line",
    "image,words\na.jpg,x\n": "the header is",
    "image,caption,split\na.jpg,x,train\nb.jpg,y\n": "line 3 has 2 columns",
    'image,caption\na.jpg,"open\nb.jpg,y\n': "not a proper table row",
    "image,caption\n,a dog\n": "line 2: file_path is missing",
    "a.jpg#0\tA dog.\nb.jpg A cat.\n": "line 2",
}


@pytest.mark.parametrize("content", MISTAKES)
def test_mistakes_are_named(tmp_path: Path, content: str) -> None:
    path = tmp_path / "data.json"
    path.write_text(content)
    with pytest.raises(InputError, match=MISTAKES[content]) as caught:
        read_records(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_a_file_that_is_no_utf8_is_named_with_its_line(tmp_path: Path) -> None:
    path = tmp_path / "data.csv"
    path.write_bytes("image,caption\na.jpg,ok\nb.jpg,Grün\n".encode("latin-1"))
    with pytest.raises(InputError, match="line 3 is not UTF-8"):
        read_records(path)
    for wrong in (tmp_path / "missing.json", Path("/dev/null")):
        with pytest.raises(InputError, match=str(wrong)):
            read_records(wrong)


def test_streamed_values_equal_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    import captioner.data.json_stream

    monkeypatch.setattr(captioner.data.json_stream, "_CHUNK", 3)
    values = [1, -2.5e10, True, None, 'ü\n"', [], {}, [[1], {"a": [2]}], 123456789012345678901]
    text = json.dumps(values, indent=1)
    assert list(JsonStream(io.StringIO(text)).elements()) == values
    stream = JsonStream(io.StringIO(json.dumps({"a": values, "b": 12})))
    seen = {}
    for key in stream.members():
        seen[key] = list(stream.elements()) if stream.peek() == "[" else stream.value()
    assert seen == {"a": values, "b": 12}
    with pytest.raises(JsonError) as caught:
        list(JsonStream(io.StringIO("[1,\n2,\n}")).elements())
    assert caught.value.line == 3
