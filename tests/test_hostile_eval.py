"""caption-eval over the hostile folder: each usable picture captioned, each other one named with its reason."""

import json
from pathlib import Path

import pytest
import torch
from hostile import make_hostile_folder

from captioner.checkpoint import Checkpoint, save_checkpoint
from captioner.cli import eval as caption_eval
from captioner.model import CaptionModel, ModelConfig
from captioner.text import Vocab


def test_hostile_folder(tmp_path: Path, capfd: pytest.CaptureFixture) -> None:
    expected = make_hostile_folder(tmp_path / "photos")
    config = ModelConfig(
        vocab_size=3, encoding_size=4, rnn_size=4, cnn_layer="pool5", conv_widths=(2,) * 13, fc_width=1
    )
    torch.manual_seed(0)
    checkpoint = Checkpoint(config, Vocab(["a", "dog", "UNK"]), CaptionModel(config).state_dict())
    save_checkpoint(tmp_path / "model.pt", checkpoint)
    argv = ["--model", str(tmp_path / "model.pt"), "--image_folder", str(tmp_path / "photos"), "--gpuid", "-1"]
    argv += ["--vis_dir", str(tmp_path / "vis"), "--output", str(tmp_path / "captions.json"), "--num_workers", "1"]
    assert caption_eval.main(argv) == 0
    rows = json.loads((tmp_path / "captions.json").read_text())
    assert {row["file_name"] for row in rows} == {name for name, usable in expected.items() if usable}
    error = capfd.readouterr().err
    for name, usable in expected.items():
        assert (f"{tmp_path / 'photos' / name}: " in error) is not usable, name
    assert all((tmp_path / "vis" / row["image"]).is_file() for row in rows if "image" in row)
