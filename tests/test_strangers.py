"""What others have left in our places stays, and what a command reads is never what it writes: a case for each door."""

import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
from hostile import encoded, photo
from video_maker import write_video

from captioner.cli.options import FILES_TO_WRITE
from captioner.data.address_lists import read_lists
from captioner.errors import InputError
from captioner.inference.photo_index import PhotoIndex
from captioner.output.comparison import write_comparison
from captioner.output.manifest import NAME
from captioner.output.page import VisWriter
from captioner.output.training_page import write_training_page
from captioner.runtime.locks import sole_run
from captioner.sweep.study import Ranges, Sweep, alone_in, read_ranges

SOMEBODYS = "my thesis, the only copy\n"
ROOT = Path(__file__).parents[1]


def refused(done: subprocess.CompletedProcess, message: str) -> None:
    assert done.returncode in (1, 2), done
    line = done.stderr.strip().splitlines()[-1]
    assert ": error: " in line and message in line, line
    assert "Traceback" not in done.stderr


@pytest.fixture
def scored(tmp_path: Path) -> list[object]:
    (tmp_path / "p.json").write_text(json.dumps([{"image_id": 1, "caption": "a dog"}]))
    (tmp_path / "q.json").write_text(json.dumps([{"image_id": 1, "caption": "a cat"}]))
    (tmp_path / "r.json").write_text(json.dumps([{"image_id": 1, "captions": ["a dog runs"]}]))
    files = ["--predictions", tmp_path / "p.json", "--references", tmp_path / "r.json"]
    return [*files, "--metrics", "Bleu", "--bootstrap", 2]


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    (tmp_path / "photos").mkdir()
    for number in range(3):
        (tmp_path / "photos" / f"{number}.png").write_bytes(encoded(photo(8, 8, number), "PNG"))
        (tmp_path / "photos" / f"{number}.txt").write_text("a dog\n")
    return tmp_path / "photos"


def in_a_process(line: str, folder: Path) -> subprocess.CompletedProcess:
    """A shell's line; $CAPTION stands for `python -m captioner`."""
    environment = {**os.environ, "CAPTION": f"{sys.executable} -m captioner", "PYTHONPATH": str(ROOT)}
    return subprocess.run(["sh", "-c", line], cwd=folder, env=environment, capture_output=True, text=True, timeout=120)


def test_what_stdout_goes_to_is_no_place_for_a_result(scored, tmp_path):
    line = "$CAPTION score --predictions p.json --references r.json --metrics Bleu --bootstrap 2 --output {} > o.json"
    for name in ("o.json", "/dev/stdout", "./o.json"):
        refused(in_a_process(line.format(name), tmp_path), "is what this command prints to")
        assert (tmp_path / "o.json").read_text() == ""


def test_what_stdin_comes_from_is_an_input(photos, tiny_model, tmp_path):
    (tmp_path / "list.json").write_text("photos/0.png\n")
    line = f"$CAPTION eval - --model {tiny_model} --gpuid -1 --overwrite --output list.json --vis_dir '' < list.json"
    refused(in_a_process(line, tmp_path), "list.json: is an input of this command (stdin)")
    assert (tmp_path / "list.json").read_text() == "photos/0.png\n"


OPTIONS_OF = {"prepro": ("output", "output_h5", "output_json", "mean_image"), "score": ("output",)}
OPTIONS_OF |= {"video": ("output", "srt", "vtt", "jsonl"), "eval": ("share",), "convert": ("output",)}


@pytest.mark.parametrize(("name", "option"), [(name, one) for name, found in OPTIONS_OF.items() for one in found])
def test_a_dash_is_no_file(name, option, command):
    assert option in FILES_TO_WRITE
    needed = {"prepro": ["--input_json", "x", "--num_val", 1], "convert": ["x"]}.get(name, [])
    refused(command(name, *needed, f"--{option}", "-"), f"argument --{option}: - is no file")


def test_captions_beside_photos_are_inputs_of_the_data_set(photos, command):
    argv = ["--input_json", photos, "--num_val", 1, "--word_count_threshold", 0, "--num_workers", 0, "--overwrite"]
    for option in ("--output_json", "--output_h5"):
        refused(command("prepro", *argv, option, photos / "1.txt"), "1.txt: is an input of this command")
        assert (photos / "1.txt").read_text() == "a dog\n"


def test_a_model_is_no_place_for_subtitles(tiny_model, command, tmp_path):
    shutil.copy(tiny_model, tmp_path / "model.pt")
    before = (tmp_path / "model.pt").read_bytes()
    for option in ("--srt", "--vtt", "--jsonl"):
        refused(command("video", "--input", "clip.mp4", option, tmp_path / "model.pt"), "holds something else (model)")
    assert (tmp_path / "model.pt").read_bytes() == before


def test_a_comparison_and_a_view_leave_what_is_called_like_their_files(scored, photos, command, tmp_path):
    view = tmp_path / "view"
    view.mkdir()
    data = ["--input_json", photos, "--num_val", 1, "--word_count_threshold", 0, "--num_workers", 0]
    for argv, name in (
        (["score", *scored, "--compare", tmp_path / "q.json"], "compare-p.json"),
        (["prepro", *data], "words.json"),
    ):
        (view / name).write_text(SOMEBODYS)
        refused(command(*argv, "--view", view), f"{name}: exists, and was not written by this program")
        assert (view / name).read_text() == SOMEBODYS
        done = command(*argv, "--view", view, "--overwrite")
        assert done.returncode == 0, done.stderr
        done = command(*argv, "--view", view)  # ours by now
        assert done.returncode == 0, done.stderr
        assert (view / name).read_text() != SOMEBODYS


def test_a_comparison_stays_when_the_page_is_written_anew(photos, tmp_path):
    rows = [{"image_id": 1, "file_name": "0.png", "caption": "a dog"}]
    write_comparison(tmp_path / "vis", [("a.json", rows), ("b.json", rows)], [["a dog"]])
    VisWriter(tmp_path / "vis").finish(rows)
    assert (tmp_path / "vis" / "compare-a.json").is_file() and (tmp_path / "vis" / "compare-b.json.js").is_file()


def test_one_command_at_a_time_writes_a_page(scored, photos, tiny_model, command, tmp_path):
    view = tmp_path / "view"
    view.mkdir()
    data = ["--input_json", photos, "--num_val", 1, "--word_count_threshold", 0, "--num_workers", 0]
    searched = ["--images", photos, "--query", "a picture", "--model", tiny_model, "--gpuid", -1, "--num_workers", 0]
    with sole_run(view / ".lock", "the page"):
        for argv in (["score", *scored, "--compare", tmp_path / "q.json"], ["prepro", *data], ["score", *searched]):
            refused(command(*argv, "--view", view), f"the page in {view} is in use by process {os.getpid()}")
    assert not [path for path in view.iterdir() if path.name.startswith(("vis", "compare", "words"))]


def test_somebody_elses_list_of_files_is_not_ours(tmp_path):
    (tmp_path / NAME).write_text(SOMEBODYS)
    with pytest.raises(InputError, match="is no list of this program"):
        VisWriter(tmp_path)
    assert (tmp_path / NAME).read_text() == SOMEBODYS
    (tmp_path / NAME).unlink()
    os.mkfifo(tmp_path / NAME)
    with pytest.raises(InputError, match="a pipe or a device"):
        VisWriter(tmp_path)


@pytest.mark.parametrize("more", [[], ["--overwrite"]])
def test_a_shards_results_never_take_its_place(more, tiny_model, command, tmp_path):
    pq = pytest.importorskip("pyarrow.parquet")
    import pyarrow as pa

    shard = tmp_path / "shards" / "0.parquet"
    shard.parent.mkdir()
    pq.write_table(pa.table({"jpg": [encoded(photo(8, 8), "PNG")]}), shard)
    before = shard.read_bytes()
    argv = ["eval", "--model", tiny_model, "--gpuid", -1, "--output_dir", shard.parent, *more]
    assert command(*argv, shard).returncode == 0  # as JSON lines, beside it
    for name in (shard, tmp_path / "shards", tmp_path / "shards" / ".." / "shards" / "*.parquet"):
        refused(command(*argv, name, "--output_format", "parquet"), "its results would stand in its place")
    assert shard.read_bytes() == before


def test_somebody_elses_list_of_errors_is_not_removed(tiny_model, command, tmp_path):
    with tarfile.open(tmp_path / "0.tar", "w") as archive:
        member = tarfile.TarInfo("a.png")
        data = encoded(photo(8, 8), "PNG")
        member.size = len(data)
        archive.addfile(member, io.BytesIO(data))
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "0.errors.jsonl").write_text(SOMEBODYS)
    argv = ["eval", tmp_path / "0.tar", "--model", tiny_model, "--gpuid", -1, "--output_dir", tmp_path / "results"]
    refused(command(*argv), "0.errors.jsonl: is not of this run")
    assert (tmp_path / "results" / "0.errors.jsonl").read_text() == SOMEBODYS


@pytest.mark.parametrize("content", ["# my own failures\n", "# a\nhttp://b/c\n# d\n", "", SOMEBODYS])
def test_somebody_elses_report_of_failures_stays(content, command, tmp_path):
    (tmp_path / "list.txt").write_text("http://127.0.0.1:9/a.jpg\n")
    (tmp_path / "failed.tsv").write_text(content)
    done = command("download", tmp_path / "list.txt", "--folder", tmp_path, "--retries", 0)
    assert done.returncode == 1
    if content:
        refused(done, "failed.tsv: is there already, but not from caption-download")
        assert (tmp_path / "failed.tsv").read_text() == content


def test_a_report_of_failures_that_is_the_list_is_kept(command, tmp_path):
    (tmp_path / "failed.tsv").write_text("# HTTP 404\nhttp://127.0.0.1:9/a.jpg\ta.jpg\n")
    refused(command("download", tmp_path / "failed.tsv", "--folder", tmp_path), "while it is the list")
    assert "HTTP 404" in (tmp_path / "failed.tsv").read_text()
    (tmp_path / "failed.tsv").unlink()
    os.mkfifo(tmp_path / "failed.tsv")
    (tmp_path / "list.txt").write_text("http://127.0.0.1:9/a.jpg\n")
    refused(command("download", tmp_path / "list.txt", "--folder", tmp_path), "a pipe or a device")


def test_one_download_at_a_time_in_a_folder(command, tmp_path):
    (tmp_path / "list.txt").write_text("http://127.0.0.1:9/a.jpg\n")
    with sole_run(tmp_path / ".caption-download.lock", "the folder"):
        refused(command("download", tmp_path / "list.txt", "--folder", tmp_path), "is in use by process")


@pytest.mark.parametrize("names", [("failed.tsv",), ("a.jpg", "a.jpg.part"), ("a.jpg.PART.json", "A.jpg")])
def test_names_that_the_download_uses_itself_are_refused(names, tmp_path):
    (tmp_path / "list.txt").write_text("".join(f"http://127.0.0.1:9/{name}\t{name}\n" for name in names))
    with pytest.raises(InputError, match="writes a file of this name itself"):
        read_lists([tmp_path / "list.txt"])


def test_a_sweep_begins_in_no_folder_of_somebody_elses(tmp_path):
    pytest.importorskip("optuna")
    ranges = Ranges({}, {"rnn_size": [1, 2]})
    for name in ("results.md", "trial0.log", "model_idtrial3.pt"):
        (tmp_path / name).write_text(SOMEBODYS)
        with pytest.raises(InputError, match=f"{name}: is there, but study.journal of a sweep is not"):
            Sweep(tmp_path, ranges, "random", 1)
        assert (tmp_path / name).read_text() == SOMEBODYS
        (tmp_path / name).unlink()
    (tmp_path / "lock").write_text(SOMEBODYS)
    with pytest.raises(InputError, match="is no lock of a sweep"), alone_in(tmp_path):
        pass
    assert (tmp_path / "lock").read_text() == SOMEBODYS
    for damage in (b"no journal\n", b"{}\n[]\n", b"\xff\n"):
        (tmp_path / "study.journal").write_bytes(damage)
        with pytest.raises(InputError, match="study.journal: is damaged, or no book of a sweep"):
            Sweep(tmp_path, ranges, "random", 1)


@pytest.mark.parametrize(
    "text",
    [
        "fixed = 5\n[search]\nrnn_size = [1]",
        "[search]\nlearning_rate = {low = 0.1, high = inf}",
        "[search]\nlearning_rate = {low = 0, high = 1e300}",
        '[search]\nid = ["a\\u0000b"]',
        '[search]\ncnn_model = ["a\\u0000b"]',
        "[search]\nrnn_size = " + "[" * 5000,
    ],
)
def test_odd_ranges_of_a_sweep_are_one_line(text, tmp_path):
    (tmp_path / "ranges.toml").write_text(text)
    with pytest.raises(InputError):
        read_ranges(tmp_path / "ranges.toml", ["rnn_size", "learning_rate", "id", "cnn_model"])


def test_reports_that_cannot_be_read_are_left_out_of_a_trainings_page(tmp_path, caplog):
    (tmp_path / "model_id.json").write_text('{"loss_history": {"0": 2.5}}')
    (tmp_path / "model_id_pace.json").write_text("{")
    others = [tmp_path / f"model_id{name}.json" for name in "abc"]
    others[0].write_text("[1]")
    others[1].write_text(SOMEBODYS)
    os.mkfifo(others[2])
    write_training_page(tmp_path / "page.html", [tmp_path / "model_id.json", *others])
    page = (tmp_path / "page.html").read_text()
    assert 'data-name="runs.json">["model_id.json"]<' in page
    assert len(caplog.records) == 4


def test_a_strangers_page_beside_a_training_is_set_aside(tiny_dataset, tiny_cnn, command, tmp_path):
    (tmp_path / "model_id.html").write_text(SOMEBODYS)
    (tmp_path / "model_idother.json").write_text(SOMEBODYS)
    data = ["--input_h5", tiny_dataset[0], "--input_json", tiny_dataset[1], "--cnn_model", tiny_cnn, "--gpuid", -1]
    sizes = ["--cnn_layer", "pool5", "--rnn_size", 8, "--input_encoding_size", 8, "--batch_size", 4, "--max_iters", 1]
    done = command("train", *data, *sizes, "--checkpoint_path", tmp_path)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "model_id.previous.html").read_text() == SOMEBODYS
    assert (tmp_path / "model_idother.json").read_text() == SOMEBODYS


def test_a_training_does_not_set_its_own_data_aside(tiny_dataset, tiny_cnn, command, tmp_path):
    shutil.copy(tiny_dataset[1], tmp_path / "model_id.json")
    before = (tmp_path / "model_id.json").read_bytes()
    data = ["--input_h5", tiny_dataset[0], "--input_json", tmp_path / "model_id.json", "--cnn_model", tiny_cnn]
    sizes = ["--cnn_layer", "pool5", "--rnn_size", 8, "--input_encoding_size", 8, "--gpuid", -1, "--max_iters", 1]
    refused(
        command("train", *data, *sizes, "--checkpoint_path", tmp_path), "model_id.json: is an input of this command"
    )
    assert (tmp_path / "model_id.json").read_bytes() == before


@pytest.mark.parametrize(
    "option", ["--output {}/scores.json", "--output {}/sub/../about.json", "--share {}/index.html"]
)
def test_results_and_the_page_do_not_write_over_each_other(option, photos, tiny_model, command, tmp_path):
    argv = ["eval", photos, "--model", tiny_model, "--gpuid", -1, "--vis_dir", tmp_path / "vis"]
    (tmp_path / "vis" / "sub").mkdir(parents=True)
    refused(command(*argv, *option.format(tmp_path / "vis").split()), "is a file of the page itself")


@pytest.fixture
def index(tmp_path: Path) -> Path:
    folder = tmp_path / "index"
    (tmp_path / "a.png").write_bytes(encoded(photo(8, 8), "PNG"))
    opened(folder).update([tmp_path / "a.png"], lambda positions: [(i, np.ones(4, np.float32)) for i in positions])
    return folder


def opened(folder: Path) -> PhotoIndex:
    return PhotoIndex(folder, "m", (4, 3), lambda features: np.zeros((len(features), 3), np.float16))


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("index.json", lambda data: data.replace(b"[0, 0]", b"[0, 9]")),
        ("index.json", lambda data: data.replace(b"[0, 0]", b"[-1, 0]")),
        ("index.json", lambda data: data.replace(b'"shards": 1', b'"shards": "x"')),
        ("index.json", lambda data: b"[" * 100_000),
        ("index.json", lambda data: b"[]"),
        ("features-00000.npy", lambda data: data[:-1]),
        ("features-00000.npy", lambda data: data.replace(b"(4,)", b"(3,)")),
        ("features-00000.npy", lambda data: data[:-2] + b"\xff\x7f"),
        ("features-00000.npy", lambda data: data[:-1] + b"\x3d"),  # 1.25 for 1
        ("words-m-00000.npy", lambda data: data.replace(b"<f2", b"<i2")),
        ("words-m-00000.npy", lambda data: data[:-4] + b"\1" + data[-3:]),
    ],
)
def test_a_damaged_index_of_photos_is_one_line(name, damage, index, tmp_path):
    assert opened(index).features([(0, 0)]).tolist() == [[1, 1, 1, 1]]
    (index / name).write_bytes(damage((index / name).read_bytes()))
    with pytest.raises(InputError, match=r"is damaged|nested too deeply"):
        found = opened(index)
        place = found.find(tmp_path / "a.png")
        assert place
        found.words([place]), found.features([place])


def test_no_row_of_an_index_is_another_photo_s(tmp_path):
    """Digits of index.json change places: valid, and wrong."""
    paths = [tmp_path / f"{number}.png" for number in range(2)]
    for number, path in enumerate(paths):
        path.write_bytes(encoded(photo(8, 8, number), "PNG"))
    opened(tmp_path / "index").update(paths, lambda places: [(i, np.full(4, i, np.float32)) for i in places])
    index = tmp_path / "index" / "index.json"
    content = json.loads(index.read_text())
    assert opened(index.parent).features([opened(index.parent).find(paths[1])]).tolist() == [[1, 1, 1, 1]]
    first, second = content["rows"]
    index.write_text(json.dumps({**content, "rows": {first: [0, 1], second: [0, 0]}}))
    with pytest.raises(InputError, match="check sum"):
        opened(index.parent).features([opened(index.parent).find(paths[1])])
    index.write_text(json.dumps({**content, "rows": {first: [0, 1], second: [0, 1]}}))
    with pytest.raises(InputError, match="is damaged"):
        opened(index.parent)


def test_an_index_of_an_earlier_format_is_made_anew(index, tmp_path):
    (index / "index.json").write_text((index / "index.json").read_text().replace('"format": 2, ', ""))
    (index / "words-other-00000.npy").write_bytes(b"of that format")
    found = opened(index)
    assert not found.find(tmp_path / "a.png")
    found.update([tmp_path / "a.png"], lambda positions: [(i, np.full(4, 2, np.float32)) for i in positions])
    assert found.features([found.find(tmp_path / "a.png")]).tolist() == [[2, 2, 2, 2]]
    assert sorted(path.name for path in index.glob("*.npy")) == ["features-00000.npy", "words-m-00000.npy"]


def test_a_search_among_photos_that_are_none_does_not_wait(photos, tiny_model, command, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    os.mkfifo(photos / "pipe.jpg")
    (photos / "endless.jpg").symlink_to("/dev/zero")
    with (photos / "sparse.jpg").open("wb") as stream:
        stream.truncate(20 * 2**30)
    argv = ["--images", photos, "--query", "a picture", "--model", tiny_model, "--gpuid", -1, "--num_workers", 0]
    done = command("score", *argv)
    assert done.returncode == 0 and done.stdout.count(".png") == 3, done.stderr


def test_films_by_odd_names(command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    from captioner.video.frames import VideoFile

    write_video(tmp_path / "film.mp4", [np.full((32, 48, 3), 90, np.uint8)] * 3)
    for name in ("12:30 party.mp4", "file:x.mp4", "-.mp4", os.fsdecode(b"\xff\xfe.mp4"), "a\nb.mp4", "img%03d.mp4"):
        shutil.copy("film.mp4", name)
        assert len(list(VideoFile(name).frames())) == 3, name
    os.mkfifo("pipe.mp4")
    for name in ("pipe.mp4", "/dev/zero", "/dev/null", ".", "pipe:0", "concat:film.mp4"):
        refused(command("video", "--input", name), f"{name}: ")
