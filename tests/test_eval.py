"""caption-eval from outside: every image once, results that do not depend on batching, and clear refusals."""

import csv
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from PIL import Image

from captioner.cli.eval import build_parser, run_name
from captioner.inference.sources import open_folder
from captioner.model import checkpoint as checkpoint_files
from captioner.output.results import Journal

CPU = ["--gpuid", -1, "--precision", "fp32"]


@pytest.fixture(scope="module")
def model(tiny_model):
    return tiny_model


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Eleven pictures of several formats and sizes."""
    folder = tmp_path_factory.mktemp("photos")
    rng = np.random.default_rng(5)
    for number in range(1, 12):
        small = Image.fromarray(rng.integers(0, 256, size=(1, 2, 3), dtype=np.uint8))
        small.resize((200 + 9 * number, 180), Image.Resampling.BICUBIC).save(
            folder / f"img{number}.{('png', 'jpg', 'webp')[number % 3]}"
        )
    return folder


def rows_of(path):
    return json.loads(path.read_text(encoding="utf-8"))


def captions_of(path):
    return [(row["image_id"], row["caption"]) for row in rows_of(path)]


def test_folder_in_natural_order_to_stdout_page_and_files(model, photos, command, tmp_path):
    done = command(
        "eval", "--model", model, "--image_folder", photos, *CPU, "--vis_dir", tmp_path / "vis",
        "--output", tmp_path / "out.json", "--n_best", 3,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    rows = rows_of(tmp_path / "out.json")
    assert [row["file_name"] for row in rows] == [f"img{n}.{('png', 'jpg', 'webp')[n % 3]}" for n in range(1, 12)]
    assert [row["image_id"] for row in rows] == [str(n) for n in range(1, 12)]
    printed = [f"image {row['image_id']}: {row['caption']}  ({row['file_name']})" for row in rows]
    assert done.stdout.splitlines() == printed
    assert rows_of(tmp_path / "vis" / "vis.json") == rows
    assert all((tmp_path / "vis" / row["image"]).is_file() for row in rows)
    assert (tmp_path / "vis" / "index.html").is_file()
    assert len({row["caption"] for row in rows}) > 3
    for row in rows:
        assert row["logprob"] <= sum(word["logprob"] for word in row["words"]) + 1e-5  # END adds its own
        assert row["caption"] == " ".join(word["word"] for word in row["words"])
        sums = [alternative["logprob"] for alternative in row["n_best"]]
        assert len(sums) == 3 and sums == sorted(sums, reverse=True) and sums[0] == row["logprob"]
        assert "UNK" not in row["caption"]


@pytest.mark.parametrize("search", [["--beam_size", 3], ["--beam_size", 1], ["--sample_max", 0, "--seed", 7]])
def test_neither_batch_size_nor_workers_matter(search, model, photos, command, tmp_path):
    outputs = []
    for batch_size, workers in [(1, 0), (2, 1), (5, 2), (11, 3)]:
        done = command(
            "eval", "--model", model, "--image_folder", photos, *CPU, *search, "--vis_dir", "", "--batch_size",
            batch_size, "--num_workers", workers, "--output", tmp_path / "o.json",
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        outputs.append(captions_of(tmp_path / "o.json"))
    assert outputs[0] == outputs[1] == outputs[2] == outputs[3]


@pytest.mark.usefixtures("without_java")
@pytest.mark.parametrize("batch_size", [2, 3, 16])
def test_a_split_is_evaluated_once_whatever_the_batch_size(batch_size, model, tiny_dataset, command, tmp_path):
    h5, described = tiny_dataset
    done = command(
        "eval", "--model", model, "--input_h5", h5, "--input_json", described, "--split", "val", *CPU,
        "--batch_size", batch_size, "--vis_dir", "", "--output", tmp_path / "o.jsonl", "--language_eval", 1,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in (tmp_path / "o.jsonl").read_text().splitlines()]
    assert [row["image_id"] for row in rows] == list(range(1016, 1023))
    found = [float(re.search(rf"{name}:? ([\d.]+)", done.stdout)[1]) for name in ("loss", "CIDEr")]
    known = RESULTS_OF_A_SPLIT.setdefault("val", found)
    assert found == pytest.approx(known, abs=2e-6)  # the last digit printed


RESULTS_OF_A_SPLIT: dict[str, list[float]] = {}


def test_num_images_of_a_split_is_the_first_ones(model, tiny_dataset, command, tmp_path):
    h5, described = tiny_dataset
    done = command(
        "eval", "--model", model, "--input_h5", h5, "--input_json", described, "--split", "train", *CPU,
        "--num_images", 5, "--vis_dir", tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    rows = rows_of(tmp_path / "vis.json")
    assert [row["image_id"] for row in rows] == list(range(1000, 1005))
    with Image.open(tmp_path / rows[0]["image"]) as picture:
        assert picture.size == (256, 256)


def test_csv_txt_and_recursion(model, photos, command, tmp_path):
    folder = tmp_path / "in"
    (folder / "deeper").mkdir(parents=True)
    shutil.copy(photos / "img1.jpg", folder / "one.jpg")
    shutil.copy(photos / "img2.webp", folder / "deeper" / "two.webp")
    (folder / "one.txt").write_text("mine")
    argv = ["eval", "--model", model, "--image_folder", folder, *CPU, "--vis_dir", "", "--recursive", 1]
    argv += ["--write_txt", 1, "--output", tmp_path / "o.csv"]
    assert command(*argv).returncode == 0
    with (tmp_path / "o.csv").open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert {row["file_name"] for row in rows} == {"one.jpg", "deeper/two.webp"}
    captions = {row["file_name"]: row["caption"] for row in rows}
    assert (folder / "one.txt").read_text() == "mine"
    assert (folder / "deeper" / "two.txt").read_text() == captions["deeper/two.webp"] + "\n"
    assert command(*argv, "--overwrite", 1).returncode == 0
    assert (folder / "one.txt").read_text() == captions["one.jpg"] + "\n"


def test_unreadable_photos_are_named_and_the_others_captioned(model, photos, command, tmp_path):
    folder = tmp_path / "in"
    shutil.copytree(photos, folder)
    (folder / "img3.png").write_bytes((folder / "img3.png").read_bytes()[:300])
    (folder / "notes.jpg").write_text("not a picture")
    done = command("eval", "--model", model, "--image_folder", folder, *CPU, "--vis_dir", "", "--batch_size", 2)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == 10
    for name in ("img3.png", "notes.jpg"):
        assert any(name in line and "skipped" in line for line in done.stderr.splitlines())


def test_coco_list_gives_its_ids(model, photos, command, tmp_path):
    entries = [{"id": 77, "file_name": "img4.jpg"}, {"id": 5, "file_name": "img1.jpg"}]
    (tmp_path / "list.json").write_text(json.dumps({"images": entries}))
    done = command(
        "eval", "--model", model, "--image_folder", photos, "--coco_json", tmp_path / "list.json", *CPU,
        "--vis_dir", "", "--output", tmp_path / "o.json",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert [(row["image_id"], row["file_name"]) for row in rows_of(tmp_path / "o.json")] == [
        (77, "img4.jpg"),
        (5, "img1.jpg"),
    ]


@pytest.mark.usefixtures("java_says_one")
def test_folder_scored_against_references_by_name(model, photos, command, tmp_path):
    argv = ["eval", "--model", model, "--image_folder", photos, *CPU, "--vis_dir", tmp_path / "vis"]
    assert command(*argv).returncode == 0
    rows = rows_of(tmp_path / "vis" / "vis.json")
    references = [{"file_path": row["file_name"], "captions": [row["caption"]]} for row in rows]
    (tmp_path / "refs.json").write_text(json.dumps(references))
    done = command(*argv, "--language_eval", 1, "--references", tmp_path / "refs.json")
    assert done.returncode == 0, done.stderr
    assert "Bleu_1 1.0000" in done.stdout
    assert rows_of(tmp_path / "vis" / "scores.json")["Bleu_1"] == pytest.approx(1)
    kept = rows_of(tmp_path / "vis" / "scores_evalscript.json")
    assert kept["METEOR"] == pytest.approx(1)  # wherever it can be computed
    assert "SPICE skipped because" in done.stderr
    assert kept["images"]["scored"] == 11 and kept["intervals"]["Bleu_1"] == pytest.approx([1, 1])


@pytest.mark.usefixtures("without_java")
def test_each_evaluation_has_scores_of_its_own_name(model, photos, command, tmp_path):
    (tmp_path / "refs.json").write_text(json.dumps([{"file_path": "img4.jpg", "captions": ["a dog"]}]))
    argv = ["eval", "--model", model, "--image_folder", photos, *CPU, "--num_images", 4, "--language_eval"]
    argv += ["--references", tmp_path / "refs.json", "--vis_dir", tmp_path / "vis"]
    for name in ("beam2", "beam2", "beam3"):  # the second replaces the first
        done = command(*argv, "--id", name)
        assert done.returncode == 0, done.stderr
        assert f"scores: {tmp_path / 'vis' / f'scores_{name}.json'}" in done.stderr
        assert "METEOR skipped because there is no Java" in done.stderr
    assert {path.name for path in (tmp_path / "vis").glob("scores_*")} == {"scores_beam2.json", "scores_beam3.json"}
    (tmp_path / "scores_mine.json").write_text("{}")
    done = command(*argv, "--id", "mine", "--output", tmp_path / "o.json")
    assert done.returncode == 1 and "scores_mine.json: exists, and was not written by this program" in done.stderr
    for name in ("a/b", "a\\b", "x" * 300, "a\nb"):
        assert command(*argv, "--id", name).returncode == 2


def test_references_are_matched_before_the_first_picture(model, photos, tiny_dataset, command, tmp_path):
    (tmp_path / "other.json").write_text(json.dumps([{"file_path": "other.jpg", "captions": ["a dog"]}]))
    (tmp_path / "twice.json").write_text(json.dumps([{"file_path": "x/img1.jpg", "captions": ["a dog"]}]))
    (tmp_path / "broken.json").write_text('[{"file_path": "img1.jpg", "captions": [5]}]')
    (tmp_path / "photos" / "again").mkdir(parents=True)
    for folder in (tmp_path / "photos", tmp_path / "photos" / "again"):
        shutil.copy(photos / "img1.jpg", folder)
    described = json.loads(tiny_dataset[1].read_text())
    with h5py.File(tmp_path / "bare.h5", "w") as bare, h5py.File(tiny_dataset[0]) as file:
        for name in ("images", "labels"):
            bare[name] = file[name][:]
        bare["label_start_ix"] = np.ones(len(described["images"]), np.uint32)
        bare["label_end_ix"] = np.zeros(len(described["images"]), np.uint32)
    split = ["--input_h5", tmp_path / "bare.h5", "--input_json", tiny_dataset[1], "--split", "val"]
    for arguments, message in (
        (["--image_folder", photos, "--references", tmp_path / "other.json"], "no prediction belongs to any reference"),
        (["--image_folder", photos, "--references", tmp_path / "broken.json"], "is 5"),
        (["--image_folder", photos, "--references", tmp_path / "gone.json"], "gone.json"),
        (
            ["--image_folder", tmp_path / "photos", "--recursive", "--references", tmp_path / "twice.json"],
            "a second, different caption for image",
        ),
        (split, "no known captions"),
    ):
        done = command("eval", "--model", model, *CPU, "--language_eval", "--vis_dir", tmp_path / "vis", *arguments)
        assert done.returncode == 1 and done.stdout == "", done
        assert message in done.stderr.splitlines()[-1]
        assert not (tmp_path / "vis").exists()


def test_min_confidence_abstains(model, photos, command, tmp_path):
    done = command(
        "eval", "--model", model, "--image_folder", photos, *CPU, "--vis_dir", "", "--min_confidence", 0.999,
        "--output", tmp_path / "o.json",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert all(row["caption"] == "" and row["abstained"] for row in rows_of(tmp_path / "o.json"))


def test_two_copies_of_a_model_say_what_one_says(model, photos, command, tmp_path):
    argv = ["eval", "--image_folder", photos, *CPU, "--vis_dir", "", "--output"]
    assert command(*argv, tmp_path / "1.json", "--model", model).returncode == 0
    assert command(*argv, tmp_path / "2.json", "--model", model, model).returncode == 0
    assert captions_of(tmp_path / "1.json") == captions_of(tmp_path / "2.json")


def test_an_interrupted_run_goes_on(model, photos, command, tmp_path):
    whole, resumed = tmp_path / "whole.json", tmp_path / "resumed.json"
    argv = ["eval", "--model", model, "--image_folder", photos, *CPU, "--vis_dir", "", "--batch_size", 2, "--output"]
    assert command(*argv, whole).returncode == 0
    process = subprocess.Popen(
        [sys.executable, "-m", "captioner.cli.eval", *map(str, argv[1:]), resumed],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    for line in process.stdout:
        if line.startswith("image 4:"):
            process.kill()
            break
    process.communicate()
    if not resumed.exists():  # else it was quicker than the kill
        journal = tmp_path / "resumed.json.journal"
        with journal.open("a") as stream:
            stream.write('{"row": {"image_id"')  # a line cut off half-way
    done = command(*argv, resumed, "--resume", 1)
    assert done.returncode == 0, done.stderr
    assert resumed.read_bytes() == whole.read_bytes()
    assert not list(tmp_path.glob("*.journal"))


def test_the_loss_of_a_resumed_run_is_that_of_all_images(model, tiny_dataset, command, tmp_path, monkeypatch):
    h5, described = tiny_dataset
    argv = ["eval", "--model", model, "--input_h5", h5, "--input_json", described, "--split", "val", *CPU]
    argv += ["--batch_size", 2, "--num_images", -1, "--vis_dir", "", "--output"]
    whole = command(*argv, tmp_path / "whole.json")
    append, calls = Journal.append, []

    def interrupted(*arguments):
        append(*arguments)
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(Journal, "append", interrupted)
        assert command(*argv, tmp_path / "resumed.json").returncode == 130
    resumed = command(*argv, tmp_path / "resumed.json", "--resume", 1)
    for line in (r"loss: .*", r"next word: top-1 accuracy .*", r"\d+ images captioned"):
        told = [re.search(line, done.stdout + done.stderr)[0] for done in (resumed, whole)]
        assert told[0] == told[1]
    assert "7 images captioned" in whole.stderr


def test_another_bundled_model_is_another_run(model, photos, command, tmp_path, monkeypatch):
    """As after an update of the package: what the one said does not become a part of what the other says."""
    (tmp_path / "other").mkdir()
    monkeypatch.setattr(checkpoint_files, "BUNDLED_MODEL", model.name)
    argv = ["eval", "--image_folder", photos, *CPU, "--vis_dir", "", "--batch_size", 2, "--output", tmp_path / "o.json"]
    append = Journal.append

    def interrupted(*arguments):
        append(*arguments)
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(checkpoint_files, "ASSETS", model.parent)
        patched.setattr(Journal, "append", interrupted)
        assert command(*argv).returncode == 130
    shutil.copy(model, tmp_path / "other")
    monkeypatch.setattr(checkpoint_files, "ASSETS", tmp_path / "other")
    done = command(*argv, "--resume", 1)
    assert done.returncode == 1 and "belongs to a run with another model" in done.stderr


def test_resuming_another_run_is_refused(model, photos, command, tmp_path):
    output = tmp_path / "o.json"
    output.with_name("o.json.journal").write_text('{"run": "another"}\n')
    done = command("eval", "--model", model, "--image_folder", photos, *CPU, "--output", output, "--resume", 1)
    assert done.returncode == 1
    assert "belongs to a run with another model" in done.stderr


def test_another_folder_or_model_of_the_same_name_is_another_run(model, photos, tmp_path):
    def name(model: Path, folder: Path, *more: str) -> str:
        opt = build_parser().parse_args(["--model", str(model), "--image_folder", str(folder), *more])
        return run_name(opt, open_folder(str(folder), False, -1))

    mine, copied = tmp_path / "model.pt", tmp_path / "photos"
    shutil.copy(model, mine)
    shutil.copytree(photos, copied)
    first = name(mine, photos)
    assert name(mine, photos / ".." / photos.name, "--references", "r.json", "--language_eval") == first
    assert len({first, name(mine, copied), name(model, photos), name(mine, photos, "--beam_size", "3")}) == 4
    os.utime(mine, (1, 1))
    assert name(mine, photos) != first


def test_two_processes_give_the_same_bytes_as_one(model, photos, tmp_path):
    argv = ["-m", "captioner.cli.eval", "--model", model, "--image_folder", photos, *CPU, "--batch_size", 2]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    outputs = {}
    for size in (1, 2):
        folder = tmp_path / str(size)
        folder.mkdir()
        torchrun = (
            ["-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", "29517"] if size == 2 else []
        )
        done = subprocess.run(
            [sys.executable, *torchrun, *map(str, argv), "--vis_dir", "vis", "--output", "o.json"],
            cwd=folder, env={**environment, "PYTHONPATH": os.pathsep.join(sys.path)}, capture_output=True, text=True,
            check=False, timeout=200,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        outputs[size] = (done.stdout, (folder / "o.json").read_bytes(), (folder / "vis" / "vis.json").read_bytes())
    assert outputs[1] == outputs[2]


def test_processes_with_different_free_memory_caption_each_photo_once(model, photos, tmp_path):
    """Each computes its own batch size from it; the shares of a round have to fit together all the same."""
    (tmp_path / "uneven.py").write_text(
        "import os, types, torch\n"
        "from captioner.cli.eval import main\n"
        "from captioner.inference import model\n"
        "free = (3 - int(os.environ['RANK'])) * model.GPU_BYTES_PER_IMAGE\n"
        "torch.cuda.mem_get_info = lambda device: (free, 2 * free)\n"
        "on_gpu, of = types.SimpleNamespace(device=torch.device('cuda:0')), model.Model.fast_batch_size\n"
        "model.Model.fast_batch_size = lambda self: of(on_gpu)\n"
        "raise SystemExit(main())\n"
    )
    argv = ["--model", model, "--image_folder", photos, *CPU, "--vis_dir", "", "--output", "o.json"]
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", 2, "uneven.py"]
    done = subprocess.run(
        [sys.executable, *map(str, [*torchrun, *argv])], cwd=tmp_path, capture_output=True, text=True, timeout=200,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    names = [f"img{n}.{('png', 'jpg', 'webp')[n % 3]}" for n in range(1, 12)]
    assert [row["file_name"] for row in rows_of(tmp_path / "o.json")] == names


def bad_inputs(tmp_path, tiny_dataset):
    h5, described = tiny_dataset
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.pt").write_text("hello")
    torch.save({"a": 1}, tmp_path / "other.pt")
    torch.save(torch.nn.Linear(2, 2), tmp_path / "code.pt")
    fewer = json.loads(described.read_text())
    fewer["images"].pop()
    (tmp_path / "fewer.json").write_text(json.dumps(fewer))
    words = json.loads(described.read_text())
    words["ix_to_word"]["1"] = "other"
    (tmp_path / "words.json").write_text(json.dumps(words))
    split = ["--input_h5", h5, "--split", "val"]
    return {
        "no such model": (["--model", "gone.pt", "--image_folder", "."], "gone.pt: no such file"),
        "text as model": (["--model", tmp_path / "text.pt", "--image_folder", "."], "not a PyTorch file"),
        "another file": (["--model", tmp_path / "other.pt", "--image_folder", "."], "not a captioner checkpoint"),
        "code in the model": (["--model", tmp_path / "code.pt", "--image_folder", "."], "could run code"),
        "no such folder": (["--image_folder", tmp_path / "gone"], "gone"),
        "empty folder": (["--image_folder", tmp_path / "empty"], "no image"),
        "nothing to caption": ([], "--image_folder"),
        "json of another length": ([*split, "--input_json", tmp_path / "fewer.json"], "28 images"),
        "other words": ([*split, "--input_json", tmp_path / "words.json"], "vocabulary"),
        "no such split": (["--input_h5", h5, "--split", "best", "--input_json", described], "--split best"),
        "two sources": (["--image_folder", ".", "--input_h5", h5, "--input_json", described], "exclude"),
        "unknown format": (["--image_folder", tmp_path, "--output", "o.xml"], "o.xml"),
        "unwritable": (["--image_folder", tmp_path, "--output", "/proc/nothing/o.json"], "cannot write"),
        "no references": (["--image_folder", tmp_path, "--language_eval", 1], "--references"),
    }  # fmt: skip


def test_bad_input_is_one_line(model, tiny_dataset, photos, command, tmp_path):
    for case, (arguments, message) in bad_inputs(tmp_path, tiny_dataset).items():
        if message == "o.xml" or "cannot write" in message:
            arguments[1] = photos
        named = [] if "--model" in arguments else ["--model", model]
        done = command("eval", *named, *CPU, "--vis_dir", "", *arguments)
        assert done.returncode == 1, (case, done)
        lines = done.stderr.strip().splitlines()
        assert lines[-1].startswith("caption-eval: error: ") and message in lines[-1], (case, lines)
        assert done.stdout == ""
