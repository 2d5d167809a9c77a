"""Photos by words: against brute force, and from outside."""

import dataclasses
import json
import math
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TINY_WORDS
from PIL import Image

from captioner.data.batch import FeatureInputs
from captioner.data.vocabulary import Vocab
from captioner.inference import find, photo_index
from captioner.model.caption_model import CaptionModel, build_model
from captioner.model.checkpoint import Checkpoint, save_checkpoint
from captioner.model.config import ModelConfig
from captioner.model.encoder import coarser_grid
from captioner.model.one_text import text_logprobs

CPU = ["--gpuid", -1, "--precision", "fp32"]
SHAPE = {"vocab_size": len(TINY_WORDS), "encoding_size": 16, "rnn_size": 24, "cnn_layer": "pool5"}
TEXT = "a red picture"


@pytest.fixture(params=["lstm", "attention"])
def checkpoint(request: pytest.FixtureRequest, tiny_cnn: Path) -> Checkpoint:
    more = {"decoder": "attention", "attention_heads": 2} if request.param == "attention" else {}
    config = ModelConfig(**SHAPE, conv_widths=(12,) * 13, fc_width=1, **more)
    torch.manual_seed(3)
    net = CaptionModel(config)
    net.encoder.load_state_dict(torch.load(tiny_cnn, weights_only=True), strict=False)
    with torch.no_grad():
        (net.decoder.embedding if more else net.decoder.output).weight.mul_(12)
    return Checkpoint(config, Vocab(TINY_WORDS), net.state_dict())


@pytest.fixture
def model(checkpoint: Checkpoint, tmp_path: Path) -> Path:
    save_checkpoint(tmp_path / "model.pt", checkpoint)
    return tmp_path / "model.pt"


@pytest.fixture
def photos(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder = tmp_path / "photos"
    folder.mkdir()
    rng = np.random.default_rng(5)
    for number in range(1, 10):
        small = Image.fromarray(rng.integers(0, 256, size=(5, 5, 3), dtype=np.uint8))
        small.resize((200, 180), Image.Resampling.BICUBIC).save(folder / f"{number}.png")
    return folder


def judged(model: Path, photos: Path, command, text: str = TEXT) -> dict[str, float]:
    """log p of a text's words with each photo, as caption-score says it of given captions, by other code."""
    captions = model.with_name("captions.json")
    names = sorted(path.name for path in photos.iterdir())
    captions.write_text(json.dumps([{"file_path": name, "captions": [text]} for name in names]))
    output = model.with_name("judged.jsonl")
    argv = ["--model", model, "--images", photos, "--captions", captions, *CPU, "--output", output]
    assert command("score", *argv).returncode == 0
    rows = map(json.loads, output.read_text().splitlines())
    return {row["file_name"]: sum(word["logprob"] for word in row["words"]) for row in rows}


def search(model: Path, photos: Path, command, *more: object, query: str = TEXT) -> list[dict]:
    output = model.with_name("found.json")
    argv = ["--model", model, "--images", photos, "--query", query, *CPU, "--output", output, *more]
    done = command("score", *argv)
    assert done.returncode == 0, done.stderr
    return json.loads(output.read_text())


def test_all_photos_are_ranked_by_the_probability_of_the_text(model, photos, command):
    known = judged(model, photos, command)
    rows = search(model, photos, command)
    assert [row["file_name"] for row in rows] == sorted(known, key=lambda name: -known[name])
    assert [row["rank"] for row in rows] == list(range(1, 10))
    mean = math.log(np.mean(np.exp(list(known.values()))))
    for row in rows:  # features are kept in half precision
        assert row["logprob"] == pytest.approx(known[row["file_name"]], abs=0.02)
        assert row["gain"] == pytest.approx(known[row["file_name"]] - mean, abs=0.02)
        assert [word["word"] for word in row["words"][:3]] == TEXT.split()


@pytest.mark.parametrize("text", [(2,), (5, 3), (1, 4, 4, 2, 6, 3, 5)])
def test_the_words_of_one_text_are_as_likely_as_by_teacher_forcing(checkpoint, text):
    torch.manual_seed(7)
    net = build_model(checkpoint).eval()
    with torch.inference_mode():
        seen = net.encode(FeatureInputs(torch.rand(5, *net.encoder.feature_shape)))
        forced = net.decoder(seen, torch.tensor([text] * 5))[:, -len(text) - 1 : -1]  # (5, D, V+1)
        expected = torch.stack([forced[:, place, word - 1] for place, word in enumerate(text)], 1)
        torch.testing.assert_close(text_logprobs(net.decoder, seen, text), expected, atol=1e-5, rtol=1e-5)


def test_a_fine_grid_is_kept_as_the_means_of_four_cells():
    config = ModelConfig(
        **SHAPE | {"cnn_layer": "conv5_3"}, conv_widths=(12,) * 13, decoder="attention", attention_heads=2
    )
    torch.manual_seed(3)
    net = CaptionModel(config).eval()
    # Where the four cells of each square are alike, to look at them is to look at one of them.
    fours = torch.arange(49).view(7, 1, 7, 1).expand(7, 2, 7, 2).flatten()
    with torch.inference_mode():
        net.encoder.embed.position.copy_(torch.randn(49, 16)[fours])
        features = torch.rand(3, 49, 12)
        coarse = coarser_grid(features[:, fours])
        torch.testing.assert_close(coarse, features)
        exact = text_logprobs(net.decoder, net.encode(FeatureInputs(features[:, fours])), [2, 3, 1])
        torch.testing.assert_close(text_logprobs(net.decoder, net.encoder.embed.coarser()(coarse), [2, 3, 1]), exact)


@pytest.mark.parametrize("checkpoint", ["attention"], indirect=True)
def test_photos_are_found_by_a_model_with_a_fine_grid(checkpoint, photos, command, tmp_path):
    config = dataclasses.replace(checkpoint.config, cnn_layer="conv5_3")
    position = "encoder.embed.position"
    state = {**checkpoint.state_dict, position: torch.zeros(196, 16)}
    save_checkpoint(tmp_path / "fine.pt", Checkpoint(config, checkpoint.vocab, state))
    done = command("score", "--model", tmp_path / "fine.pt", "--images", photos, "--query", TEXT, "--top", 3, *CPU)
    assert done.returncode == 0 and len(done.stdout.splitlines()) >= 3, done.stderr
    (shard,) = (tmp_path / "cache").rglob("features*.npy")
    assert np.load(shard)["values"].shape == (9, 49 * 12)


def test_several_models_average_their_probabilities(model, checkpoint, photos, command):
    net = build_model(checkpoint)
    with torch.no_grad():
        for weight in net.decoder.parameters():
            weight.mul_(0.7)
    other = model.with_name("other.pt")
    save_checkpoint(other, Checkpoint(checkpoint.config, checkpoint.vocab, net.state_dict()))
    captions, output = model.with_name("captions.json"), model.with_name("judged.jsonl")
    captions.write_text(json.dumps([{"file_path": path.name, "captions": [TEXT]} for path in photos.iterdir()]))
    argv = ["--model", model, other, "--images", photos, *CPU, "--output", output]
    assert command("score", *argv, "--captions", captions).returncode == 0
    rows = map(json.loads, output.read_text().splitlines())
    known = {row["file_name"]: sum(word["logprob"] for word in row["words"]) for row in rows}
    assert command("score", *argv, "--query", TEXT, "--overwrite", "1").returncode == 0
    found = {row["file_name"]: row["logprob"] for row in map(json.loads, output.read_text().splitlines())}
    assert found == pytest.approx(known, abs=0.02)
    assert found != pytest.approx(judged(model, photos, command), abs=0.02)


def test_some_are_judged_and_the_others_guessed(model, photos, command, monkeypatch):
    whole = {row["file_name"]: row for row in search(model, photos, command)}
    for name, count in {"FIRST": 2, "SAMPLE": 2, "ROUNDS": 2, "EACH": 2, "PHOTOS_AT_ONCE": 3}.items():
        monkeypatch.setattr(find, name, count)
    rows = search(model, photos, command)
    assert 6 <= len(rows) <= 8
    assert [row["logprob"] for row in rows] == sorted((row["logprob"] for row in rows), reverse=True)
    for row in rows:
        assert row["logprob"] == pytest.approx(whole[row["file_name"]]["logprob"], abs=1e-4)


def test_what_judged_photos_show_corrects_the_guess_for_those_like_them():
    """Likeness says all here, and the first guess nothing."""
    rng = np.random.default_rng(0)
    photos = object.__new__(find.PhotoSearch)
    photos._likeness = rng.normal(size=(400, 8)).astype(np.float32) / 8**0.5
    truth = photos._likeness @ rng.normal(size=8) * 20 - 40
    rows = np.arange(0, 400, 8)
    corrected = photos._corrected(rng.normal(size=400).astype(np.float32), rows, truth[rows])
    assert np.corrcoef(corrected, truth)[0, 1] > 0.98
    alone = photos._corrected(np.zeros(400, np.float32), rows[:1], truth[rows[:1]])
    assert np.isfinite(alone).all()
    # Where the first guess says all, it is stretched and shifted only.
    corrected = photos._corrected((truth / 3 + 5).astype(np.float32), rows, truth[rows])
    np.testing.assert_allclose(corrected, truth, atol=1e-3)


def test_likely_words_are_those_of_the_steps_along_the_captions(checkpoint, tmp_path):
    """Photo by photo, beam by beam, by the decoder's teacher forcing, which is other code than its steps."""
    from captioner.inference.captioner import Captioner
    from captioner.search import SearchOptions
    from captioner.search import search as search_captions

    captioner = Captioner([build_model(checkpoint)], checkpoint.vocab, torch.device("cpu"), torch.float32)
    (net,) = captioner.models
    features = torch.rand(3, *net.encoder.feature_shape).half().float()
    photos = find.PhotoSearch(captioner, ("cnn", "model"), tmp_path)
    found = photos._likely_words(features.flatten(1).half().numpy())
    options = SearchOptions(beam_size=find.BEAMS, n_best=find.BEAMS, suppress=(checkpoint.vocab.unk_id,))
    for photo in range(3):
        with torch.inference_mode():
            encoding = net.encode(FeatureInputs(features[photo : photo + 1]))
            state = net.decoder.start(encoding)
            sizes = {"num_images": 1, "vocab_size": len(TINY_WORDS), "max_length": captioner.max_length}
            (captions,) = search_captions(net.decoder.step, state, options=options, **sizes)
            steps = []
            for caption in captions:
                labels = torch.tensor([caption.tokens])
                steps.append(net.decoder(encoding, labels)[0, -(len(caption.tokens) + 1) :])
        np.testing.assert_allclose(found[photo], torch.cat(steps).exp().mean(0).log().clamp(min=find.LEAST), atol=0.02)


def test_a_second_search_looks_at_no_photo_again(model, photos, command, monkeypatch):
    first = search(model, photos, command)
    (photos / "sub").mkdir()
    shutil.copy(photos / "3.png", photos / "sub" / "copy.png")  # its content is known
    os.utime(photos / "4.png")
    (photos / "5.png").rename(photos / "moved.png")
    monkeypatch.setattr(CaptionModel, "cnn_features", None)  # called, it raises
    again = search(model, photos, command, "--recursive")
    logprobs = {row["file_name"]: row["logprob"] for row in again}
    assert logprobs.pop("sub/copy.png") == logprobs["3.png"]
    assert sorted(logprobs.values()) == pytest.approx(sorted(row["logprob"] for row in first), abs=1e-5)
    assert logprobs["moved.png"] == next(row["logprob"] for row in first if row["file_name"] == "5.png")


def test_a_changed_photo_is_looked_at_again_and_a_broken_one_left_out(model, photos, command):
    first = {row["file_name"]: row["logprob"] for row in search(model, photos, command)}
    shutil.copy(photos / "1.png", photos / "2.png")
    (photos / "3.png").write_bytes(b"no picture")
    argv = ["--model", model, "--images", photos, "--query", TEXT, *CPU, "--output", model.with_name("found.csv")]
    done = command("score", *argv)
    assert done.returncode == 0
    assert "skipped" in done.stderr and "3.png" in done.stderr
    lines = model.with_name("found.csv").read_text().splitlines()
    found = {line.split(",")[1]: float(line.split(",")[3]) for line in lines[1:]}
    assert found["2.png"] == found["1.png"] == pytest.approx(first["1.png"])
    assert "3.png" not in found and len(found) == 8


def test_shards_another_language_model_and_a_killed_indexing(model, checkpoint, photos, command, monkeypatch):
    whole = search(model, photos, command)
    shutil.rmtree(model.with_name("cache"))
    monkeypatch.setattr(photo_index, "PHOTOS_OF_A_SHARD", 4)
    assert [row["file_name"] for row in search(model, photos, command)] == [row["file_name"] for row in whole]
    (store,) = model.with_name("cache").glob("captioner/photos-*")
    assert len(list(store.glob("features-*.npy"))) == 3
    # Killed before index.json: what it had stored is not believed.
    (store / "features-00003.npy").write_bytes(b"half")
    with torch.no_grad():
        checkpoint.state_dict["decoder.embedding.weight"] += 0.3
    other = model.with_name("other.pt")
    save_checkpoint(other, checkpoint)
    monkeypatch.setattr(CaptionModel, "cnn_features", None)  # the CNN is the same: its features are shared
    found = {row["file_name"]: row["logprob"] for row in search(other, photos, command)}
    assert found != {row["file_name"]: row["logprob"] for row in whole}
    assert len(list(store.glob("words-*.npy"))) == 6
    monkeypatch.undo()
    monkeypatch.setenv("XDG_CACHE_HOME", str(model.with_name("cache")))
    assert found == pytest.approx(judged(other, photos, command), abs=0.02)
    (store / "index.json").write_text("{")
    done = command("score", "--model", model, "--images", photos, "--query", TEXT, *CPU)
    assert done.returncode == 1 and f"delete the folder {store}" in done.stderr.splitlines()[-1]


@pytest.mark.parametrize("kind", ["features", "words"])
def test_a_changed_bit_in_the_index_ends_a_search(kind, model, photos, command):
    search(model, photos, command)
    (path,) = model.with_name("cache").rglob(f"{kind}-*.npy")
    data = bytearray(path.read_bytes())
    data[-5] ^= 4
    path.write_bytes(data)
    done = command("score", "--model", model, "--images", photos, *CPU, "--query", TEXT)
    assert done.returncode == 1 and "the check sum of row" in done.stderr.splitlines()[-1], done.stderr


def test_unknown_words_are_left_out_and_named(model, photos, command):
    argv = ["--model", model, "--images", photos, *CPU, "--query"]
    done = command("score", *argv, "a reed picture")
    assert done.returncode == 0
    assert "does not know reed (it knows red); searched without" in done.stderr
    shutil.rmtree(model.with_name("cache"))
    done = command("score", *argv, TEXT, "zebra")
    assert done.returncode == 1 and done.stderr.endswith("say it in other words\n")
    assert "looked at" not in done.stderr  # said before the photos are


def test_several_texts_stdin_and_top(model, photos, command, monkeypatch):
    import io

    monkeypatch.setattr("sys.stdin", io.StringIO("it is all red\n\nzebra\na blue picture\n"))
    argv = ["--model", model, "--images", photos, *CPU, "--top", 2, "--query", TEXT, "-"]
    done = command("score", *argv)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert [line.split(maxsplit=2)[2] for line in lines[::3]] == [TEXT, "it is all red", "a blue picture"]
    assert len(lines) == 9 and "'zebra': the model knows none of these words" in done.stderr
    for first, second in (lines[1:3], lines[4:6], lines[7:9]):
        assert float(first.split()[0]) >= float(second.split()[0])


def test_what_is_found_as_a_page(model, photos, command, tmp_path):
    rows = search(model, photos, command, "--view", tmp_path / "page", "--top", 3)
    shown = json.loads((tmp_path / "page/vis.json").read_text())
    assert [row["file_name"] for row in shown] == [row["file_name"] for row in rows]
    assert all((tmp_path / "page" / row["image"]).is_file() for row in shown)
    assert TEXT in (tmp_path / "page/about.json").read_text()
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs/index.html").write_text("mine")
    done = command("score", "--model", model, "--images", photos, "--query", TEXT, *CPU, "--view", tmp_path / "theirs")
    assert done.returncode == 1 and (tmp_path / "theirs/index.html").read_text() == "mine"


def test_recall_counts_the_photos_that_their_captions_find(model, photos, command, tmp_path):
    texts = ["a red picture", "it is all blue", "green"]
    known = {text: judged(model, photos, command, text) for text in texts}
    rows = [{"file_path": f"{n}.png", "captions": texts} for n in range(1, 10)]
    captions, output = tmp_path / "captions.json", tmp_path / "recall.json"
    captions.write_text(json.dumps(rows))
    argv = ["--model", model, "--images", photos, "--captions", captions, *CPU, "--recall", -1, "--output", output]
    done = command("score", *argv)
    assert done.returncode == 0, done.stderr
    scores = json.loads(output.read_text())
    # Every text is asked for every photo once, so that ranks 1 to 9 come equally often.
    assert scores["R@1"] == pytest.approx(1 / 9) and scores["R@5"] == pytest.approx(5 / 9) and scores["R@10"] == 1
    assert scores["median_rank"] == 5
    assert "27 captions, each searched among 9 photos" in done.stdout
    # Captions of three photos each, whose place is known from elsewhere.
    order = sorted(known[texts[0]], key=lambda name: -known[texts[0]][name])
    captions.write_text(json.dumps([{"file_path": name, "captions": texts[:1]} for name in order[:1]]))
    shutil.copy(captions, tmp_path / "one.json")
    for name in order[3:]:
        (photos / name).unlink()
    some = [{"file_path": name, "captions": [texts[0]] if place < 1 else []} for place, name in enumerate(order[:3])]
    captions.write_text(json.dumps(some))
    assert command("score", *argv).returncode == 0
    assert json.loads(output.read_text())["median_rank"] == 1


def test_options_that_do_not_belong_together(photos, command):
    assert command("score", "--images", photos, "--query", TEXT, "--captions", "x.json").returncode == 2
    done = command("score", "--images", photos, "--query", TEXT, "more", "--view", "page")
    assert done.returncode == 1 and "--view shows what one text finds" in done.stderr
