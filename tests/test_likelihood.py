"""log p(caption | image): against the decoder step by step, against caption-eval, and from outside."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TINY_WORDS
from PIL import Image

from captioner.data.batch import Batch, PixelInputs
from captioner.data.vocabulary import Vocab
from captioner.inference.captioner import Captioner
from captioner.inference.likelihood import CAPTIONS_AT_ONCE, likelihoods
from captioner.model.attention_decoder import AttentionDecoder
from captioner.model.caption_model import CaptionModel
from captioner.model.checkpoint import Checkpoint, save_checkpoint
from captioner.model.config import ModelConfig
from captioner.model.decoder import Decoder
from captioner.model.target_logprobs import target_logprobs

CPU = ["--gpuid", -1, "--precision", "fp32"]
CONFIG = ModelConfig(
    vocab_size=len(TINY_WORDS), encoding_size=16, rnn_size=24, cnn_layer="pool5", conv_widths=(12,) * 13, fc_width=1
)


def tiny_model(tiny_cnn: Path, seed: int) -> CaptionModel:
    torch.manual_seed(seed)
    net = CaptionModel(CONFIG)
    net.encoder.load_state_dict(torch.load(tiny_cnn, weights_only=True), strict=False)
    with torch.no_grad():
        net.decoder.output.weight *= 12
    return net


@pytest.fixture
def model(tiny_cnn: Path, tmp_path: Path) -> Path:
    path = tmp_path / "model.pt"
    save_checkpoint(path, Checkpoint(CONFIG, Vocab(TINY_WORDS), tiny_model(tiny_cnn, 3).state_dict()))
    return path


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    folder = tmp_path / "photos"
    folder.mkdir()
    rng = np.random.default_rng(5)
    for number in range(1, 6):
        small = Image.fromarray(rng.integers(0, 256, size=(5, 5, 3), dtype=np.uint8))
        small.resize((200, 180), Image.Resampling.BICUBIC).save(folder / f"{number}.png")
    return folder


@pytest.mark.parametrize("kind", ["lstm", "attention"])
def test_word_by_word_it_is_what_step_says(kind: str) -> None:
    torch.manual_seed(0)
    decoder = (Decoder(7, 5, 6) if kind == "lstm" else AttentionDecoder(7, 5, 6, 2)).eval()
    features = torch.randn(2, 5) if kind == "lstm" else torch.randn(2, 9, 5)
    captions, image_of_caption = [[3, 1, 7, 2], [5], []], [1, 0, 1]
    labels = torch.tensor([ids + [0] * (4 - len(ids)) for ids in captions])
    with torch.no_grad():
        found = target_logprobs(decoder, features, labels, torch.tensor(image_of_caption))
        for row, (ids, image) in enumerate(zip(captions, image_of_caption, strict=True)):
            state, token = decoder.start(features[image : image + 1]), decoder.end_id
            for place, target in enumerate([*ids, decoder.end_id]):
                logprobs, state = decoder.step(torch.tensor([token]), state)
                assert found[row, place].item() == pytest.approx(logprobs[0, target - 1].item(), abs=1e-5)
                token = target
            assert not found[row, len(ids) + 1 :].any()


def test_it_agrees_with_caption_eval(model: Path, photos: Path, command, tmp_path: Path) -> None:
    captions, output = tmp_path / "captions.json", tmp_path / "scores.json"
    done = command("eval", "--model", model, "--image_folder", photos, *CPU, "--vis_dir", "", "--output", captions)
    assert done.returncode == 0, done.stderr
    done = command("score", "--model", model, "--images", photos, "--captions", captions, *CPU, "--output", output)
    assert done.returncode == 0, done.stderr
    expected, rows = json.loads(captions.read_text()), json.loads(output.read_text())
    assert [row["file_name"] for row in rows] == [f"{n}.png" for n in range(1, 6)]
    for own, row in zip(expected, rows, strict=True):
        assert row["caption"] == own["caption"]
        # A caption of full length has no END in caption-eval.
        if len(own["words"]) < CONFIG.max_length:
            assert row["logprob"] == pytest.approx(own["logprob"], abs=1e-4)
            assert row["confidence"] == pytest.approx(own["confidence"], abs=1e-4)
        for mine, theirs in zip(row["words"], own["words"], strict=True):
            assert mine["word"] == theirs["word"]
            assert mine["logprob"] == pytest.approx(theirs["logprob"], abs=1e-4)


def test_ranking_unknown_words_and_unreadable_pictures(model: Path, photos: Path, command, tmp_path: Path) -> None:
    (photos / "3.png").write_bytes(b"no picture")
    captions = tmp_path / "captions.json"
    texts = ["a red picture", "A blue picture!", "a zebra", ""]
    described = [{"id": n, "file_path": f"elsewhere/{n}.png", "captions": texts} for n in (1, 3)]
    captions.write_text(json.dumps(described))
    output = tmp_path / "scores.jsonl"
    done = command("score", "--model", model, "--images", photos, "--captions", captions, *CPU, "--output", output)
    assert done.returncode == 0, done.stderr
    assert "skipped" in done.stderr
    assert "3.png" in done.stderr
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    assert [row["caption"] for row in rows] == texts
    assert [row["unknown_words"] for row in rows] == [[], [], ["zebra"], []]
    assert rows[2]["words"][1]["word"] == "UNK"
    ranked = sorted(rows, key=lambda row: row["rank"])
    assert [row["rank"] for row in ranked] == [1, 2, 3, 4]
    assert [row["logprob"] for row in ranked] == sorted((row["logprob"] for row in rows), reverse=True)
    heading, *printed = done.stdout.splitlines()
    assert heading.split() == ["gain", "logprob", "caption"]
    assert [line.split()[0] for line in printed] == ["-"] * 4  # only one picture: nothing to compare with


def test_a_word_that_cannot_be_said_makes_a_caption_impossible(tiny_cnn: Path) -> None:
    words = [word if word != "UNK" else "zoo" for word in TINY_WORDS]
    captioner = Captioner([tiny_model(tiny_cnn, 3)], Vocab(words), torch.device("cpu"), torch.float32)
    batch = Batch(info=[{}], positions=[0], inputs=PixelInputs(torch.zeros(1, 3, 256, 256, dtype=torch.uint8)))
    ((_, judged),) = likelihoods(captioner, [batch], [["a zebra", "a zoo"]])
    assert judged[0].logprob == -math.inf
    assert judged[0].confidence == 0
    assert judged[0].unknown == ("zebra",)
    assert math.isfinite(judged[1].logprob)


def test_gain_is_over_the_mean_probability_with_the_other_pictures(
    model: Path, photos: Path, command, tmp_path: Path
) -> None:
    captions, output = tmp_path / "captions.json", tmp_path / "scores.json"
    captions.write_text(json.dumps([{"file_path": f"{n}.png", "captions": ["a red picture"]} for n in range(1, 6)]))
    done = command("score", "--model", model, "--images", photos, "--captions", captions, *CPU, "--output", output)
    assert done.returncode == 0, done.stderr
    rows = json.loads(output.read_text())
    probabilities = np.exp([row["logprob"] for row in rows])  # all five pictures are judged with the same words
    for place, row in enumerate(rows):
        others = np.delete(probabilities, place).mean()
        assert row["gain"] == pytest.approx(math.log(probabilities[place] / others), abs=1e-4)
    printed = [float(line.split()[0]) for line in done.stdout.splitlines()[1:]]
    assert printed == sorted(printed)
    assert len(printed) == 5


def test_models_average_and_batches_do_not_matter(tiny_cnn: Path) -> None:
    nets = [tiny_model(tiny_cnn, seed) for seed in (1, 2)]
    generator = np.random.default_rng(0)
    images = torch.from_numpy(generator.integers(0, 256, size=(3, 3, 256, 256), dtype=np.uint8))
    captions = [
        [" ".join(generator.choice(TINY_WORDS[:-1], size=generator.integers(1, 9))) for _ in range(CAPTIONS_AT_ONCE)]
        for _ in range(3)
    ]
    whole = Batch(info=[{}] * 3, positions=[0, 1, 2], inputs=PixelInputs(images))

    def judge(models: list[CaptionModel], batches: list[Batch]) -> np.ndarray:
        captioner = Captioner(models, Vocab(TINY_WORDS), torch.device("cpu"), torch.float32)
        judged = [one for _, of_image in likelihoods(captioner, batches, captions) for one in of_image]
        return np.concatenate([one.word_logprobs for one in judged])

    both = judge(nets, [whole])
    np.testing.assert_allclose(judge(nets, whole.split(3)), both, atol=1e-4)
    first, second = judge(nets[:1], [whole]), judge(nets[1:], [whole])
    np.testing.assert_allclose(both, np.logaddexp(first, second) - math.log(2), atol=1e-4)


def test_bad_input_is_one_line(model: Path, photos: Path, command, tmp_path: Path) -> None:
    captions = tmp_path / "captions.json"
    captions.write_text('[{"image_id": 1, "caption": "a dog"}]')

    def error(*arguments: object) -> str:
        done = command("score", "--model", model, *CPU, *arguments)
        assert done.returncode == 1
        assert done.stderr.count("\n") == 1
        return done.stderr

    assert "image 1 has no file name" in error("--images", photos, "--captions", captions)
    assert "nowhere: is no folder" in error("--images", "nowhere", "--captions", captions)
    assert "x.txt: results cannot be written" in error("--images", photos, "--captions", captions, "--output", "x.txt")
