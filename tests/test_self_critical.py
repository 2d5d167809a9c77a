"""Self-critical training: the reward is the corpus scorer's, the gradient the policy's, and a crash costs nothing."""

import json
import logging
import math

import numpy as np
import pytest
import torch
from torch import nn

from captioner.data.vocabulary import Vocab
from captioner.metrics.ngrams import NgramTable, bleu, cider
from captioner.metrics.reward import DocumentFrequencies, rewards
from captioner.model.caption_model import CaptionModel
from captioner.model.checkpoint import load_checkpoint
from captioner.model.config import ModelConfig
from captioner.training.health_checks import SampleTrend
from captioner.training.self_critical import Samples, advantages, sample_captions, with_end

NUM_IDS = 7  # 6 words and END
END = 7


def random_captions(rng: np.random.Generator, count: int) -> list[list[int]]:
    """Ids with END; some of one word, some that say things twice."""
    return [[*rng.integers(1, NUM_IDS, size=rng.integers(1, 9)).tolist(), END] for _ in range(count)]


def text(caption: list[int]) -> str:
    return " ".join(f"w{word}" for word in caption)


@pytest.mark.parametrize("seed", range(4))
def test_the_reward_is_what_the_scorer_of_corpora_says(seed):
    rng = np.random.default_rng(seed)
    references = [random_captions(rng, count) for count in (5, 1, 3, 2, 1, 4)]
    samples = [random_captions(rng, 3) for _ in references]
    samples[0][0] = references[0][1]  # a perfect one
    samples[1][2] = [2, 2, 2]  # one that breaks off
    rows = [caption for of_image in references for caption in of_image]
    padded = np.array([caption + [0] * (10 - len(caption)) for caption in rows])
    image = np.repeat(np.arange(len(references)), [len(of_image) for of_image in references])
    frequencies = DocumentFrequencies.of(padded, image + 100, NUM_IDS)
    for sample in range(3):
        table = NgramTable(
            [text(of_image[sample]) for of_image in samples],
            [[text(caption) for caption in of_image] for of_image in references],
        )
        scored, bleu_4 = cider(table).per_caption, bleu(table)["Bleu_4"].per_caption
        for i, of_image in enumerate(samples):
            assert rewards(of_image, references[i], frequencies)[sample] == pytest.approx(scored[i], abs=1e-9)
            both = rewards(of_image, references[i], frequencies, bleu_weight=2.0)[sample]
            assert both == pytest.approx(scored[i] + 2 * bleu_4[i], abs=1e-9)


def test_end_stands_after_the_last_word():
    labels = np.array([[3, 1, 0, 0], [1, 2, 3, 4], [0, 0, 0, 0], [1, 0, 2, 0]])
    assert with_end(labels, 9).tolist() == [[3, 1, 9, 0, 0], [1, 2, 3, 4, 9], [9, 0, 0, 0, 0], [1, 9, 0, 0, 0]]


def test_the_baseline_is_the_mean_of_the_others():
    reward = torch.tensor([1.0, 2.0, 6.0, 0.0, 0.0, 3.0])
    assert advantages(reward, 3).tolist() == pytest.approx([-3.0, -1.5, 4.5, -1.5, -1.5, 3.0])


CONFIGS = {
    "lstm": ModelConfig(5, 4, encoding_size=6, rnn_size=8, cnn_layer="pool5", conv_widths=(2,) * 13),
    "attention": ModelConfig(
        5, 4, 6, 8, cnn_layer="pool5", conv_widths=(2,) * 13, decoder="attention", attention_heads=2
    ),
}


@pytest.fixture(params=CONFIGS)
def model(request) -> CaptionModel:
    torch.manual_seed(0)
    return CaptionModel(CONFIGS[request.param]).eval()


@pytest.fixture
def encodings(model) -> torch.Tensor:
    shape = (2, 6) if model.config.decoder == "lstm" else (2, 49, 6)
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


def test_samples_have_the_probability_they_are_drawn_with(model, encodings):
    """Log-probabilities against those of the whole caption, word by word; a banned word never comes."""
    banned, temperature = [2], 0.7
    torch.manual_seed(3)
    samples = sample_captions(model, encodings, samples=40, temperature=temperature, banned=banned)
    assert len(samples.words) == 80 and len({tuple(words) for words in samples.words}) > 10
    assert not any(2 in words for words in samples.words)
    for k, words in enumerate(samples.words):
        assert words.count(6) == (1 if words[-1] == 6 else 0) and len(words) <= 5
        image = encodings[k // 40 : k // 40 + 1]
        labels = torch.tensor([[word for word in words if word != 6] + [0] * 5])[:, :5]
        rows = model.decoder(image, labels)[0]
        rows = rows[len(rows) - 6 :]  # without the LSTM decoder's step for the image
        rows[:, 1] = -math.inf
        expected = sum(float((rows[t].detach() / temperature).log_softmax(0)[word - 1]) for t, word in enumerate(words))
        assert float(samples.logprob[k].detach()) == pytest.approx(expected, abs=1e-4)


def test_samples_are_drawn_as_often_as_they_are_likely(model, encodings):
    torch.manual_seed(5)
    samples = sample_captions(model, encodings[:1], samples=4000, temperature=1.0, banned=[])
    likely = {tuple(words): float(samples.logprob[k].detach().exp()) for k, words in enumerate(samples.words)}
    (words, probability), *_ = sorted(likely.items(), key=lambda pair: -pair[1])
    share = sum(tuple(drawn) == words for drawn in samples.words) / 4000
    assert share == pytest.approx(probability, abs=5 * math.sqrt(probability / 4000))


def test_in_training_one_dropout_mask_is_for_sample_and_gradient(model, encodings):
    """The gradient of what is reported, by finite differences over draws with the same random numbers."""
    model, encodings = model.double(), encodings.double()
    bias = model.decoder.output.bias if model.config.decoder == "lstm" else model.decoder.output_bias

    def sample() -> Samples:
        torch.manual_seed(4)
        return sample_captions(model, encodings, samples=6, temperature=0.7, banned=[2])

    without = sample()
    model.train()
    with_dropout = sample()
    assert not torch.allclose(without.logprob, with_dropout.logprob)
    (gradient,) = torch.autograd.grad(with_dropout.logprob.sum(), bias)
    for word in (0, 3, 5):
        sums = []
        for step in (1e-5, -1e-5):
            with torch.no_grad():
                bias[word] += step
                moved = sample()
                bias[word] -= step
            assert moved.words == with_dropout.words
            sums.append(float(moved.logprob.sum()))
        assert (sums[0] - sums[1]) / 2e-5 == pytest.approx(float(gradient[word]), abs=1e-5)


def test_what_is_rewarded_becomes_likelier(model, encodings):
    """A reward for saying word 3: after some steps of plain gradient descent it is said far more often."""
    optimizer = torch.optim.Adam(model.decoder.parameters(), lr=0.02)

    def said() -> float:
        torch.manual_seed(9)
        drawn = sample_captions(model, encodings, samples=200, temperature=1.0, banned=[2]).words
        return sum(words.count(3) for words in drawn) / len(drawn)

    before = said()
    for step in range(25):
        torch.manual_seed(step)
        samples = sample_captions(model, encodings, samples=8, temperature=1.0, banned=[2])
        reward = torch.tensor([float(words.count(3)) for words in samples.words])
        loss = -(advantages(reward, 8) * samples.logprob).sum() / len(reward)
        optimizer.zero_grad()
        loss.backward()
        assert all(p.grad is None or p.grad.isfinite().all() for p in model.decoder.parameters())
        optimizer.step()
    assert said() > before + 0.5


def test_collapse_is_told_once_of_each_kind(caplog):
    vocab = Vocab(["a", "dog", "cat", "runs", "red", "green"])
    end = vocab.size + 1

    def trend() -> SampleTrend:
        return SampleTrend(5.0, [1], end, window=20)

    healthy = [[1, 2, 4, 5, end], [1, 3, 4, 6, end]] * 10
    ways = {
        "have 2.0 words": [[1 + k % 6, end] for k in range(20)],
        "twice in a row": [[1, 2, 2, 3, 4, 5, 6, end][: 6 + k % 2] + [end] for k in range(20)],
        "end in an article": [[2, 3, 4, 5, 6, 1, end]] * 20,
        "use 2 words": [[2, 4, 2, 4, end]] * 20,
    }
    with caplog.at_level(logging.WARNING):
        calm = trend()
        for _ in range(5):
            calm.add(healthy)
        assert not caplog.records
        for message, samples in ways.items():
            caplog.clear()
            watch = trend()
            watch.add(healthy)
            watch.add(samples)
            watch.add(samples)
            assert [r for r in caplog.messages if message in r], (message, caplog.messages)
            assert len(caplog.messages) == len(set(caplog.messages))


RUN = ["--cnn_layer", "pool5", "--rnn_size", 24, "--input_encoding_size", 16, "--gpuid", -1, "--batch_size", 4]
RUN += ["--seq_per_img", 2, "--losses_log_every", 1, "--val_images_use", -1, "--learning_rate", 0.01]
RUN += ["--precision", "fp32", "--num_workers", 0, "--cache_features", 1, "--resume", "auto"]


@pytest.fixture(scope="module")
def data(tiny_dataset, tiny_cnn):
    return ["--input_h5", tiny_dataset[0], "--input_json", tiny_dataset[1], "--cnn_model", tiny_cnn, *RUN]


@pytest.mark.parametrize("decoder", ["lstm", "attention"])
def test_a_crash_amid_it_costs_nothing(decoder, data, command, tmp_path, crash_at_iteration):
    argv = [*data, "--decoder", decoder, "--max_iters", 8, "--save_checkpoint_every", 4, "--self_critical_after", 3]
    argv += ["--self_critical_samples", 3, "--self_critical_bleu", 0.5, "--checkpoint_path"]
    done = command("train", *argv, tmp_path / "whole")
    assert done.returncode == 0, done.stderr
    with crash_at_iteration(6):
        command("train", *argv, tmp_path / "broken")
    done = command("train", *argv, tmp_path / "broken")
    assert "resumed at iteration 4" in done.stderr and done.returncode == 0
    one, other = (load_checkpoint(tmp_path / folder / "model_id_last.pt") for folder in ("whole", "broken"))
    assert all(torch.equal(tensor, other.state_dict[key]) for key, tensor in one.state_dict.items())
    assert one.history.reward_history == other.history.reward_history
    report = json.loads((tmp_path / "whole" / "model_id.json").read_text())
    assert list(report["loss_history"]) == ["0", "1", "2"]
    assert list(report["reward_history"]) == ["3", "4", "5", "6", "7"]
    assert "iter 5 (epoch 1.25): reward " in (command("train", *argv, tmp_path / "again").stderr)


@pytest.mark.usefixtures("without_java")
def test_it_raises_the_reward_and_the_score(data, command, tmp_path):
    first = [*data, "--max_iters", 60, "--save_checkpoint_every", 60, "--language_eval", 1]
    assert command("train", *first, "--checkpoint_path", tmp_path / "a").returncode == 0
    second = [*data, "--start_from", tmp_path / "a" / "model_id.pt", "--self_critical_after", 0, "--max_iters", 60]
    second += ["--save_checkpoint_every", 60, "--language_eval", 1, "--checkpoint_path", tmp_path / "b"]
    second += ["--drop_prob_lm", 0, "--drop_prob_words", 0, "--drop_prob_features", 0]
    done = command("train", *second)
    assert done.returncode == 0, done.stderr
    rewards = list(load_checkpoint(tmp_path / "b" / "model_id_last.pt").history.reward_history.values())
    assert len(rewards) == 60
    assert np.mean(rewards[-10:]) > np.mean(rewards[:10]) + 0.2


def test_pieces_and_sources_do_not_mix(data, command, tmp_path, tiny_dataset):
    """Two sources with frequencies of their own; batches in pieces sample as many captions as whole ones."""
    described = json.loads(tiny_dataset[1].read_text())
    for i, info in enumerate(described["images"]):
        info["source"] = "ab"[i % 2]
    (tmp_path / "data.json").write_text(json.dumps(described))
    argv = [*data, "--input_json", tmp_path / "data.json", "--self_critical_after", 0, "--max_iters", 3]
    done = command("train", *argv, "--accumulate", 2, "--checkpoint_path", tmp_path / "run")
    assert done.returncode == 0, done.stderr
    rewards_seen = load_checkpoint(tmp_path / "run" / "model_id_last.pt").history.reward_history
    assert len(rewards_seen) == 3 and all(0 <= value <= 10 for value in rewards_seen.values())


def test_one_sample_has_no_others_to_be_judged_by(data, command, tmp_path):
    done = command("train", *data, "--self_critical_after", 0, "--self_critical_samples", 1)
    assert done.returncode == 1 and "at least 2" in done.stderr


def test_the_gradient_is_that_of_the_log_probability_alone():
    """REINFORCE by hand on one softmax: Σ advantage · (onehot − p)."""
    logits = nn.Parameter(torch.tensor([0.1, 0.5, -0.3]))
    chosen, advantage = torch.tensor([0, 2, 1, 0]), torch.tensor([1.0, -2.0, 0.5, 0.25])
    reward = torch.tensor(3.5)
    loss = -(advantage * logits.log_softmax(0)[chosen]).sum()
    reported = loss + (-reward - loss).detach()
    reported.backward()
    assert reported.item() == pytest.approx(-3.5)
    p = logits.detach().softmax(0)
    expected = -sum(a * (nn.functional.one_hot(c, 3) - p) for a, c in zip(advantage, chosen, strict=True))
    torch.testing.assert_close(logits.grad, expected)
