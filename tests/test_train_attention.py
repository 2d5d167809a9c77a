"""caption-train --decoder attention from outside: it learns, resumes exactly, moves on, and refuses contradictions."""

import base64
import json
import os
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from test_train import assert_same_weights

from captioner.model.checkpoint import load_checkpoint

SMALL = ["--decoder", "attention", "--attention_heads", 2, "--rnn_size", 24, "--input_encoding_size", 16]
SMALL += ["--gpuid", -1, "--batch_size", 4, "--seq_per_img", 2, "--losses_log_every", 1, "--val_images_use", -1]
SMALL += ["--learning_rate", 0.01, "--precision", "fp32", "--num_workers", 1]
WHOLE_RUN = ["--max_iters", 12, "--save_checkpoint_every", 4, "--finetune_cnn_after", 8]


@pytest.fixture(scope="module")
def data(tiny_dataset, tiny_cnn):
    return ["--input_h5", tiny_dataset[0], "--input_json", tiny_dataset[1], "--cnn_model", tiny_cnn, *SMALL]


@pytest.fixture(scope="module")
def uninterrupted(data, command, tmp_path_factory):
    folder = tmp_path_factory.mktemp("uninterrupted")
    done = command("train", *data, *WHOLE_RUN, "--checkpoint_path", folder)
    assert done.returncode == 0, done.stderr
    return folder


def test_it_learns_to_name_colours_from_cached_grids(data, tiny_dataset, command, tmp_path):
    done = command(
        "train", *data, "--max_iters", 240, "--save_checkpoint_every", 60, "--cache_features", 5,
        "--losses_log_every", 50, "--drop_prob_lm", 0.1, "--drop_prob_words", 0.1, "--drop_prob_features", 0.1,
        "--checkpoint_path", tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    cache = re.search(r"features: .*?(/\S+grid-\S+\.npy)", done.stderr)[1]
    grids = np.load(cache, mmap_mode="r")["values"]
    assert grids.shape == (28, 5, 49, 12) and grids.dtype == np.float16 and grids.max() > 0
    # The channels are brought to one range by all training photos, 16 being few.
    scale = load_checkpoint(tmp_path / "model_id.pt").state_dict["encoder.embed.scale"]
    roots = np.sqrt(grids[:16, 0].astype(np.float32)).max((0, 1))
    assert scale.numpy() == pytest.approx(np.minimum(4 / (1.2**0.5 * roots), 4 * 0.36), rel=1e-3)
    assert len(set(scale.tolist())) >= 3
    report = json.loads((tmp_path / "model_id.json").read_text())
    assert report["val_loss_history"]["240"] < report["val_loss_history"]["0"] / 3
    evaluated = command(
        "eval", "--model", tmp_path / "model_id.pt", "--num_images", -1, "--gpuid", -1, "--vis_dir", "",
        "--output", tmp_path / "out.json",
    )  # fmt: skip
    assert evaluated.returncode == 0, evaluated.stderr
    captions = {row["file_name"]: row["caption"] for row in json.loads((tmp_path / "out.json").read_text())}
    right = [colour in captions[f"img{24 + i}.png"] for i, colour in enumerate(("red", "green", "blue", "grey"))]
    assert sum(right) >= 3  # random convolutions tell red and green hardly apart


def test_a_stopped_run_goes_on_exactly(uninterrupted, data, command, tmp_path):
    """Across the start of fine-tuning; the shorter runs end where nothing is saved otherwise."""
    for last in (3, 7, 12):
        argv = [*data, *WHOLE_RUN[2:], "--max_iters", last, "--resume", "auto", "--checkpoint_path", tmp_path]
        done = command("train", *argv)
        assert done.returncode == 0, done.stderr
    assert_same_weights(uninterrupted / "model_id_last.pt", tmp_path / "model_id_last.pt")


def test_its_file_says_what_it_is(uninterrupted, command):
    checkpoint = load_checkpoint(uninterrupted / "model_id_last.pt")
    config = checkpoint.config
    assert (config.decoder, config.cnn_layer, config.attention_heads) == ("attention", "pool5", 2)
    assert checkpoint.decoding["beam_size"] == 3 and "a" in checkpoint.decoding["bad_endings"]
    assert all(bool(tensor.isfinite().all()) for tensor in checkpoint.state_dict.values())
    done = command("convert", uninterrupted / "model_id_last.pt", "--inspect")
    assert "model: VGG16 to pool5, two LSTMs of 24 with attention of 2 heads, 10 words, iteration 12" in done.stdout


def test_finetuning_changes_the_cnn(uninterrupted, tiny_cnn):
    before = torch.load(tiny_cnn, weights_only=True)
    after = load_checkpoint(uninterrupted / "model_id_last.pt").state_dict
    moved = [name for name, weights in before.items() if not torch.equal(after[f"encoder.{name}"], weights)]
    assert len(moved) > 20


@pytest.mark.parametrize("output", ["small.pt", "small.safetensors"])
def test_it_exports_and_captions_alike(output, uninterrupted, data, command, tmp_path):
    dtype = "int8" if output.endswith(".pt") else "float16"
    done = command("convert", uninterrupted / "model_id.pt", "--output", tmp_path / output, "--dtype", dtype)
    assert done.returncode == 0, done.stderr
    if dtype != "int8":
        return
    texts = []
    for path in (uninterrupted / "model_id.pt", tmp_path / output):
        argv = ["--input_h5", data[1], "--input_json", data[3], "--num_images", -1, "--gpuid", -1, "--vis_dir", ""]
        evaluated = command("eval", "--model", path, *argv)
        assert evaluated.returncode == 0, evaluated.stderr
        texts.append([line for line in evaluated.stdout.splitlines() if line.startswith("image ")])
    assert texts[0] == texts[1] and texts[0]


def test_training_goes_on_from_its_weights_and_with_other_words(uninterrupted, data, command, tmp_path):
    argv = [*data, "--max_iters", 0, "--checkpoint_path", tmp_path]
    done = command("train", *argv, "--start_from", uninterrupted / "model_id.pt", "--grow_vocab", 1)
    assert done.returncode == 0, done.stderr
    assert_same_weights(uninterrupted / "model_id.pt", tmp_path / "model_id_last.pt")
    moved = load_checkpoint(tmp_path / "model_id_last.pt")
    assert moved.decoding == load_checkpoint(uninterrupted / "model_id.pt").decoding


def test_a_finer_grid_is_trained_on_and_shown(data, command, tmp_path):
    """With the last block from its cached inputs, whose output it is."""
    finer = ["--cnn_layer", "conv5_3", "--finetune_cnn_after", 0, "--finetune_cnn_layers", 5, "--cache_features", 1]
    done = command("train", *data, *finer, "--max_iters", 2, "--checkpoint_path", tmp_path)
    assert done.returncode == 0, done.stderr
    assert load_checkpoint(tmp_path / "model_id.pt").state_dict["encoder.embed.position"].shape == (196, 16)
    argv = ["--model", tmp_path / "model_id.pt", "--input_h5", data[1], "--input_json", data[3], "--num_images", 2]
    evaluated = command("eval", *argv, "--gpuid", -1, "--explain", 1, "--min_length", 2, "--vis_dir", tmp_path / "vis")
    assert evaluated.returncode == 0, evaluated.stderr
    words = json.loads((tmp_path / "vis" / "vis.json").read_text())[0]["words"]
    assert {len(base64.b64decode(word["heat"])) for word in words} == {196}


def test_a_plan_counts_its_grids(data, command, tmp_path):
    done = command("train", *data, "--max_iters", 3, "--plan", 1, "--cache_features", 40)
    assert done.returncode == 0, done.stderr
    assert f"{28 * 40 * 49 * 12 * 2 / 1e6:.1f} MB of cached features" in done.stdout


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (["--cnn_layer", "fc7"], "decoder attention looks at a grid, not at fc7"),
        (["--num_layers", 2], "decoder attention has two LSTMs of one layer"),
        (["--attention_heads", 5], "rnn_size 24 is no multiple of the 5 attention heads"),
    ],
)
def test_contradictions_are_one_line(wrong, message, data, command, tmp_path):
    cnn = ["--cnn_model", "random"] if "fc7" in wrong else []
    done = command("train", *data, *cnn, *wrong, "--max_iters", 1, "--checkpoint_path", tmp_path)
    assert done.returncode == 1
    assert message in done.stderr.splitlines()[-1]


def test_another_decoder_is_no_start(data, command, tiny_model, tmp_path):
    done = command("train", *data, "--start_from", tiny_model, "--max_iters", 1, "--checkpoint_path", tmp_path)
    assert done.returncode == 1
    assert f"--decoder attention: {tiny_model} has the decoder lstm" in done.stderr.splitlines()[-1]


def test_two_processes_train_what_one_trains(data, command, tmp_path):
    argv = [*data, "--max_iters", 4, "--drop_prob_lm", 0, "--drop_prob_words", 0, "--drop_prob_features", 0]
    done = command("train", *argv, "--checkpoint_path", tmp_path / "one")
    assert done.returncode == 0, done.stderr
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", 2]
    launcher += ["-m", "captioner.cli.train", *argv, "--checkpoint_path", tmp_path / "two"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run([str(part) for part in launcher], check=True, env=environment, capture_output=True)
    # Adam divides by the gradients' size: where they are next to nothing, rounding shows.
    assert_same_weights(tmp_path / "one" / "model_id_last.pt", tmp_path / "two" / "model_id_last.pt", tolerance=2e-3)
