"""What goes wrong during training: one line, exit code 1, the last good state kept, and the same command goes on."""

import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch

from captioner.data.vocabulary import Vocab
from captioner.model.caption_model import CaptionModel
from captioner.model.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from captioner.training.resume import load_resume_state

RUN = ["--cnn_layer", "pool5", "--rnn_size", 24, "--input_encoding_size", 16, "--gpuid", -1, "--batch_size", 4]
RUN += ["--seq_per_img", 2, "--losses_log_every", 1, "--val_images_use", -1, "--learning_rate", 0.01]
RUN += ["--max_iters", 16, "--save_checkpoint_every", 4, "--num_workers", 0, "--resume", "auto"]
RUN += ["--precision", "fp32"]


@pytest.fixture(scope="module")
def data(tiny_dataset, tiny_cnn):
    return ["--input_h5", tiny_dataset[0], "--input_json", tiny_dataset[1], "--cnn_model", tiny_cnn, *RUN]


@pytest.fixture(scope="module")
def undisturbed(data, command, tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed")
    done = command("train", *data, "--checkpoint_path", folder)
    assert done.returncode == 0, done.stderr
    return folder


def error_line(done: subprocess.CompletedProcess) -> str:
    """The one line of a command that failed because of its input."""
    assert done.returncode == 1, done.stderr
    assert "Traceback" not in done.stderr
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("caption-train: error: ")
    return last


def assert_state_is_good(folder: Path, iteration: int) -> None:
    """Resume state and both models can be loaded, are sound, and nothing half-written lies about."""
    state = load_resume_state(folder / "model_id_resume.pt")
    last, best = (load_checkpoint(folder / name) for name in ("model_id_last.pt", "model_id.pt"))
    assert state.checkpoint.history.iteration == iteration >= last.history.iteration >= best.history.iteration
    for checkpoint in (state.checkpoint, last, best):
        assert all(tensor.isfinite().all() for tensor in checkpoint.state_dict.values())
    assert {path.suffix for path in folder.iterdir()} == {".pt", ".json", ".jsonl", ".html"}


def assert_goes_on(data: list, folder: Path, undisturbed: Path, command) -> None:
    done = command("train", *data, "--checkpoint_path", folder)
    assert done.returncode == 0, done.stderr
    one, other = (load_checkpoint(f / "model_id_last.pt").state_dict for f in (undisturbed, folder))
    assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())


class _NanGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, total):
        return total.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient * float("nan")


@pytest.mark.parametrize(("where", "iteration"), [("loss", 6), ("gradient", 7)])
def test_nan(where, iteration, undisturbed, data, command, tmp_path, monkeypatch):
    """In the loss of iteration 6; in the gradient of iteration 7 alone, right before a checkpoint is due."""
    whole, calls = CaptionModel.loss_sum, []

    def loss_sum(self, encodings, image_of_caption, labels, *rest):
        total, count = whole(self, encodings, image_of_caption, labels, *rest)
        if self.training:
            calls.append(len(labels))
            if len(calls) == iteration + 1:
                total = total * float("nan") if where == "loss" else _NanGradient.apply(total)
        return total, count

    with monkeypatch.context() as patched:
        patched.setattr(CaptionModel, "loss_sum", loss_sum)
        done = command("train", *data, "--checkpoint_path", tmp_path)
    line = error_line(done)
    if where == "loss":
        assert "iteration 6: the loss is nan, on the batch of img" in line
    else:
        assert "iteration 8: " in line and "not finite" in line
    assert "the last saved state is good" in line
    assert_state_is_good(tmp_path, 4)
    assert_goes_on(data, tmp_path, undisturbed, command)


@pytest.mark.parametrize("share", [0.0, 0.001, 0.5, 0.999])
def test_truncated_h5(share, data, tiny_dataset, command, tmp_path):
    whole = Path(tiny_dataset[0]).read_bytes()
    (tmp_path / "cut.h5").write_bytes(whole[: int(len(whole) * share)])
    done = command("train", *data, "--input_h5", tmp_path / "cut.h5", "--checkpoint_path", tmp_path / "run")
    assert "cut.h5: is not a readable HDF5 file" in error_line(done)
    assert not list((tmp_path / "run").iterdir()) if (tmp_path / "run").exists() else True


def test_h5_that_is_cut_during_training(undisturbed, data, tiny_dataset, command, tmp_path, monkeypatch):
    """Reading a mapped file beyond its end would kill the process without a word."""
    cut = tmp_path / "data.h5"
    shutil.copy(tiny_dataset[0], cut)
    whole, calls = CaptionModel.loss_sum, []

    def loss_sum(self, encodings, image_of_caption, labels, *rest):
        calls.append(self.training)
        if sum(calls) == 6:
            os.truncate(cut, 4_000_000)
        return whole(self, encodings, image_of_caption, labels, *rest)

    with monkeypatch.context() as patched:
        patched.setattr(CaptionModel, "loss_sum", loss_sum)
        done = command("train", *data, "--input_h5", cut, "--checkpoint_path", tmp_path / "run")
    assert "data.h5: has become shorter while it was in use" in error_line(done)
    assert_state_is_good(tmp_path / "run", 4)
    assert_goes_on(data, tmp_path / "run", undisturbed, command)


@pytest.mark.skipif(not hasattr(resource, "prlimit"), reason="limits another process, which only Linux can")
def test_full_disk(undisturbed, data, command, tmp_path):
    """No file may grow any more from iteration 5 on: the kernel refuses writes, as it does on a full disk."""
    argv = [sys.executable, "-m", "captioner.cli.train", *data, "--checkpoint_path", tmp_path]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen([str(a) for a in argv], stderr=subprocess.PIPE, text=True, env=environment)
    log = ""
    for line in process.stderr:
        log += line
        if line.startswith("iter 5 "):
            resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (5000, 5000))
            break
    log += process.communicate(timeout=60)[1]
    line = error_line(subprocess.CompletedProcess(argv, process.returncode, "", log))
    assert "cannot be written (File too large)" in line and "free disk space" in line
    assert_state_is_good(tmp_path, 4)
    assert_goes_on(data, tmp_path, undisturbed, command)


def test_start_from_a_model_of_other_words(undisturbed, data, command, tmp_path):
    model = load_checkpoint(undisturbed / "model_id.pt")
    words = [*model.vocab.words[:-2], "another", "UNK"]
    other = Checkpoint(model.config, Vocab(words), CaptionModel(model.config).state_dict())
    save_checkpoint(tmp_path / "other.pt", other)
    done = command("train", *data, "--start_from", tmp_path / "other.pt", "--checkpoint_path", tmp_path / "run")
    line = error_line(done)
    assert "the model does not know 1 of its 10 words" in line
    assert not list((tmp_path / "run").iterdir())


@pytest.fixture
def own_data(data, tiny_dataset, tmp_path):
    """The dataset in a folder of its own, where feature caches go."""
    folder = tmp_path / "data"
    folder.mkdir()
    for path in tiny_dataset:
        shutil.copy(path, folder)
    return folder, [*data, "--input_h5", folder / "data.h5", "--input_json", folder / "data.json", "--max_iters", 1]


def test_a_feature_cache_is_used_again_but_never_for_other_weights_or_pictures(own_data, tiny_cnn, command, tmp_path):
    folder, data = own_data
    caches: set[Path] = set()

    def new_caches(*options: object) -> int:
        argv = [*data, "--cache_features", 1, "--resume", "", "--checkpoint_path", tmp_path, *options]
        done = command("train", *argv)
        assert done.returncode == 0, done.stderr
        before, now = len(caches), set(folder.glob("features-*"))
        caches.update(now)
        return len(now) - before

    assert new_caches() == 1
    first = np.load(next(iter(caches)))["values"]
    assert new_caches() == 0
    state = torch.load(tiny_cnn, weights_only=True)
    state["features.28.bias"] += 0.5
    torch.save(state, tmp_path / "other.pth")
    assert new_caches("--cnn_model", tmp_path / "other.pth") == 1
    assert new_caches("--cnn_pixels", "torchvision") == 1
    assert new_caches("--cache_features", 2) == 1
    before = set(caches)
    with h5py.File(folder / "data.h5", "r+") as file:
        file["images"][20] = 255 - file["images"][20]
    assert new_caches() == 1
    (changed,) = caches - before
    differs = (np.load(changed)["values"] != first).any(axis=(1, 2))
    assert differs.nonzero()[0].tolist() == [20]


@pytest.mark.parametrize("damage", ["cut", "text", "other shape", "other type", "flipped bit"])
def test_a_damaged_feature_cache_is_refused(damage, own_data, command, tmp_path):
    folder, data = own_data
    argv = [*data, "--cache_features", 1, "--checkpoint_path", tmp_path / "run"]
    assert command("train", *argv).returncode == 0
    (cache,) = folder.glob("features-*")
    features = np.load(cache)
    if damage == "cut":
        cache.write_bytes(cache.read_bytes()[:-4])
    elif damage == "text":
        cache.write_text("no features")
    elif damage == "flipped bit":  # the least of a number: it stays finite, and nearly what it was
        for row in features:
            row["values"].view(np.uint8)[:, 0] ^= 1
        np.save(cache, features)
    else:
        np.save(cache, features[:-1] if damage == "other shape" else features["values"].astype(np.float64))
    line = error_line(command("train", *argv, "--max_iters", 2))
    assert cache.name in line and "delete it" in line
    assert_state_is_good(tmp_path / "run", 1)
