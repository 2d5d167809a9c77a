"""--input_h5 with several files: what is trained and judged from parts is what it is from the whole."""

import json

import pytest
import torch

from captioner.model.checkpoint import load_checkpoint

SMALL = ["--cnn_layer", "pool5", "--rnn_size", 24, "--input_encoding_size", 16, "--gpuid", -1, "--batch_size", 4]
SMALL += ["--seq_per_img", 2, "--precision", "fp32", "--num_workers", 0, "--val_images_use", -1]
SMALL += ["--max_iters", 6, "--save_checkpoint_every", 3, "--losses_log_every", 1, "--language_eval", 1]


def test_two_halves_train_what_the_whole_trains(tiny_dataset, two_files, tiny_cnn, command, tmp_path, without_java):
    whole = ["--input_h5", tiny_dataset[0], "--input_json", tiny_dataset[1]]
    for name, files in (("whole", whole), ("halves", two_files)):
        argv = [*files, "--cnn_model", tiny_cnn, *SMALL, "--checkpoint_path", tmp_path / name]
        done = command("train", *argv)
        assert done.returncode == 0, done.stderr
        done = command("train", *argv, "--resume", "auto")
        assert "done already" in done.stderr and "changed options" not in done.stderr
    one, other = (load_checkpoint(tmp_path / name / "model_id_last.pt") for name in ("whole", "halves"))
    assert one.vocab == other.vocab and one.history.loss_history == other.history.loss_history
    assert one.history.val_predictions == other.history.val_predictions
    assert one.history.val_lang_stats_history == other.history.val_lang_stats_history
    assert all(torch.equal(tensor, other.state_dict[name]) for name, tensor in one.state_dict.items())

    # caption-eval finds the files again; and takes one of them, whose words the model has under other ids.
    judged = {}
    for name, files in (("whole", []), ("halves", []), ("second", [*two_files[:1], *two_files[2:4], two_files[5]])):
        model = tmp_path / ("halves" if name == "second" else name) / "model_id_last.pt"
        argv = ["--model", model, *files, "--split", "test", "--gpuid", -1, "--vis_dir", "", "--num_images", -1]
        done = command("eval", *argv, "--output", tmp_path / f"{name}.json")
        assert done.returncode == 0, done.stderr
        loss = next(line for line in done.stdout.splitlines() if "loss" in line)
        rows = json.loads((tmp_path / f"{name}.json").read_text())
        judged[name] = loss, [(row["image_id"], row["caption"]) for row in rows]
    assert judged["whole"] == judged["halves"] == judged["second"] and len(judged["whole"][1]) == 5


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--source_weights", "a=2,c=1"], "names 'c', which no training image comes from; expected a"),
        (["--input_h5", "gone.h5"], "1 h5 and 2 json files"),
    ],
)
def test_what_is_wrong_is_one_line(change, message, two_files, tiny_cnn, command, tmp_path):
    done = command("train", *two_files, "--cnn_model", tiny_cnn, *SMALL, "--checkpoint_path", tmp_path, *change)
    assert done.returncode == 1 and message in done.stderr.splitlines()[-1]


def test_an_epoch_has_the_images_of_a_file_as_often_as_is_said(two_files, tiny_cnn, command, tmp_path):
    argv = [*two_files, "--cnn_model", tiny_cnn, *SMALL, "--checkpoint_path", tmp_path, "--plan", 1]
    assert "iterations   4.0 an epoch" in command("train", *argv).stdout  # 16 images, all of them in the first file
    assert "iterations   8.0 an epoch" in command("train", *argv, "--source_weights", "a=2").stdout
