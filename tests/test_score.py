"""caption-score from outside, and the joining of predictions with references."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from captioner.cli.score import main
from captioner.errors import InputError
from captioner.metrics.pairing import join, read_predictions, read_references

REFERENCES = [
    {"id": 1, "file_path": "a/one.jpg", "captions": ["a dog runs on grass", "the dog is running"]},
    {"id": 2, "file_path": "a/two.jpg", "captions": ["a cat sits on a chair"]},
    {"id": 3, "file_path": "b/three.jpg", "captions": ["two birds sing in a tree"]},
]
PREDICTIONS = [
    {"image_id": 1, "caption": "a dog runs on grass"},
    {"image_id": 2, "caption": "a dog sits"},
    {"image_id": 3, "caption": "two birds in a tree"},
]
NO_JAVA = ["--metrics", "Bleu,ROUGE_L,CIDEr"]


def write(path: Path, value: object) -> str:
    path.write_text(value if isinstance(value, str) else json.dumps(value), encoding="utf-8")
    return str(path)


@pytest.fixture
def files(tmp_path: Path) -> list[str]:
    predictions = write(tmp_path / "p.json", PREDICTIONS)
    return ["--predictions", predictions, "--references", write(tmp_path / "r.json", REFERENCES)]


def pairs_of(tmp_path: Path, predictions: object, references: object, suffix: str = ".json") -> list[tuple[str, list]]:
    joined = join(
        read_predictions(write(tmp_path / f"p{suffix}", predictions)),
        read_references(write(tmp_path / "r.json", references)),
    )
    return [(prediction.caption, reference.captions) for prediction, reference in joined.pairs]


EXPECTED = [(p["caption"], r["captions"]) for p, r in zip(PREDICTIONS, REFERENCES, strict=True)]


@pytest.mark.parametrize(
    "predictions",
    [
        PREDICTIONS,
        [{**row, "image_id": str(row["image_id"])} for row in PREDICTIONS],  # "1" is 1
        [{**row, "image_id": float(row["image_id"])} for row in PREDICTIONS],
        [{"file_name": r["file_path"], "caption": p["caption"]} for p, r in zip(PREDICTIONS, REFERENCES, strict=True)],
        # Another folder, and ids that mean something else: the names decide.
        [
            {"image_id": 4 - p["image_id"], "file_name": "x/" + r["file_path"][2:], "caption": p["caption"]}
            for p, r in zip(PREDICTIONS, REFERENCES, strict=True)
        ],
        [{"image_id": r["file_path"], "caption": p["caption"]} for p, r in zip(PREDICTIONS, REFERENCES, strict=True)],
        [{"file_name": ".\\a\\one.jpg", "caption": "a dog runs on grass"}],
    ],
    ids=["id", "text id", "float id", "name", "base name", "name as id", "windows name"],
)
def test_predictions_find_their_references(tmp_path: Path, predictions: list[dict]) -> None:
    assert pairs_of(tmp_path, predictions, REFERENCES) == EXPECTED[: len(predictions)]


def test_forms_of_predictions(tmp_path: Path) -> None:
    lines = "\n".join(json.dumps(row) for row in PREDICTIONS)
    assert pairs_of(tmp_path, lines, REFERENCES, ".jsonl") == EXPECTED
    table = 'image_id,file_name,caption\n1,,a dog runs on grass\n2,,"a dog\nsits"\n3,a/nowhere.jpg,\n'
    assert [caption for caption, _ in pairs_of(tmp_path, table, REFERENCES, ".csv")] == [
        "a dog runs on grass",
        "a dog\nsits",
        "",
    ]


@pytest.mark.parametrize(
    "references",
    [
        [{"image_id": r["id"], "captions": r["captions"]} for r in REFERENCES],
        [{"image_id": r["id"], "caption": caption} for r in REFERENCES for caption in r["captions"]],
        "\n".join(json.dumps({"id": r["id"], "captions": r["captions"]}) for r in REFERENCES),
        {
            "images": [{"id": r["id"], "file_name": r["file_path"]} for r in REFERENCES],
            "annotations": [{"image_id": r["id"], "caption": caption} for r in REFERENCES for caption in r["captions"]],
        },
        {
            "images": [
                {"cocoid": r["id"], "filename": r["file_path"], "sentences": [{"raw": c} for c in r["captions"]]}
                for r in REFERENCES
            ]
        },
        REFERENCES + [{"id": 9, "file_path": "c.jpg", "captions": []}],
    ],
    ids=["image_id", "one per entry", "jsonl", "coco", "karpathy", "image without captions"],
)
def test_forms_of_references(tmp_path: Path, references: object) -> None:
    assert pairs_of(tmp_path, PREDICTIONS, references) == EXPECTED


def test_table_of_references_joins_by_name(tmp_path: Path) -> None:
    table = "".join(f"{r['file_path']}|{caption}\n" for r in REFERENCES for caption in r["captions"])
    rows = [{"file_name": r["file_path"], "caption": "x"} for r in REFERENCES]
    assert [r for _, r in pairs_of(tmp_path, rows, table)] == [r["captions"] for r in REFERENCES]


def test_tables_as_spreadsheets_write_them(tmp_path: Path) -> None:
    """UTF-16, and with ids alone."""
    table = "image_id\tcaption\n" + "".join(f"{r['id']}\t{c}\n" for r in REFERENCES for c in r["captions"])
    (tmp_path / "r.txt").write_bytes(table.encode("utf-16"))
    rows = "image_id\tcaption\n" + "".join(f"{p['image_id']}\t{p['caption']}\n" for p in PREDICTIONS)
    (tmp_path / "p.txt").write_bytes(rows.encode("utf-16"))
    joined = join(read_predictions(tmp_path / "p.txt"), read_references(tmp_path / "r.txt"))
    assert [(prediction.caption, reference.captions) for prediction, reference in joined.pairs] == EXPECTED


def test_a_base_name_in_two_folders_decides_nothing(tmp_path: Path) -> None:
    references = [{"file_path": "a/x.jpg", "captions": ["a"]}, {"file_path": "b/x.jpg", "captions": ["b"]}]
    with pytest.raises(InputError, match="no prediction belongs to any reference"):
        pairs_of(tmp_path, [{"file_name": "x.jpg", "caption": "a"}], references)


def test_ids_that_fit_a_few_by_accident_do_not_join(tmp_path: Path) -> None:
    """A folder's pictures count from 1; a few of a large set's ids are that small too."""
    counted = [{"image_id": n, "file_name": f"mine{n}.jpg", "caption": "x"} for n in range(1, 8)]
    with pytest.raises(InputError, match="image_id 1 with file_name 'mine1.jpg', the first reference of image_id 1"):
        pairs_of(tmp_path, counted, REFERENCES)
    # Renamed pictures keep their ids: all of them fit.
    assert len(pairs_of(tmp_path, counted[:3], REFERENCES)) == 3


def test_repeated_captions_are_tolerated_and_different_ones_are_not(tmp_path: Path) -> None:
    assert pairs_of(tmp_path, [*PREDICTIONS, PREDICTIONS[0]], REFERENCES) == EXPECTED
    with pytest.raises(
        InputError, match=r"entry 3 \(line 1\): a second, different caption for image 1 \(the first: entry 0 "
    ):
        pairs_of(tmp_path, [*PREDICTIONS, {"image_id": 1, "caption": "other"}], REFERENCES)


BAD_PREDICTIONS = {
    "empty list": ("[]", "holds no captions"),
    "empty file": ("", "is empty"),
    "not json": ('[{"image_id": 1,', "line 1 is not JSON"),
    "no list": ('{"captions": {}}', "has no images (its keys: captions)"),
    "entry": ('[{"image_id": 1, "caption": "x"}, 7]', "entry 1 (line 1) is 7"),
    "nan caption": ('[{"image_id": 1, "caption": NaN}]', "entry 0 (line 1): caption is NaN"),
    "no caption": ('[{"image_id": 1}]', "entry 0 (line 1): caption is missing"),
    "nan id": ('[{"image_id": NaN, "caption": "x"}]', "entry 0 (line 1): image_id is NaN"),
    "true id": ('[{"image_id": true, "caption": "x"}]', "entry 0 (line 1): image_id is True"),
    "list id": ('[{"image_id": [1], "caption": "x"}]', "entry 0 (line 1): image_id is [1]"),
    "no id": ('[{"caption": "x"}]', "entry 0 (line 1): has neither image_id nor file_name"),
    "number as name": ('[{"file_name": 3, "caption": "x"}]', "entry 0 (line 1): file_name is 3"),
    "no overlap": ('[{"image_id": 77, "caption": "x"}]', "the first prediction is of image_id 77, the first reference"),
    "nested too deep": ("[" * 100_000, "line 1 is nested too deeply"),
    "number too long": ('[{"image_id": ' + "1" * 10_000 + "}]", "line 1 is not JSON"),
    "open quote": ('image_id,caption\n1,"a', "line 2 is not a proper table row"),
    "no table": ('"a', "is no description of pictures and captions"),
    "bad line": ('{"image_id": 1, "caption": "x"}\n{oops}\n', "line 2 is not JSON"),
    "other table": ("name;text\n1;x\n", "the header is"),
    "short table row": ("image_id,caption\n1,x\n,y\n", "line 3: has neither"),
    "not utf-8": (b'[{"image_id": 1, "caption": "\xff"}]', "line 1 is not UTF-8 text"),
    "binary": (b"\x89PNG\r\n\x1a\n\x00", "is not UTF-8 text"),
}


@pytest.mark.parametrize("content, message", BAD_PREDICTIONS.values(), ids=BAD_PREDICTIONS.keys())
def test_bad_predictions_are_one_line(
    files: list[str], content: str | bytes, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    Path(files[1]).write_bytes(content if isinstance(content, bytes) else content.encode())
    assert main([*files, *NO_JAVA]) == 1
    assert_one_line(capsys, message, "image_id 77" if "image_id 77" in message else files[1])


BAD_REFERENCES = {
    "empty list": ("[]", "holds no captions"),
    "captions no list": ('[{"id": 1, "captions": "a dog"}]', "entry 0 (line 1): captions is 'a dog'"),
    "nan caption": ('[{"id": 1, "captions": ["a dog", NaN]}]', "entry 0 (line 1): captions[1] is NaN"),
    "no captions": ('[{"id": 1}]', "entry 0 (line 1): captions is missing"),
    "no annotations": ('{"images": []}', "annotations"),
    "all without captions": ('[{"id": 1, "captions": []}]', "holds no captions"),
}


@pytest.mark.parametrize("content, message", BAD_REFERENCES.values(), ids=BAD_REFERENCES.keys())
def test_bad_references_are_one_line(
    files: list[str], content: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    write(Path(files[3]), content)
    assert main([*files, *NO_JAVA]) == 1
    assert_one_line(capsys, message, files[3])


@pytest.mark.parametrize("option", ["--predictions", "--references", "--compare", "--df", "--train_captions"])
def test_missing_files_are_one_line(files: list[str], option: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*files, *NO_JAVA, option, "nowhere.json"]) == 1
    assert_one_line(capsys, "nowhere.json: cannot be read (No such file or directory)", "nowhere.json")


def assert_one_line(capsys: pytest.CaptureFixture[str], *parts: str) -> None:
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert error.startswith("caption-score: error: ")
    for part in parts:
        assert part in error


def test_table_and_json(files: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "scores.json"
    assert main([*files, *NO_JAVA, "--output", str(output), "--per_caption", "1"]) == 0
    printed = capsys.readouterr().out
    assert "3 images, joined by image id" in printed
    report = json.loads(output.read_text())
    names = ["Bleu_1", "Bleu_2", "Bleu_3", "Bleu_4", "ROUGE_L", "CIDEr"]
    assert [name for name, value in report.items() if isinstance(value, float)] == names
    for name in names:
        assert f"{name:8} {report[name]:.4f}" in printed
        low, high = report["intervals"][name]
        assert low <= report[name] <= high
    # a dog runs on grass / sits / two birds in tree
    figures = {"distinct_captions": 3, "distinct_share": 1.0, "vocabulary": 10, "mean_length": 13 / 3}
    assert report["diversity"] == pytest.approx(figures)
    assert report["imgToEval"]["1"]["caption"] == "a dog runs on grass"
    assert report["imgToEval"]["1"]["ROUGE_L"] == pytest.approx(1.0)


def test_half_a_character_stops_nothing(files: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path(files[1]).write_text('[{"image_id": 1, "file_name": "\\ud83d.jpg", "caption": "a dog \\ud83d"}]')
    output = tmp_path / "scores.json"
    assert main([*files, *NO_JAVA, "--per_caption", "1", "--output", str(output)]) == 0
    assert json.loads(output.read_text(encoding="utf-8"))["imgToEval"]["1"]["caption"] == "a dog \ufffd"


def test_per_caption_without_a_file_prints_the_worst_first(
    files: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*files, *NO_JAVA, "--per_caption", "1"]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines() if line.startswith("{")]
    assert [row["image_id"] for row in rows] == [2, 3, 1]


def test_unmatched_images_are_listed(files: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(Path(files[1]), [PREDICTIONS[0], {"image_id": 9, "file_name": "nine.jpg", "caption": "x"}])
    output = tmp_path / "scores.json"
    assert main([*files, *NO_JAVA, "--output", str(output)]) == 0
    lines = capsys.readouterr().err.splitlines()
    assert lines == [
        f"{files[1]}: 1 of 2 images have no references: nine.jpg",
        f"{files[3]}: 2 of 3 images have no prediction: a/two.jpg, b/three.jpg",
    ]
    assert json.loads(output.read_text())["images"] == {
        "scored": 1,
        "joined_by": "image id",
        "predictions_without_references": ["nine.jpg"],
        "references_without_prediction": ["a/two.jpg", "b/three.jpg"],
    }


def test_comparison_and_novelty(files: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = write(tmp_path / "other.json", [{"image_id": i, "caption": "a thing"} for i in (1, 2)])
    output = tmp_path / "scores.json"
    arguments = ["--compare", other, "--output", str(output), "--train_captions", files[3]]
    assert main([*files, *NO_JAVA, *arguments]) == 0
    printed = capsys.readouterr()
    assert "compared on the 2 images that both files caption" in printed.err
    report = json.loads(output.read_text())
    assert report["images"]["scored"] == 2
    found = report["compare"]["differences"]["Bleu_1"]
    assert found["difference"] == pytest.approx(report["Bleu_1"] - report["compare"]["scores"]["Bleu_1"])
    assert found["low"] <= found["difference"] <= found["high"]
    assert 0 < found["p"] <= 1
    assert report["diversity"]["novel_share"] == 0.5  # "a dog runs on grass" is a reference


def test_document_frequencies_from_a_file(files: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    write(Path(files[1]), PREDICTIONS[:1])
    assert main([*files, "--metrics", "cider"]) == 0
    assert "note: CIDEr of one image is 0" in capsys.readouterr().out
    assert main([*files, "--metrics", "cider", "--df", files[3]]) == 0
    printed = capsys.readouterr().out
    assert "note" not in printed
    assert "CIDEr    0.0000" not in printed


def test_unknown_metric_is_one_line(files: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*files, "--metrics", "bleu,blue"]) == 1
    assert_one_line(capsys, "--metrics: 'blue' is unknown; expected some of Bleu,METEOR,ROUGE_L,CIDEr,SPICE")


def test_without_java_the_rest_is_scored(
    files: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", os.devnull)
    assert main(files) == 0
    printed = capsys.readouterr().out
    assert "METEOR   skipped because" in printed
    assert "SPICE    skipped because" in printed
    assert "CIDEr    " in printed
    assert main([*files, "--tokenizer", "ptb"]) == 1
    assert_one_line(capsys, "tokenizer ptb cannot run", "use the tokenizer python")


def test_coco_validation_set_in_seconds(shared: Path, tmp_path: Path) -> None:
    """5,000 images with 5 references each, in a fresh Python: quick, and without torch."""
    annotations = json.loads((shared / "data/coco/captions_val2017.json").read_text())["annotations"]
    first = {row["image_id"]: row["caption"] for row in annotations}
    predictions = write(tmp_path / "p.json", [{"image_id": i, "caption": c} for i, c in first.items()])
    program = "import sys; from captioner.cli.score import main; main(); print('torch' in sys.modules)"
    arguments = ["--predictions", predictions, "--references", str(shared / "data/coco/captions_val2017.json")]
    begin = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-c", program, *arguments, *NO_JAVA],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])},
    )
    seconds = time.perf_counter() - begin
    assert "5,000 images, joined by image id" in done.stdout
    assert done.stdout.splitlines()[-1] == "False"
    assert seconds < 10  # 1 s on a quiet machine (bench/RESULTS.md); this only catches a change of order


def test_what_to_score_must_be_said(command) -> None:
    for arguments in ([], ["--predictions", "p.json"], ["--images", "d", "--captions", "c", "--predictions", "p.json"]):
        done = command("score", *arguments)
        assert done.returncode == 2
        assert "give --predictions with --references, --images with --captions, or --images with --query" in done.stderr
