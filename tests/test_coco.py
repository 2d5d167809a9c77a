"""coco/: annotations to records."""

import importlib.util
import json
from pathlib import Path
from types import ModuleType

import pytest

from captioner.data.address_lists import read_list
from captioner.data.records import read_records

COCO = Path(__file__).resolve().parents[1] / "coco"


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"coco_{name}", COCO / f"{name}.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    import sys

    sys.modules[spec.name] = module  # dataclasses look themselves up
    spec.loader.exec_module(module)
    return module


prepare = load("prepare")


def annotations(folder: Path) -> list[Path]:
    paths = []
    for split, first in (("val2014", 1), ("train2014", 10)):
        images = [{"id": first + i, "file_name": f"COCO_{split}_{first + i:012d}.jpg"} for i in range(3)]
        sentences = [{"id": i, "image_id": first + i % 3, "caption": f"A dog number {i} runs."} for i in range(6)]
        path = folder / f"captions_{split}.json"
        path.write_text(json.dumps({"info": {}, "images": images, "annotations": sentences}))
        paths.append(path)
    return paths


def test_annotations_are_joined_as_in_the_notebook(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = annotations(tmp_path)
    output, urls = tmp_path / "coco_raw.json", tmp_path / "urls.tsv"
    argv = ["--annotations", *map(str, paths), "--output", str(output), "--urls", str(urls)]
    assert prepare.main(argv) == 0
    entries = json.loads(output.read_text())
    assert entries[0] == {
        "file_path": "val2014/COCO_val2014_000000000001.jpg",
        "captions": ["A dog number 0 runs.", "A dog number 3 runs."],
        "id": 1,
    }
    assert [entry["id"] for entry in entries] == [1, 2, 3, 10, 11, 12]
    assert read_list(urls)[3].url == f"{prepare.IMAGES_URL}/train2014/COCO_train2014_000000000010.jpg"

    # The notebook, run cell by cell, writes the same.
    notebook = json.loads((COCO / "coco_preprocess.ipynb").read_text())
    monkeypatch.chdir(tmp_path)
    (tmp_path / "annotations").mkdir()
    for path in paths:
        path.rename(tmp_path / "annotations" / path.name)
    output.unlink()
    names: dict[str, object] = {}
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            assert not cell["outputs"], "committed without results"
            exec("".join(cell["source"]), names)
    assert json.loads(output.read_text()) == entries


def test_karpathys_splits(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    paths = annotations(tmp_path)
    karpathy = tmp_path / "dataset_coco.json"
    images = [
        {"filepath": "val2014", "filename": f"COCO_val2014_{i:012d}.jpg", "cocoid": i, "split": split,
         "sentences": [{"raw": "His words.", "tokens": ["his", "words"]}]}
        for i, split in ((1, "test"), (2, "restval"))
    ]  # fmt: skip
    karpathy.write_text(json.dumps({"images": images, "dataset": "coco"}))
    output = tmp_path / "raw.json"
    argv = ["--splits", str(karpathy), "--output", str(output)]
    assert prepare.main([*argv, "--annotations", *map(str, paths)]) == 0
    both = read_records(output)
    assert [(record.id, record.split, len(record.captions)) for record in both] == [(1, "test", 2), (2, "train", 2)]
    assert prepare.main(argv) == 1  # a list of records may be anybody's
    assert read_records(output) == both
    assert prepare.main([*argv, "--overwrite"]) == 0
    assert read_records(output)[0].captions == ["His words."]
    capsys.readouterr()
    assert prepare.main(["--output", str(output), "--overwrite"]) == 1
    assert "--annotations" in capsys.readouterr().err


def test_real_annotations(shared: Path, tmp_path: Path) -> None:
    output = tmp_path / "raw.json"
    assert (
        prepare.main(["--annotations", str(shared / "data/coco/captions_val2017.json"), "--output", str(output)]) == 0
    )
    records = read_records(output)
    assert len(records) == 5000 and records[0].file_path == "val2017/000000397133.jpg"
    assert sum(len(record.captions) for record in records) == 25014
