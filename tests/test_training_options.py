"""What training has beyond the original: schedules, running average, weight decay, clipping by norm, early end."""

import json
import math

import numpy as np
import pytest
import torch
from test_decoder import loss_sum
from torch import nn

from captioner.model.attention_decoder import AttentionDecoder
from captioner.model.checkpoint import TrainingHistory, load_checkpoint
from captioner.model.decoder import Decoder
from captioner.training.optim import make_optimizer, reductions_on_plateau, schedule_factor, without_improvement
from captioner.training.trainer import ParameterGroup, Rule

SMALL = ["--cnn_layer", "pool5", "--rnn_size", 24, "--input_encoding_size", 16, "--gpuid", -1, "--batch_size", 4]
SMALL += ["--seq_per_img", 2, "--losses_log_every", 1, "--val_images_use", -1, "--learning_rate", 0.01]
SMALL += ["--precision", "fp32", "--num_workers", 0]


@pytest.fixture(scope="module")
def data(tiny_dataset, tiny_cnn):
    return ["--input_h5", tiny_dataset[0], "--input_json", tiny_dataset[1], "--cnn_model", tiny_cnn, *SMALL]


def language_model(path) -> dict[str, torch.Tensor]:
    state = load_checkpoint(path).state_dict
    return {name: tensor for name, tensor in state.items() if name.startswith(("decoder.", "encoder.embed."))}


def factor(iteration: int, **changed) -> float:
    values = {"schedule": "decay", "warmup": 0, "last": None, "decay_start": -1, "decay_every": 10, "reductions": 0}
    return schedule_factor(iteration, **{**values, **changed})


def test_schedules_have_the_values_they_are_known_by():
    assert [factor(k, schedule="cosine", last=8) for k in (0, 4, 8, 9)] == pytest.approx([1, 0.5, 0, 0])
    assert factor(2, schedule="cosine", last=8) == pytest.approx((1 + math.sqrt(0.5)) / 2)
    assert [factor(k, warmup=4) for k in range(6)] == [0.25, 0.5, 0.75, 1, 1, 1]
    assert factor(1, schedule="cosine", last=3, warmup=4) == pytest.approx(0.5 * 0.75)
    assert factor(25, decay_start=5, decay_every=10) == pytest.approx(0.25)
    assert factor(25, schedule="plateau", reductions=3) == 1 / 8


@pytest.mark.parametrize(
    ("losses", "in_vain", "reductions"),
    [
        ([3.0], 0, 0),
        ([3.0, 2.0, 2.5, 2.0], 2, 1),
        ([3.0, 3.1, 3.2, 3.3, 3.4], 4, 2),
        ([3.0, 3.1, 2.9, 3.0, 3.0], 2, 1),
    ],
)
def test_validations_in_vain_are_counted(losses, in_vain, reductions):
    history = TrainingHistory(val_loss_history={10 * k: loss for k, loss in enumerate(losses)})
    assert without_improvement(history) == in_vain
    assert reductions_on_plateau(history, 2) == reductions


def test_scores_come_before_the_loss():
    history = TrainingHistory(
        val_loss_history={0: 3.0, 1: 2.0, 2: 1.0},
        val_lang_stats_history={0: {"CIDEr": 0.1}, 1: {"CIDEr": 0.5}, 2: {"CIDEr": 0.4}},
    )
    assert without_improvement(history) == 1


def test_adamw_is_the_formula():
    """Loshchilov & Hutter 2019, algorithm 2, in numpy."""
    rng = np.random.default_rng(0)
    x = nn.Parameter(torch.from_numpy(rng.normal(size=5)))
    expected, m, v = x.detach().numpy().copy(), np.zeros(5), np.zeros(5)
    optimizer = make_optimizer("adamw", [x], lr=0.1, alpha=0.8, beta=0.99, eps=1e-6, weight_decay=0.3)
    for step in range(1, 5):
        gradient = rng.normal(size=5)
        x.grad = torch.from_numpy(gradient.copy())
        optimizer.step()
        m, v = 0.8 * m + 0.2 * gradient, 0.99 * v + 0.01 * gradient**2
        update = (m / (1 - 0.8**step)) / (np.sqrt(v / (1 - 0.99**step)) + 1e-6)
        expected -= 0.1 * update + 0.1 * 0.3 * expected
    np.testing.assert_allclose(x.detach().numpy(), expected, rtol=1e-9)


@pytest.mark.parametrize("decoder", [Decoder(9, 6, 8), AttentionDecoder(9, 6, 8, heads=2)], ids=["lstm", "attention"])
def test_smoothed_labels_are_the_formula(decoder):
    """Each target has 1 - s, and all words and END share s (Szegedy et al. 2016)."""
    torch.manual_seed(0)
    decoder.eval()
    encodings = torch.randn(3, 6) if isinstance(decoder, Decoder) else torch.randn(3, 4, 6)
    labels = torch.tensor([[1, 5, 0], [2, 0, 0], [9, 8, 7]])
    targets = [[1, 5, 10], [2, 10], [9, 8, 7, 10]]
    logprobs = decoder(encodings, labels)
    first = logprobs.shape[1] - 4  # the LSTM decoder has a step for the image
    expected = 0.0
    for caption, ids in enumerate(targets):
        for step, target in enumerate(ids):
            row = logprobs[caption, first + step]
            expected -= 0.8 * row[target - 1] + 0.2 * row.mean()
    total, num_targets = loss_sum(decoder, encodings, torch.arange(3), labels, label_smoothing=0.2)
    assert num_targets == 9
    assert total.item() == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize(("norm", "expected"), [(0.5, [0.3, 0.4]), (9.0, [3.0, 4.0]), (0.0, [0.1, 0.1])])
def test_gradients_are_scaled_to_a_norm_or_clamped(norm, expected):
    weight = nn.Parameter(torch.zeros(2))
    group = ParameterGroup([weight], Rule("sgd", 1.0, 0.0, 0.0, 0.0), clip=0.1, norm=norm)
    weight.grad = torch.tensor([3.0, 4.0])
    group.clip_gradients()
    torch.testing.assert_close(weight.grad, torch.tensor(expected), rtol=1e-5, atol=1e-6)


def test_the_average_is_that_of_the_weights_after_each_update(data, command, tmp_path):
    weights = []
    for iterations in range(4):
        argv = [*data, "--max_iters", iterations, "--checkpoint_path", tmp_path / str(iterations)]
        assert command("train", *argv).returncode == 0
        weights.append(language_model(tmp_path / str(iterations) / "model_id_last.pt"))
    argv = [*data, "--max_iters", 3, "--ema", 0.2, "--checkpoint_path", tmp_path / "averaged"]
    assert command("train", *argv).returncode == 0
    for name, averaged in language_model(tmp_path / "averaged" / "model_id_last.pt").items():
        expected = weights[0][name]
        for decay, after in zip((0.1, 2 / 11, 0.2), weights[1:], strict=True):  # less in the beginning
            expected = decay * expected + (1 - decay) * after[name]
        torch.testing.assert_close(averaged, expected, rtol=1e-5, atol=1e-6)


ALL = ["--optim", "adamw", "--weight_decay", 0.1, "--grad_norm", 1, "--ema", 0.9, "--lr_schedule", "cosine"]
ALL += [
    "--label_smoothing",
    0.1,
    "--decoder",
    "attention",
    "--warmup",
    3,
    "--max_iters",
    8,
    "--save_checkpoint_every",
    4,
    "--resume",
    "auto",
]


def test_a_crash_costs_nothing_with_all_of_them(data, command, tmp_path, crash_at_iteration):
    argv = [*data, *ALL, "--checkpoint_path"]
    assert command("train", *argv, tmp_path / "whole").returncode == 0
    with crash_at_iteration(6):
        command("train", *argv, tmp_path / "broken")
    done = command("train", *argv, tmp_path / "broken")
    assert "resumed at iteration 4" in done.stderr and done.returncode == 0
    for name in ("model_id.pt", "model_id_last.pt", "model_id_resume.pt"):
        one, other = (load_checkpoint(tmp_path / folder / name) for folder in ("whole", "broken"))
        assert all(torch.equal(tensor, other.state_dict[key]) for key, tensor in one.state_dict.items()), name
        assert one.history.loss_history == other.history.loss_history


def test_a_run_that_gets_no_better_ends(data, command, tmp_path):
    argv = [*data, "--optim", "sgd", "--learning_rate", 1e-30, "--patience", 2, "--save_checkpoint_every", 1]
    for attempt in ("fresh", "again"):
        done = command("train", *argv, "--max_iters", 50, "--resume", "auto", "--checkpoint_path", tmp_path)
        assert done.returncode == 0, (attempt, done.stderr)
        assert "done: 2 iterations" in done.stderr
    report = json.loads((tmp_path / "model_id.json").read_text())
    assert list(report["val_loss_history"]) == ["0", "1", "2"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--lr_schedule", "cosine"], "--lr_schedule cosine needs an end"),
        (["--lr_schedule", "plateau"], "--lr_schedule plateau needs --patience"),
        (["--weight_decay", 0.1], "--weight_decay belongs to --optim adamw"),
    ],
)
def test_what_does_not_fit_together_is_one_line(options, message, data, command, tmp_path):
    done = command("train", *data, *options, "--checkpoint_path", tmp_path)
    assert done.returncode == 1 and message in done.stderr.splitlines()[-1]
    assert not list(tmp_path.iterdir())
