"""--grow_vocab: a model gets the words of other data, and keeps what it knows about those it knew."""

import json

import h5py
import numpy as np
import pytest
import torch

from captioner.data.batch import PixelInputs
from captioner.data.vocabulary import Vocab
from captioner.model.caption_model import CaptionModel, build_model
from captioner.model.checkpoint import Checkpoint, TrainingHistory, load_checkpoint
from captioner.model.config import ModelConfig
from captioner.model.grow_vocab import grow_vocab

ROWS_OF_WORDS = {
    "lstm": ["embedding.weight", "output.weight", "output.bias"],
    "attention": ["embedding.weight", "output_bias"],
}
OLD = ["a", "dog", "cat", "runs", "UNK"]
NEW = {
    "some of each": ["tree", "cat", "a", "zebra", "UNK"],
    "without UNK": ["cat", "a", "zebra"],
    "nothing in common": ["x", "y"],
    "the same words in another order": ["UNK", "runs", "a", "cat", "dog"],
    "the same": OLD,
}


@pytest.fixture(scope="module", params=["lstm", "attention"])
def start(request) -> Checkpoint:
    torch.manual_seed(5)
    config = ModelConfig(
        len(OLD), 16, encoding_size=6, rnn_size=8, cnn_layer="pool5", conv_widths=(2,) * 13, decoder=request.param
    )
    history = TrainingHistory(iteration=9, best_score=1.0)
    return Checkpoint(config, Vocab(OLD), CaptionModel(config).state_dict(), history)


@pytest.mark.parametrize("case", NEW)
def test_every_row_is_where_its_word_is(case, start):
    grown = grow_vocab(start, Vocab(NEW[case]), 20)
    words = [*OLD, *(word for word in NEW[case] if word not in OLD)]
    per_word = ROWS_OF_WORDS[start.config.decoder]
    assert (grown.config.vocab_size, grown.config.max_length, grown.history.iteration) == (len(words), 20, 0)
    assert grown.vocab.words == tuple(words)
    for name in per_word:
        before, after = start.state_dict[f"decoder.{name}"], grown.state_dict[f"decoder.{name}"]
        assert len(after) == len(words) + 1
        for row, word in enumerate(words):
            expected = before[OLD.index(word)] if word in OLD else before[:-1].mean(0)
            torch.testing.assert_close(after[row], expected, rtol=0, atol=0 if word in OLD else 1e-7)
        assert torch.equal(after[-1], before[-1])  # END
    others = start.state_dict.keys() - {f"decoder.{name}" for name in per_word}
    assert len(others) > 20
    for name in others:
        assert torch.equal(grown.state_dict[name], start.state_dict[name])


def test_shared_words_keep_their_logits(start):
    """Along a caption of shared words their log-probabilities differ by one constant per step: the normalisation."""
    grown = grow_vocab(start, Vocab(NEW["some of each"]), 16)
    words = grown.vocab.words
    old, new = build_model(start), build_model(grown)
    images = torch.randint(0, 256, (3, 3, 256, 256), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    spoken = ["<start>", "a", "cat", "UNK", "cat"]
    shared = ["a", "cat", "UNK"]
    logprobs = []
    with torch.inference_mode():
        for model, vocabulary in ((old, OLD), (new, words)):
            ids = {word: k for k, word in enumerate([*vocabulary, "<start>"], start=1)}
            columns = [ids[word] - 1 for word in [*shared, "<start>"]]
            state = model.decoder.start(model.encode(PixelInputs(images)))
            steps = []
            for word in spoken:
                step, state = model.decoder.step(torch.full((3,), ids[word]), state)
                steps.append(step[:, columns])
            logprobs.append(torch.stack(steps))
    difference = logprobs[1] - logprobs[0]  # (steps, images, words)
    assert difference.abs().max() > 1e-3
    torch.testing.assert_close(difference, difference[..., :1].expand_as(difference), rtol=0, atol=1e-6)


def test_new_words_are_no_likelier_than_the_old_ones_on_average(start):
    """The exponential is convex: that of a mean of logits is at most the mean of theirs."""
    grown = build_model(grow_vocab(start, Vocab(["tree", "zebra"]), 16))
    images = torch.randint(0, 256, (8, 3, 256, 256), dtype=torch.uint8, generator=torch.Generator().manual_seed(2))
    with torch.inference_mode():
        state = grown.decoder.start(grown.encode(PixelInputs(images)))
        step, _ = grown.decoder.step(torch.full((8,), len(OLD) + 3), state)
    old, new = step.exp()[:, : len(OLD)], step.exp()[:, len(OLD) : -1]
    assert new.shape == (8, 2) and bool((new > 0).all())
    assert bool((new <= old.mean(1, keepdim=True) * (1 + 1e-6)).all())


def test_the_log_says_what_became_of_the_words(start, caplog):
    with caplog.at_level("INFO"):
        grown = grow_vocab(start, Vocab(["tree", "cat", "a"], tokenizer="unicode"), 16)
    assert grown.vocab.tokenizer == "unicode"
    assert "the model's 5 words and 1 new" in caplog.text
    assert "split by the unicode rule, the model's by the ascii rule" in caplog.text


@pytest.fixture(scope="module")
def other_words(tiny_dataset, tmp_path_factory):
    """The tiny data set with "photo" for "picture", captions of up to 18 words, and no UNK."""
    folder = tmp_path_factory.mktemp("other")
    content = json.loads(tiny_dataset[1].read_text())
    words = ["photo" if word == "picture" else word for word in content["ix_to_word"].values() if word != "UNK"]
    content["ix_to_word"] = {str(k): word for k, word in enumerate(words, start=1)}
    (folder / "data.json").write_text(json.dumps(content))
    with h5py.File(tiny_dataset[0]) as source, h5py.File(folder / "data.h5", "w") as target:
        for name in source:
            if name != "labels":
                target.create_dataset(name, data=source[name])
        target.create_dataset("labels", data=[[*row, 0, 0] for row in source["labels"][:].tolist()], dtype="uint32")
    return ["--input_h5", folder / "data.h5", "--input_json", folder / "data.json"]


@pytest.fixture(scope="module")
def trained(tiny_dataset, tiny_cnn, command, tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    done = command(
        "train", "--input_h5", tiny_dataset[0], "--input_json", tiny_dataset[1], "--cnn_model", tiny_cnn, *SIZES,
        "--max_iters", 60, "--learning_rate", 0.02, "--cache_features", 1, "--checkpoint_path", folder,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return folder / "model_id.pt"


SIZES = ["--cnn_layer", "pool5", "--rnn_size", 24, "--input_encoding_size", 16, "--gpuid", -1, "--batch_size", 4]


def test_a_trained_model_moves_and_goes_on_where_it_was_killed(trained, other_words, command, tmp_path):
    argv = [*other_words, *SIZES, "--start_from", trained, "--grow_vocab", 1, "--checkpoint_path", tmp_path]
    done = command("train", *argv, "--max_iters", 4)
    assert done.returncode == 0, done.stderr
    assert "vocabulary: the model's 10 words and 1 new" in done.stderr
    moved = load_checkpoint(tmp_path / "model_id_last.pt")
    assert moved.config.max_length == 18
    assert moved.vocab.words == (*load_checkpoint(trained).vocab.words, "photo")
    again = command("train", *argv, "--max_iters", 6, "--resume", "auto")
    assert again.returncode == 0, again.stderr
    assert "resumed at iteration 4" in again.stderr and "words and" not in again.stderr
    evaluated = command(
        "eval",
        "--model",
        tmp_path / "model_id_last.pt",
        "--split",
        "test",
        "--gpuid",
        -1,
        "--vis_dir",
        "",
        *other_words,
    )
    assert evaluated.returncode == 0, evaluated.stderr


def test_a_new_word_that_occurs_once_is_unk(trained, other_words, command, tmp_path):
    """It is not learnt, whether the vocabulary grows or not; the words around it are."""
    content = json.loads(other_words[3].read_text())
    known = load_checkpoint(trained).vocab.words
    words = [*content["ix_to_word"].values(), "once"]
    photo, once = words.index("photo") + 1, len(words)
    content["ix_to_word"] = {str(k): word for k, word in enumerate(words, start=1)}
    (tmp_path / "data.json").write_text(json.dumps(content))
    with h5py.File(other_words[1]) as source, h5py.File(tmp_path / "data.h5", "w") as target:
        for name in source:
            target.create_dataset(name, data=source[name])
        labels = target["labels"][:]
        labels[tuple(np.argwhere(labels == photo)[0])] = once
        target["labels"][:] = labels
    argv = ["--input_h5", tmp_path / "data.h5", "--input_json", tmp_path / "data.json", *SIZES, "--start_from", trained]
    done = command("train", *argv, "--grow_vocab", 1, "--max_iters", 2, "--checkpoint_path", tmp_path / "run")
    assert done.returncode == 0, done.stderr
    assert "1 words that the model does not know occur only once in the data: UNK" in done.stderr
    assert load_checkpoint(tmp_path / "run/model_id_last.pt").vocab.words == (*known, "photo")
    again = command(
        "train", *argv, "--grow_vocab", 1, "--max_iters", 3, "--resume", "auto", "--checkpoint_path", tmp_path / "run"
    )
    assert again.returncode == 0 and "resumed at iteration 2" in again.stderr, again.stderr
    data = [*argv[:4], "--split", "val", "--gpuid", -1, "--vis_dir", ""]
    evaluated = command("eval", "--model", tmp_path / "run/model_id_last.pt", *data)  # on what it was trained on
    assert evaluated.returncode == 0, evaluated.stderr
    done = command("train", *argv, "--checkpoint_path", tmp_path / "no")
    assert done.returncode == 1
    assert "the model does not know 1 of its 10 words, 'photo'" in done.stderr.splitlines()[-1]


def test_without_the_option_other_words_are_one_line_that_names_it(trained, other_words, command, tmp_path):
    done = command("train", *other_words, *SIZES, "--start_from", trained, "--checkpoint_path", tmp_path)
    assert done.returncode == 1
    last = done.stderr.splitlines()[-1]
    assert "the model does not know 1 of its 9 words, 'photo'" in last and "--grow_vocab 1" in last
    assert not list(tmp_path.iterdir())


def test_it_needs_a_model_to_start_from(other_words, command, tmp_path):
    done = command("train", *other_words, *SIZES, "--grow_vocab", 1, "--checkpoint_path", tmp_path)
    assert done.returncode == 1
    assert "--grow_vocab needs a model to start from" in done.stderr
