import json
from pathlib import Path

import pytest

from captioner.data.captioned import read_captioned
from captioner.errors import InputError


def test_cleaning_joins_drops_and_splits_into_words(tmp_path: Path) -> None:
    path = tmp_path / "raw.json"
    entries = [
        {"file_path": "a", "captions": ["A dog.", "..."], "id": 1},
        {"file_path": "b", "captions": ["?"], "id": 2},
        {"file_path": "a", "captions": ["Two dogs!"], "id": 1},
        {"file_path": "c", "captions": ["Three"], "id": 1},
    ]
    path.write_text(json.dumps(entries))
    kept, findings = read_captioned([str(path)])
    assert [(picture.file_path, picture.id) for picture in kept] == [("a", 1), ("c", None)]
    assert [picture.captions for picture in kept] == [["A dog.", "Two dogs!"], ["Three"]]
    assert [picture.words for picture in kept] == [[("a", "dog"), ("two", "dogs")], [("three",)]]
    assert findings.same_file_twice == ["a"] and findings.duplicate_ids == ["c"]
    assert findings.empty_captions == ["a", "b"] and findings.without_captions == ["b"]
    path.write_text(json.dumps([{"file_path": "a", "captions": ["x"], "split": s} for s in ("train", "test")]))
    with pytest.raises(InputError, match="'train' and in 'test'"):
        read_captioned([str(path)])


def test_inputs_of_one_name_are_told_apart_by_their_folders(tmp_path: Path) -> None:
    inputs = []
    for name in ("flickr", "coco"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "captions.csv").write_text("a.jpg,A dog.\n")
        inputs.append(str(tmp_path / name / "captions.csv"))
    pictures, _ = read_captioned(inputs, [str(tmp_path / "flickr"), str(tmp_path / "coco")])
    assert [picture.source for picture in pictures] == ["flickr/captions", "coco/captions"]
    assert [picture.file_path for picture in pictures] == ["flickr/a.jpg", "coco/a.jpg"]
    pictures, _ = read_captioned(inputs, [str(tmp_path)])  # the same picture described twice
    assert [(picture.file_path, picture.captions) for picture in pictures] == [("a.jpg", ["A dog.", "A dog."])]
