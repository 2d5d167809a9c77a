"""caption-eval over the hostile folder: each usable picture captioned, each other one named with its reason."""

import json
from pathlib import Path

import pytest
import torch
from hostile import make_hostile_folder

from captioner.cli import eval as caption_eval
from captioner.data.vocabulary import Vocab
from captioner.model.caption_model import CaptionModel
from captioner.model.checkpoint import Checkpoint, save_checkpoint
from captioner.model.config import ModelConfig


def save_model(path: Path) -> None:
    config = ModelConfig(
        vocab_size=3, encoding_size=4, rnn_size=4, cnn_layer="pool5", conv_widths=(2,) * 13, fc_width=1
    )
    torch.manual_seed(0)
    checkpoint = Checkpoint(config, Vocab(["a", "dog", "UNK"]), CaptionModel(config).state_dict())
    save_checkpoint(path, checkpoint)


def test_hostile_folder(tmp_path: Path, capfd: pytest.CaptureFixture) -> None:
    expected = make_hostile_folder(tmp_path / "photos")
    save_model(tmp_path / "model.pt")
    argv = ["--model", str(tmp_path / "model.pt"), "--image_folder", str(tmp_path / "photos"), "--gpuid", "-1"]
    argv += ["--vis_dir", str(tmp_path / "vis"), "--output", str(tmp_path / "captions.json"), "--num_workers", "1"]
    assert caption_eval.main(argv) == 0
    rows = json.loads((tmp_path / "captions.json").read_text())
    assert {row["file_name"] for row in rows} == {name for name, usable in expected.items() if usable}
    error = capfd.readouterr().err
    for name, usable in expected.items():
        assert (f"{tmp_path / 'photos' / name}: " in error) is not usable, name
    assert all((tmp_path / "vis" / row["image"]).is_file() for row in rows if "image" in row)


def test_nothing_is_left_where_no_picture_can_be_read(tmp_path: Path, capfd: pytest.CaptureFixture) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "broken.jpg").write_bytes(b"\xff\xd8\xff broken")
    save_model(tmp_path / "model.pt")
    argv = ["--model", str(tmp_path / "model.pt"), "--image_folder", str(tmp_path / "photos"), "--gpuid", "-1"]
    assert caption_eval.main([*argv, "--dump_json", "0", "--output", str(tmp_path / "captions.json")]) == 1
    assert "none of the 1 pictures could be read" in capfd.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.pt", "photos"]
