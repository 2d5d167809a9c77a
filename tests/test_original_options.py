"""The original's options do what they did: each by what it changes, and those without effect by changing nothing."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image

from captioner.data.batches import TrainingBatches
from captioner.data.dataset import Dataset
from captioner.model.checkpoint import Checkpoint, load_checkpoint

RUN = ["--cnn_layer", "pool5", "--rnn_size", 12, "--input_encoding_size", 10, "--gpuid", -1, "--batch_size", 3]
RUN += ["--seq_per_img", 1, "--losses_log_every", 1, "--val_images_use", 4, "--save_checkpoint_every", 2]
RUN += ["--max_iters", 3, "--id", "_x", "--finetune_cnn_after", 0, "--cnn_learning_rate", 1e-3, "--num_workers", 0]


@pytest.fixture(scope="module")
def train(tiny_dataset, tiny_cnn, command, tmp_path_factory):
    """A short training with these options besides: its last model, its report, and what it logged."""
    known: dict[tuple, tuple[Checkpoint, dict, str]] = {}

    def run(*options: object) -> tuple[Checkpoint, dict, str]:
        if options not in known:
            folder = tmp_path_factory.mktemp("run")
            data = ["--input_h5", tiny_dataset[0], "--input_json", tiny_dataset[1], "--cnn_model", tiny_cnn]
            done = command("train", *data, *RUN, *options, "--checkpoint_path", folder)
            assert done.returncode == 0, done.stderr
            report = json.loads((folder / "model_id_x.json").read_text())
            known[options] = load_checkpoint(folder / "model_id_x_last.pt"), report, done.stderr
        return known[options]

    return run


def test_sizes_and_numbers_of_a_training(train):
    model, report, _ = train()
    assert (model.config.rnn_size, model.config.encoding_size) == (12, 10)
    assert report["iter"] == 3 and list(report["loss_history"]) == ["0", "1", "2"]
    assert list(report["val_loss_history"]) == ["0", "2", "3"]
    assert [row["image_id"] for row in report["val_predictions"]] == [1016, 1017, 1018, 1019]


@pytest.mark.parametrize(
    ("option", "value", "part"),
    [
        ("batch_size", 5, "decoder"),
        ("seq_per_img", 3, "decoder"),
        ("seed", 7, "decoder"),
        ("learning_rate", 1e-2, "decoder"),
        ("optim_alpha", 0.1, "decoder"),
        ("optim_beta", 0.5, "decoder"),
        ("optim_epsilon", 1e-2, "decoder"),
        ("drop_prob_lm", 0.1, "decoder"),
        ("cnn_optim", "sgdm", "encoder.features"),
        ("cnn_optim_alpha", 0.1, "encoder.features"),
        ("cnn_optim_beta", 0.5, "encoder.features"),
        ("cnn_learning_rate", 1e-2, "encoder.features"),
        ("cnn_weight_decay", 1.0, "encoder.features"),
    ],
)
def test_an_option_changes_what_is_learnt(option, value, part, train):
    before, after = (model.state_dict for model in (train()[0], train(f"--{option}", value)[0]))
    moved = [name for name in before if name.startswith(part) and not torch.equal(before[name], after[name])]
    assert moved, f"--{option} changes nothing of {part}"


@pytest.mark.parametrize("options", [("--backend", "nn"), ("--cnn_proto", "deploy.prototxt")])
def test_what_is_accepted_for_old_command_lines_changes_nothing(options, train):
    before, (after, _, log) = train()[0], train(*options)
    assert all(torch.equal(tensor, after.state_dict[name]) for name, tensor in before.state_dict.items())
    assert ("--cnn_proto is not needed" in log) is ("--cnn_proto" in options)


@pytest.fixture(scope="module")
def split(tiny_dataset, tiny_model, tmp_path_factory):
    """Options for three test images of the data set, and the folder where one of them lies as a file."""
    root = tmp_path_factory.mktemp("root")
    Image.new("RGB", (300, 200), (255, 0, 255)).save(root / "img24.png")
    data = ["--input_h5", tiny_dataset[0], "--input_json", tiny_dataset[1], "--split", "test", "--num_images", 3]
    return ["eval", "--model", tiny_model, *data, "--precision", "fp32"], root


def test_switches_of_an_evaluation(split, command, tmp_path):
    argv, root = split
    said = {}
    for name, options in {
        "plain": [],
        "no pictures": ["--dump_images", 0],
        "no page": ["--dump_json", 0],
        "accepted": ["--dump_path", 1, "--backend", "nn", "--gpuid", -1],
        "drawn": ["--sample_max", 0, "--temperature", 3, "--seed", 4],
        "drawn again": ["--sample_max", 0, "--temperature", 3, "--seed", 4],
        "files": ["--image_root", root],
    }.items():
        done = command(*argv, *options, "--vis_dir", tmp_path / name)
        assert done.returncode == 0, done.stderr
        said[name] = done.stdout
    assert said["plain"] == said["no pictures"] == said["no page"] == said["accepted"] == said["files"]
    assert said["drawn"] == said["drawn again"] != said["plain"]
    assert len(list((tmp_path / "plain" / "imgs").glob("img10*.jpg"))) == 3
    assert not (tmp_path / "no pictures" / "imgs").exists() and not (tmp_path / "no page").exists()
    sizes = {}
    for name in ("plain", "files"):
        rows = json.loads((tmp_path / name / "vis.json").read_text())
        assert [row["file_name"] for row in rows] == ["img23.png", "img24.png", "img25.png"]
        sizes[name] = [(row["width"], row["height"]) for row in rows]
    assert sizes == {"plain": [(256, 256)] * 3, "files": [(256, 256), (300, 200), (256, 256)]}


def test_the_walk_through(tiny_dataset, tiny_cnn, command, tmp_path, monkeypatch):
    """The commands of the original's README in their order, with its one-dash options: raw json to captions."""
    monkeypatch.chdir(tmp_path)
    Path("imgs").mkdir()
    for number, colour in enumerate([(220, 30, 30), (30, 200, 40), (40, 60, 220), (128, 128, 128)]):
        Image.new("RGB", (64, 48), colour).save(f"imgs/{number}.png")
    raw = [{"file_path": f"{n}.png", "captions": ["a picture", "it is one"]} for n in range(4)]
    Path("raw.json").write_text(json.dumps(raw))
    prepro = "-input_json raw.json -num_val 1 -num_test 1 -images_root imgs -word_count_threshold 0 "
    prepro += "-output_json d.json -output_h5 d.h5"
    train = "-input_h5 d.h5 -input_json d.json -cnn_layer pool5 -rnn_size 8 -input_encoding_size 8 -batch_size 2 "
    train += "-max_iters 1 -gpuid -1"
    evaluate = "-model model_id.pt -image_folder imgs -num_images -1 -gpuid -1 -beam_size 2"
    shutil.copy(tiny_cnn, "vgg.pth")
    for name, line in (("prepro", prepro), ("train", f"{train} -cnn_model vgg.pth"), ("eval", evaluate)):
        done = command(name, *line.split())
        assert done.returncode == 0, done.stderr
    assert len(json.loads(Path("vis/vis.json").read_text())) == 4


def test_statistics_of_a_data_set(command, tmp_path):
    captions = ["a dog runs", "a dog", "a cat sits"]
    raw = []
    for number, caption in enumerate(captions):
        Image.new("RGB", (20, 20), (number * 90, 0, 0)).save(tmp_path / f"{number}.png")
        raw.append({"file_path": f"{number}.png", "captions": [caption]})
    (tmp_path / "raw.json").write_text(json.dumps(raw))
    done = command(
        "prepro", "--input_json", tmp_path / "raw.json", "--num_val", 1, "--word_count_threshold", 1, "--check",
        "--images_root", tmp_path, "--num_workers", 0,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    told = done.stdout + done.stderr
    assert "top words   a 3, dog 2" in told
    assert "UNK stands for 37.50% of all words" in told  # runs, cat, sits of 8
    assert re.search(r"2 words +1 +33\.3%", told) and re.search(r"3 words +2 +66\.7%", told)


def test_pictures_are_cropped_anywhere_in_the_originals_range(tiny_dataset):
    dataset = Dataset.open(*tiny_dataset)
    batches = TrainingBatches(
        dataset, dataset.captioned_indices("train"), batch_size=16, seq_per_img=1, seed=1, shuffle=True
    )
    offsets = torch.cat([batches(k).inputs.offsets for k in range(20)])  # of 320 pictures
    for side in offsets.unbind(1):
        assert (side.min(), side.max(), len(side.unique())) == (0, 31, 32)


@pytest.mark.parametrize("shuffle", [True, False])
def test_every_epoch_has_each_image_once_in_a_new_order_or_the_same(shuffle, tiny_dataset):
    dataset = Dataset.open(*tiny_dataset)
    batches = TrainingBatches(
        dataset, dataset.captioned_indices("train"), batch_size=4, seq_per_img=1, seed=1, shuffle=shuffle
    )
    epochs = [[int(i) for k in range(4 * epoch, 4 * epoch + 4) for i in batches.image_indices(k)] for epoch in range(2)]
    assert sorted(epochs[0]) == sorted(epochs[1]) == list(range(16))
    assert (epochs[0] != epochs[1]) is shuffle
