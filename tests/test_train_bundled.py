"""scripts/train_bundled: the whole command passes, in small."""

import json
import os
import subprocess
from pathlib import Path

import numpy as np
from PIL import Image

from captioner.model.checkpoint import load_checkpoint

ROOT = Path(__file__).parents[1]
COLOURS = {"red": (220, 30, 30), "green": (30, 200, 40), "blue": (40, 60, 220)}


def test_every_step_passes_and_a_second_time_finds_it_done(tiny_cnn, tmp_path):
    rng = np.random.default_rng(0)
    for source, splits in (("flickr8k", 10), ("coco_val2014_part", 10), ("coco_train2014_part", 8)):
        (tmp_path / "data" / source).mkdir(parents=True)
        rows = []
        for number in range(splits):
            name, colour = list(COLOURS.items())[number % 3]
            pixels = np.clip(np.array(colour) + rng.integers(-20, 21, (64, 48, 3)), 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(tmp_path / "data" / source / f"{number}.jpg")
            captions = [f"a {name} picture", f"a {name} wall on the left"][: 1 + number % 2]
            rows.append({"file_path": f"{number}.jpg", "captions": captions, "split": "train" if number < 8 else "val"})
        (tmp_path / "data" / source / "dataset.json").write_text(json.dumps(rows))
    photos, work = tmp_path / "data" / "coco_train2014_part", tmp_path / "work"
    command = ["bash", ROOT / "scripts" / "train_bundled", "--try", tmp_path / "data", photos, tiny_cnn, work]

    def run() -> str:
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout + done.stderr

    said = run()
    assert "28 photos" in said and "GB are free" in said and "hours for the features" in said
    assert said.index("GB are free") < said.index("time  ") < said.index("24 training images")
    model = load_checkpoint(work / "captioner-vgg16.pt")
    assert model.config.decoder == "attention" and model.vocab.tokenizer == "ptb"
    assert model.config.cnn_layer == "conv5_3"
    sources = {entry.get("source") for entry in json.loads((work / "data.json").read_text())["images"]}
    assert sources == {f"{name}/dataset" for name in ("flickr8k", "coco_val2014_part", "coco_train2014_part")}
    assert json.loads((work / "rewards" / "model_id.json").read_text())["reward_history"]
    again = run()
    assert again.count("done already") == 2
