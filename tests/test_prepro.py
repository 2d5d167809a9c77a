"""caption-prepro from outside: arguments in; exit code, text and files out."""

import contextlib
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import h5py
import numpy as np
import pytest
from hostile import encoded, make_hostile_folder, photo
from PIL import Image

from captioner.cli import prepro
from captioner.data.dataset import Dataset
from captioner.data.images import read_image
from captioner.errors import InputError

real_context = multiprocessing.get_context
SENTENCES = ["A dog runs on the grass.", "The dog jumps over a red ball!", "Two men sit.", "A cat, a cat and a cat"]


def make_photos(folder: Path, count: int, size: tuple[int, int] = (64, 48)) -> list[dict]:
    folder.mkdir(parents=True, exist_ok=True)
    entries = []
    for index in range(count):
        (folder / f"{index}.jpg").write_bytes(encoded(photo(*size, seed=index), "JPEG"))
        captions = [SENTENCES[index % 4], SENTENCES[(index + 1) % 4]]
        entries.append({"file_path": f"{index}.jpg", "captions": captions, "id": 100 + index})
    return entries


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    entries = make_photos(tmp_path / "photos", 10)
    path = tmp_path / "raw.json"
    path.write_text(json.dumps(entries))
    return path


def run(raw: Path, *more: str, out: str = "data") -> int:
    folder = raw.parent
    argv = ["--input_json", str(raw), "--num_val", "2", "--num_test", "1", "--images_root", str(folder / "photos")]
    argv += ["--word_count_threshold", "0", "--num_workers", "0"]
    argv += ["--output_h5", str(folder / f"{out}.h5"), "--output_json", str(folder / f"{out}.json"), *more]
    return prepro.main(argv)


def open_dataset(raw: Path, out: str = "data") -> Dataset:
    return Dataset.open(raw.parent / f"{out}.h5", raw.parent / f"{out}.json")


def test_the_original_layout(raw: Path, capsys: pytest.CaptureFixture) -> None:
    assert run(raw) == 0
    assert "10 (7 train, 2 val, 1 test)" in capsys.readouterr().out
    described = json.loads((raw.parent / "data.json").read_text())
    with h5py.File(raw.parent / "data.h5") as file:
        assert {name: (member.dtype, member.shape) for name, member in file.items()} == {
            "images": (np.uint8, (10, 3, 256, 256)),
            "labels": (np.uint32, (20, 16)),
            "label_start_ix": (np.uint32, (10,)),
            "label_end_ix": (np.uint32, (10,)),
            "label_length": (np.uint32, (20,)),
        }
        assert file["images"].chunks is None and file["images"].compression is None
        words = described["ix_to_word"]
        for index, entry in enumerate(described["images"]):
            assert np.array_equal(file["images"][index], read_image(raw.parent / "photos" / entry["file_path"]))
            first, last = file["label_start_ix"][index], file["label_end_ix"][index]
            assert (first, last) == (2 * index + 1, 2 * index + 2)
            row, length = file["labels"][first - 1], file["label_length"][first - 1]
            caption = " ".join(words[str(word)] for word in row[:length])
            assert caption == SENTENCES[index % 4].lower().replace(".", "").replace("!", "").replace(",", "")
            assert not row[length:].any()
    # falling count, then the word
    assert [words["1"], words["2"]] == ["a", "cat"]
    assert "UNK" not in words.values()
    assert [entry["id"] for entry in described["images"]] == list(range(100, 110))


def test_the_number_of_workers_does_not_show(raw: Path) -> None:
    (raw.parent / "photos" / "4.jpg").write_bytes(b"broken")
    for workers in ("0", "1", "3"):
        assert run(raw, "--num_workers", workers, out=f"data{workers}") == 0
    for suffix in ("h5", "json"):
        contents = {(raw.parent / f"data{workers}.{suffix}").read_bytes() for workers in "013"}
        assert len(contents) == 1
    assert len(open_dataset(raw, "data3").info) == 9


def test_splits_of_the_records_and_of_the_seed(raw: Path) -> None:
    splits = []
    for seed in ("1", "1", "2"):
        assert run(raw, "--seed", seed) == 0
        splits.append([entry["split"] for entry in open_dataset(raw).info])
    assert splits[0] == splits[1] != splits[2]
    entries = json.loads(raw.read_text())
    for index, entry in enumerate(entries):
        entry["split"] = ["train", "restval", "val", "test", "train"][index % 5]
    raw.write_text(json.dumps(entries))
    assert run(raw) == 0
    assert [entry["split"] for entry in open_dataset(raw).info[:5]] == ["train", "train", "val", "test", "train"]


def test_references_of_val_and_test_are_kept_as_written(raw: Path) -> None:
    run(raw)
    dataset = open_dataset(raw)
    for split in ("val", "test"):
        for index in dataset.split_indices(split):
            assert dataset.references_of(index)[0] == SENTENCES[index % 4]
    train = dataset.split_indices("train")[0]
    assert dataset.references_of(train)[0] == SENTENCES[train % 4].lower().replace(".", "").replace("!", "").replace(
        ",", ""
    )


def test_hostile_folder(tmp_path: Path, capfd: pytest.CaptureFixture) -> None:
    expected = make_hostile_folder(tmp_path / "photos")
    raw = tmp_path / "raw.json"
    raw.write_text(json.dumps([{"file_path": name, "captions": ["a dog"]} for name in expected]))
    assert run(raw, "--num_workers", "2") == 0
    error = capfd.readouterr().err
    skipped = {
        entry["file_path"]: entry["reason"] for entry in json.loads((tmp_path / "data.json").read_text())["skipped"]
    }
    assert set(skipped) == {name for name, usable in expected.items() if not usable}
    assert all(f"{name}: {reason}" in error for name, reason in skipped.items())
    assert {entry["file_path"] for entry in open_dataset(raw).info} == set(expected) - set(skipped)
    assert not list(tmp_path.glob("*.partial")) and not list(tmp_path.glob("*.journal"))


def test_on_error_fail_and_nothing_left(raw: Path, capsys: pytest.CaptureFixture) -> None:
    (raw.parent / "photos" / "3.jpg").write_bytes(b"broken")
    assert run(raw, "--on_error", "fail") == 1
    assert "3.jpg: is text, not a picture" in one_error_line(capsys)
    assert not (raw.parent / "data.h5").exists()
    # Repaired, the same command goes on.
    (raw.parent / "photos" / "3.jpg").write_bytes(encoded(photo(seed=3), "JPEG"))
    assert run(raw, "--on_error", "fail") == 0
    shutil.rmtree(raw.parent / "photos")
    capsys.readouterr()
    assert run(raw, out="other") == 1
    assert "none of its 10 pictures could be read" in capsys.readouterr().err.splitlines()[-1]
    assert not list(raw.parent.glob("other*"))


def one_error_line(capsys: pytest.CaptureFixture) -> str:
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("caption-prepro: error:")]
    assert len(lines) == 1
    return lines[0]


def test_a_repaired_picture_is_used_when_a_run_is_continued(raw: Path) -> None:
    from captioner.data.build import PartialPixels

    photos = raw.parent / "photos"
    whole = (photos / "3.jpg").read_bytes()
    (photos / "3.jpg").write_bytes(b"broken")
    paths = [str(photos / f"{index}.jpg") for index in range(10)]
    with PartialPixels(raw.parent / "data.h5", paths) as partial:
        for path in paths[:6]:
            partial.add("is text, not a picture" if path.endswith("3.jpg") else read_image(path))
        partial.sync()
    (photos / "3.jpg").write_bytes(whole)
    assert run(raw) == 0
    assert run(raw, "--resume", "0", out="fresh") == 0
    assert (raw.parent / "data.h5").read_bytes() == (raw.parent / "fresh.h5").read_bytes()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--input_json", "nowhere.json"], "nowhere.json"),
        (["--num_val", "11"], "--num_val 11"),
        (["--output_h5", "/proc/nowhere/data.h5"], "/proc/nowhere"),
        (["--output", "report.json"], "--check 1"),
    ],
)
def test_bad_input_is_one_line(raw: Path, capsys: pytest.CaptureFixture, more: list[str], message: str) -> None:
    assert run(raw, *more) == 1
    assert message in one_error_line(capsys)
    assert not (raw.parent / "data.h5").exists() and not (raw.parent / "data.json").exists()


def test_the_input_is_never_overwritten(raw: Path, capsys: pytest.CaptureFixture) -> None:
    before = raw.read_bytes()
    assert run(raw, "--output_json", str(raw)) == 1
    assert "is an input" in one_error_line(capsys)
    assert run(raw, "--output_json", str(raw.parent / "data.h5")) == 1
    assert raw.read_bytes() == before


def test_only_what_is_ours_is_replaced(raw: Path, capsys: pytest.CaptureFixture) -> None:
    report = raw.parent / "report.json"
    for path, more in (
        (raw, ["--check", "1", "--output", str(raw)]),
        (raw.parent / "photos" / "0.jpg", ["--output_h5", str(raw.parent / "photos" / "0.jpg")]),
        (raw.parent / "notes.json", ["--output_json", str(raw.parent / "notes.json")]),
        (report, ["--check", "1", "--output", str(report)]),
        (raw.parent / "data.h5.partial", []),
        (raw.parent / "data.h5.journal", []),
    ):
        if not path.exists():
            path.write_text('{"dear": "diary"}')
        before = path.read_bytes()
        assert run(raw, *more) == 1
        assert path.name in one_error_line(capsys)
        assert path.read_bytes() == before
        if path.parent == raw.parent and path != raw:
            path.unlink()
    for _ in range(2):  # the second time over our own
        assert run(raw) == 0
        assert run(raw, "--check", "1", "--output", str(report)) == 0


def test_too_large_splits_fail_before_a_picture_is_read(
    raw: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("captioner.data.prepare.fill", None)
    assert run(raw, "--num_val", "10") == 1
    assert "--num_val 10 and --num_test 1 ask for 11 images, but there are 10" in one_error_line(capsys)
    assert not list(raw.parent.glob("data*"))


def test_check_without_a_readable_picture(raw: Path, capsys: pytest.CaptureFixture) -> None:
    for path in (raw.parent / "photos").iterdir():
        path.write_bytes(b"broken")
    assert run(raw, "--check", "1", "--num_val", "0", "--num_test", "0") == 1
    assert "none of its 10 pictures can be used" in one_error_line(capsys)


def test_a_hint_where_unk_is_frequent(raw: Path, capsys: pytest.CaptureFixture) -> None:
    assert run(raw, "--word_count_threshold", "9") == 0
    assert "--word_count_threshold 3 it would be 0.0%, with" in capsys.readouterr().out


def test_several_inputs_make_one_dataset(raw: Path, capsys: pytest.CaptureFixture) -> None:
    """Names start from what the roots share; ids stay distinct; splits that there are, are kept."""
    folder = raw.parent
    more = make_photos(folder / "more", 3)
    for entry, split in zip(more, ("train", "val", "test"), strict=True):
        entry["split"] = split
    (folder / "more.json").write_text(json.dumps(more))
    argv = ["--input_json", str(raw), "--images_root", str(folder / "photos"), "--num_val", "2", "--num_test", "1"]
    argv += ["--input_json", str(folder / "more.json"), "--images_root", str(folder / "more"), "--num_workers", "0"]
    argv += ["--output_h5", str(folder / "data.h5"), "--output_json", str(folder / "data.json")]
    assert prepro.main(argv) == 0
    dataset = open_dataset(raw)
    names = [entry["file_path"] for entry in dataset.info]
    assert names == [f"photos/{index}.jpg" for index in range(10)] + [f"more/{index}.jpg" for index in range(3)]
    assert [entry["source"] for entry in dataset.info] == ["raw"] * 10 + ["more"] * 3
    assert [entry["split"] for entry in dataset.info[10:]] == ["train", "val", "test"]
    assert [sum(entry["split"] == split for entry in dataset.info[:10]) for split in ("val", "test")] == [2, 1]
    assert [entry.get("id") for entry in dataset.info] == [*range(100, 110), None, None, None]
    for entry, pixels in zip(dataset.info, dataset.images, strict=True):
        assert np.array_equal(pixels, read_image(folder / entry["file_path"]))
    error = capsys.readouterr().err
    assert "3 of 13 pictures have a split" in error and f"start from {folder}" in error
    assert run(raw, "--input_json", str(raw)) == 1
    assert "names one of them twice" in one_error_line(capsys)
    assert prepro.main([*argv, "--images_root", "third"]) == 1
    assert "3 --images_root for 2 --input_json" in one_error_line(capsys)


def test_image_mode_is_kept(raw: Path) -> None:
    for workers in ("0", "1"):
        assert run(raw, "--image_mode", "crop", "--num_workers", workers, out="crop") == 0
        dataset = open_dataset(raw, "crop")
        assert dataset.image_mode == "crop"
        assert np.array_equal(dataset.images[3], read_image(raw.parent / "photos" / "3.jpg", "crop"))
    assert run(raw) == 0
    assert open_dataset(raw).image_mode == "squash"
    described = json.loads((raw.parent / "data.json").read_text())
    assert "image_mode" not in described, "files of the default stay as the original's"
    with h5py.File(raw.parent / "data.h5") as squashed, h5py.File(raw.parent / "crop.h5") as cropped:
        assert squashed.attrs["fingerprint"] != cropped.attrs["fingerprint"]
    (raw.parent / "data.json").write_text(json.dumps({**described, "image_mode": "stretch"}))
    with pytest.raises(InputError, match="image_mode is 'stretch'; expected squash or crop or pad"):
        open_dataset(raw)


def test_check_tells_mean_and_deviation_of_the_pixels(raw: Path, capsys: pytest.CaptureFixture) -> None:
    mean_image, report = raw.parent / "mean.png", raw.parent / "report.json"
    for _ in range(2):
        assert run(raw, "--check", "1", "--output", str(report), "--mean_image", str(mean_image)) == 0
    pixels = np.stack([read_image(raw.parent / "photos" / f"{index}.jpg") for index in range(10)])
    mean, deviation = pixels.mean((0, 2, 3)), pixels.std((0, 2, 3))
    found = json.loads(report.read_text())["pixels"]
    assert found["mean"] == pytest.approx(mean, abs=1e-3)
    assert found["standard_deviation"] == pytest.approx(deviation, abs=1e-3)
    assert f"mean of red, green, blue {mean[0]:.3f}" in capsys.readouterr().out
    assert np.abs(np.asarray(Image.open(mean_image)).transpose(2, 0, 1) - pixels.mean(0)).max() <= 0.5
    mean_image.write_bytes((raw.parent / "photos" / "0.jpg").read_bytes())
    assert run(raw, "--check", "1", "--mean_image", str(mean_image)) == 1
    assert "is a picture, which would be lost" in one_error_line(capsys)


def test_not_enough_room(raw: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    class Usage:
        free = 1_500_000

    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage)
    assert run(raw) == 1
    assert "10 images need" in one_error_line(capsys)
    assert sorted(path.name for path in raw.parent.iterdir()) == ["photos", "raw.json"]


def test_a_disk_that_fills_up_on_the_way(
    raw: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    import captioner.data.build

    def full(stream: object, data: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(captioner.data.build, "_write_all", full)
    assert run(raw) == 1
    assert "No space left on device" in one_error_line(capsys)
    monkeypatch.undo()
    assert not (raw.parent / "data.h5").exists() and not (raw.parent / "data.json").exists()
    assert run(raw) == 0


def test_odd_records_are_reported(raw: Path, capsys: pytest.CaptureFixture) -> None:
    entries = json.loads(raw.read_text())
    entries += [
        {"file_path": "0.jpg", "captions": ["Once more!"], "id": 100},
        {"file_path": "1.jpg", "captions": [" ... ", "Fine"], "id": 101},
    ]
    entries[2]["id"] = 103
    entries[5]["captions"] = ["...", ""]
    raw.write_text(json.dumps(entries))
    assert run(raw) == 0
    error = capsys.readouterr().err
    for text in ("2 pictures named more than once", "1 pictures with the id of another", "3 captions without a word"):
        assert text in error
    dataset = open_dataset(raw)
    assert len(dataset.info) == 9
    assert [entry.get("id") for entry in dataset.info[:4]] == [100, 101, 103, None]
    assert len(dataset.captions_of(0)) == 3
    assert json.loads((raw.parent / "data.json").read_text())["skipped"] == [
        {"file_path": "5.jpg", "reason": "has no caption"}
    ]


def test_names_that_no_file_can_have(raw: Path) -> None:
    entries = json.loads(raw.read_text())
    names = ["nul\0.jpg", "\ud800.jpg", "x" * 5000, "0.jpg/inside.jpg", "../" * 50 + "dev/zero"]
    raw.write_text(json.dumps(entries + [{"file_path": name, "captions": ["a dog"]} for name in names]))
    assert run(raw, "--num_workers", "1") == 0
    skipped = json.loads((raw.parent / "data.json").read_text())["skipped"]
    assert [entry["file_path"] for entry in skipped] == names


def test_a_folder_of_photos_and_texts(raw: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    photos = raw.parent / "photos"
    for index in range(1, 10):
        (photos / f"{index}.txt").write_text("A dog.\nTwo dogs.\n")
    os.mkfifo(photos / "0.txt")
    monkeypatch.chdir(raw.parent)
    assert prepro.main(["-input_json", "photos", "-num_val", "2", "-word_count_threshold", "0"]) == 0
    dataset = Dataset.open("data.h5", "data.json")
    assert [entry["file_path"] for entry in dataset.info] == [f"{index}.jpg" for index in range(1, 10)]
    assert json.loads(Path("data.json").read_text())["skipped"] == [{"file_path": "0.jpg", "reason": "has no caption"}]


def test_unicode_tokenizer_travels(raw: Path) -> None:
    entries = json.loads(raw.read_text())
    for entry in entries:
        entry["captions"] = ["一只狗在跑。"]
    raw.write_text(json.dumps(entries, ensure_ascii=False))
    assert run(raw, "--tokenizer", "unicode") == 0
    vocab = open_dataset(raw).vocab
    assert vocab.tokenizer == "unicode" and set(vocab.words) == set("一只狗在跑")


def test_check_writes_nothing_and_finds_leaks(raw: Path, capsys: pytest.CaptureFixture) -> None:
    photos = raw.parent / "photos"
    base = photo(400, 300, seed=77)
    (photos / "a.jpg").write_bytes(encoded(base, "JPEG", quality=95))
    (photos / "b.png").write_bytes(encoded(base.resize((200, 150)), "JPEG", quality=40))
    brighter = base.point(lambda value: min(255, int(value * 1.1)))
    (photos / "c.jpg").write_bytes(encoded(brighter, "JPEG", quality=70))
    shutil.copy(photos / "1.jpg", photos / "d.jpg")
    (photos / "broken.jpg").write_bytes(b"")
    entries = [{**entry, "split": "train"} for entry in json.loads(raw.read_text())]
    entries += [
        {"file_path": name, "captions": ["a dog"], "split": split}
        for name, split in (
            ("a.jpg", "train"),
            ("b.png", "test"),
            ("c.jpg", "val"),
            ("d.jpg", "val"),
            ("broken.jpg", "val"),
        )
    ]
    raw.write_text(json.dumps(entries))
    before = sorted(path.name for path in raw.parent.iterdir())
    assert run(raw, "--check", "1") == 0
    assert sorted(path.name for path in raw.parent.iterdir()) == before
    text = capsys.readouterr().out
    assert "3 pictures are in two splits" in text and "b.png: is JPEG" in text and "broken.jpg: is empty" in text
    assert run(raw, "--check", "1", "--output", str(raw.parent / "report.json")) == 0
    report = json.loads((raw.parent / "report.json").read_text())
    pairs = {(entry["file_path"], entry["same_as"], entry["exact"]) for entry in report["duplicates"]}
    assert pairs == {("b.png", "a.jpg", False), ("c.jpg", "a.jpg", False), ("d.jpg", "1.jpg", True)}
    assert report["duplicates_across_splits"] == 3
    assert report["unreadable"] == [{"file_path": "broken.jpg", "reason": "is empty"}]
    assert report["statistics"]["unk_share_at_threshold"]["0"] == 0


def test_killed_again_and_again_it_gives_the_same_bytes(tmp_path: Path) -> None:
    entries = make_photos(tmp_path / "photos", 120, size=(700, 500))
    (tmp_path / "photos" / "7.jpg").write_bytes(b"broken")
    raw = tmp_path / "raw.json"
    raw.write_text(json.dumps(entries))
    assert run(raw, out="whole") == 0
    argv = ["--input_json", str(raw), "--num_val", "2", "--num_test", "1", "--images_root", str(tmp_path / "photos")]
    argv += ["--word_count_threshold", "0", "--num_workers", "0"]
    argv += ["--output_h5", str(tmp_path / "data.h5"), "--output_json", str(tmp_path / "data.json")]
    # Syncing after each picture makes every moment one to continue from.
    program = (
        "import sys, captioner.data.build as p; p._SYNC_SECONDS = 0; from captioner.cli import prepro;"
        " sys.exit(prepro.main(sys.argv[1:]))"
    )
    partial = tmp_path / "data.h5.partial"
    rng = np.random.default_rng(0)
    kills = 0
    for _ in range(4):
        process = subprocess.Popen([sys.executable, "-c", program, *argv], stderr=subprocess.DEVNULL)
        goal = (partial.stat().st_size if partial.exists() else 0) + int(rng.integers(1, 25)) * 196_608
        while process.poll() is None and not (partial.exists() and partial.stat().st_size >= goal):
            time.sleep(0.002)
        if process.poll() is None:
            os.kill(process.pid, signal.SIGKILL)
            process.wait()
            kills += 1
            assert not (tmp_path / "data.h5").exists() and not (tmp_path / "data.json").exists()
    assert kills >= 3
    assert run(raw) == 0
    for suffix in ("h5", "json"):
        assert (tmp_path / f"data.{suffix}").read_bytes() == (tmp_path / f"whole.{suffix}").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(
        ["photos", "raw.json", "data.h5", "data.json", "whole.h5", "whole.json"]
    )


@pytest.mark.parametrize("moment", ["finish_h5", "write_dataset_json", "publish"])
@pytest.mark.parametrize("after", [False, True])
def test_stopped_while_finishing(raw: Path, monkeypatch: pytest.MonkeyPatch, moment: str, after: bool) -> None:
    from captioner.data import prepare
    from captioner.data.build import PartialPixels

    owner = PartialPixels if moment == "publish" else prepare
    step = getattr(owner, moment)

    def stopped(*arguments: object, **named: object) -> None:
        if after:
            step(*arguments, **named)
        raise KeyboardInterrupt

    assert run(raw, out="whole") == 0
    monkeypatch.setattr(owner, moment, stopped)
    assert run(raw) == 130
    monkeypatch.undo()
    with contextlib.suppress(InputError):  # whatever is there already is whole
        assert len(open_dataset(raw).info) == 10
    assert run(raw) == 0
    for suffix in ("h5", "json"):
        assert (raw.parent / f"data.{suffix}").read_bytes() == (raw.parent / f"whole.{suffix}").read_bytes()
    assert not list(raw.parent.glob("*.partial")) and not list(raw.parent.glob("*.journal"))


def test_two_runs_on_one_file(raw: Path, capsys: pytest.CaptureFixture) -> None:
    pytest.importorskip("fcntl")
    from captioner.data.build import PartialPixels

    with PartialPixels(raw.parent / "data.h5", ["a"]):
        assert run(raw) == 1
    assert "another caption-prepro" in one_error_line(capsys)


def test_a_decoder_that_hangs_or_crashes_costs_one_picture(tmp_path: Path) -> None:
    from captioner.data import decode_pool

    entries = make_photos(tmp_path, 6)
    paths = [str(tmp_path / entry["file_path"]) for entry in entries]
    results = []
    stream = decode_pool.read_images(paths, 1)
    for index, result in enumerate(stream):
        results.append(result)
        if index == 0:
            stream.gi_frame.f_locals["pool"].workers[0].process.kill()
    reasons = [result for result in results if isinstance(result, str)]
    assert len(results) == 6 and len(reasons) <= 1 and all("crashed" in reason for reason in reasons)
    stuck = list(decode_pool.read_images(paths, 2, seconds_per_image=0.0))
    assert len(stuck) == 6 and all(isinstance(r, np.ndarray) or "did not finish" in r for r in stuck)


def test_a_reading_process_that_cannot_start(
    raw: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
) -> None:
    """No picture is blamed, and nothing is written, when the fault is ours."""
    from captioner.data import decode_pool

    def refuse(connection: object, name: str, image_mode: str) -> None:
        raise SystemExit(1)

    monkeypatch.setattr(decode_pool, "_work", refuse)
    monkeypatch.setattr(decode_pool.multiprocessing, "get_all_start_methods", lambda: ["spawn"])
    monkeypatch.setattr(decode_pool.multiprocessing, "get_context", lambda _: real_context("fork"))
    assert run(raw, "--num_workers", "2") == 1
    assert "ended while it was starting" in capfd.readouterr().err
    assert not (raw.parent / "data.h5").exists()


def test_help_is_instant_and_imports_no_torch() -> None:
    program = "import sys; from captioner.cli import prepro; prepro.build_parser(); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program]).returncode == 0


def test_grey_pictures_and_one_picture(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    Image.new("L", (9, 9), 7).save(tmp_path / "photos" / "grey.png")
    raw = tmp_path / "raw.json"
    raw.write_text(json.dumps([{"file_path": "grey.png", "captions": ["grey"]}]))
    assert run(raw, "--num_val", "0", "--num_test", "0") == 0
    assert set(np.unique(open_dataset(raw).images)) == {7}
