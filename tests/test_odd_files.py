"""What is no regular file where one is read, what is nested without end, and what a user without a home has."""

import json
import os
from pathlib import Path

import pytest
import torch

from captioner.errors import InputError
from captioner.model.checkpoint_fields import plain_digest
from captioner.output.sidecars import Sidecars
from captioner.runtime.files import cache_folder, read_json, read_small
from captioner.training.resume import load_resume_state


@pytest.fixture
def pipe(tmp_path: Path) -> Path:
    os.mkfifo(tmp_path / "pipe")
    return tmp_path / "pipe"


def test_pipes_and_devices_are_refused_unopened(pipe: Path, tmp_path: Path) -> None:
    for path in (pipe, "/dev/zero", tmp_path):
        with pytest.raises(OSError, match="a folder, a pipe or a device"):
            read_small(path)
        with pytest.raises(InputError, match="cannot be read"):
            read_json(path)


def test_a_pipe_for_a_text_file_keeps_nobody_waiting(pipe: Path, tmp_path: Path) -> None:
    pipe.rename(tmp_path / "a.txt")
    sidecars = Sidecars(existing="append")
    assert not sidecars.is_captioned(tmp_path / "a.jpg")
    sidecars.write(tmp_path / "a.jpg", "a dog")  # kept, and logged
    assert not (tmp_path / "a.txt").is_file()


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("eval", ["--input_h5", "{h5}", "--input_json", "{file}", "--model", "{model}"]),
        ("eval", ["--image_folder", ".", "--coco_json", "{file}", "--model", "{model}"]),
        ("train", ["--input_h5", "{h5}", "--input_json", "{file}", "--cnn_model", "random"]),
        ("score", ["--predictions", "{file}", "--references", "{file}"]),
        ("prepro", ["--input_json", "{file}", "--num_val", "0"]),
        ("sweep", ["--ranges", "{file}", "--folder", "sweep"]),
        ("download", ["{file}"]),
    ],
)
def test_commands_say_so_in_one_line(name, options, pipe, tiny_dataset, tiny_model, command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "deep.json").write_text("[" * 100_000)
    (tmp_path / "half.json").write_text('{"ix_to_word": {"1": "\\ud83d"}, "images": []}')
    for file in (pipe, tmp_path / "deep.json", tmp_path / "half.json"):
        arguments = [one.format(h5=tiny_dataset[0], file=file, model=tiny_model) for one in options]
        done = command(name, *arguments)
        assert done.returncode == 1, (file, done)
        last = done.stderr.strip().splitlines()[-1]
        assert last.startswith(f"caption-{name}: error: ") and file.name in last, last
        assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    "odd", [{"file_path": 5}, {"id": [1]}, {"id": 1.5}, {"captions": "a dog"}, {"file_path": {"a": 1}}, {"split": 1}]
)
def test_fields_of_a_data_set_of_the_wrong_kind(odd, tiny_dataset, tiny_model, command, tmp_path):
    described = json.loads(tiny_dataset[1].read_text())
    described["images"][20] |= odd
    (tmp_path / "data.json").write_text(json.dumps(described))
    data = ["--input_h5", tiny_dataset[0], "--input_json", tmp_path / "data.json"]
    done = command("eval", "--model", tiny_model, *data, "--vis_dir", tmp_path / "vis")
    assert done.returncode == 1 and "images[20]" in done.stderr.splitlines()[-1]


def test_the_state_of_optimisers_is_vouched_for(tiny_dataset, tiny_cnn, command, tmp_path):
    options = ["--cnn_layer", "pool5", "--rnn_size", 8, "--input_encoding_size", 8, "--batch_size", 4, "--gpuid", -1]
    data = ["--input_h5", tiny_dataset[0], "--input_json", tiny_dataset[1], "--cnn_model", tiny_cnn, *options]
    argv = ["train", *data, "--checkpoint_path", tmp_path, "--resume", "auto"]
    done = command(*argv, "--max_iters", 1)
    assert done.returncode == 0, done.stderr
    path = tmp_path / "model_id_resume.pt"
    sound = torch.load(path, weights_only=True)
    assert plain_digest(sound["optimizers"]) == sound["optimizers_digest"]
    for name, odd in {
        "a changed number": sound["optimizers"] | {"pieces": [1, 2]},
        "no table": [1, 2],
    }.items():
        torch.save(sound | {"optimizers": odd}, path)
        with pytest.raises(InputError, match="is not what was saved"):
            load_resume_state(path)
        assert name
    for odd in ({"lm": 5}, {"lm": {"state": {0: {"exp_avg": 1}}, "param_groups": []}}, {"pieces": 7}):
        torch.save(sound | {"optimizers": odd, "optimizers_digest": plain_digest(odd)}, path)
        done = command(*argv, "--max_iters", 2)
        assert done.returncode == 1 and "its optimiser state does not fit" in done.stderr.splitlines()[-1], done.stderr


def test_a_user_without_a_home_has_a_cache_too(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", no_home)
    assert cache_folder().name == "captioner"
