"""The language model against the original's numbers, finite differences and plain loops."""

import copy
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from captioner.kernels import can_pack, dropout, output_loss
from captioner.model.decoder import Decoder
from captioner.model.packed_captions import caption_targets

MODELS = ("model_1layer", "model_2layer", "train_run")


def make_decoder(vocab_size: int = 5, encoding: int = 4, rnn: int = 8, layers: int = 1, seed: int = 0) -> Decoder:
    torch.manual_seed(seed)
    return Decoder(vocab_size, encoding, rnn, layers, 0.5).double().eval()


def loss_sum(decoder, encodings, image_of_caption, labels, label_smoothing=0.0) -> tuple[Tensor, int]:
    """As `CaptionModel.loss_sum`, of a decoder alone."""
    output = decoder.output_of(encodings, image_of_caption, labels)
    return output_loss(*output, label_smoothing), len(output[-1])


def some_labels(num: int = 6, length: int = 7, vocab_size: int = 5) -> Tensor:
    """Full captions, but row 0 has 3 words, row 3 has 4 and row 4 none."""
    labels = torch.randint(1, vocab_size + 1, (num, length), generator=torch.Generator().manual_seed(1))
    labels[0, 3:] = labels[3, 4:] = labels[4] = 0
    return labels


def mean_loss(decoder: Decoder, features: Tensor, labels: Tensor) -> Tensor:
    """Of captions with an image each."""
    total, count = loss_sum(decoder, features, torch.arange(len(labels)), labels)
    return total / count


def load_original(reference: Path, model: str) -> tuple[Decoder, dict[str, Tensor]]:
    """The decoder with the original's weights, and all arrays of its .npz."""
    with np.load(reference / f"{model}.npz") as arrays:
        t = {key: torch.from_numpy(arrays[key]) for key in arrays.files}
    words, encoding = t["lm.lookup_table.weight"].shape
    layers = sum(key.startswith("lm.i2h") and key.endswith("bias") for key in t)
    decoder = Decoder(words - 1, encoding, t["lm.decoder.weight"].shape[1], layers)
    state = {
        "embedding.weight": "lookup_table.weight",
        "output.weight": "decoder.weight",
        "output.bias": "decoder.bias",
    }
    decoder.load_state_dict(
        {ours: t[f"lm.{theirs}"] for ours, theirs in state.items()}
        | {ours: gates(t[f"lm.{theirs}"]) for ours, theirs in lstm_names(layers)}
    )
    return decoder.eval(), t


def lstm_names(layers: int) -> list[tuple[str, str]]:
    return [
        (f"lstm.{kind}_{ours}_l{layer}", f"{theirs}_{layer + 1}.{kind}")
        for layer in range(layers)
        for ours, theirs in (("ih", "i2h"), ("hh", "h2h"))
        for kind in ("weight", "bias")
    ]


def gates(rows: Tensor) -> Tensor:
    """The original's order input, forget, output, candidate -> PyTorch's."""
    i, f, o, g = rows.chunk(4)
    return torch.cat([i, f, g, o])


@pytest.fixture(params=MODELS)
def original(request, reference):
    decoder, arrays = load_original(reference, request.param)
    cases = json.loads((reference / f"{request.param}.json").read_text())["lm_cases"]
    return decoder, arrays, cases


def test_logprobs_have_the_documented_shape_and_are_probabilities():
    decoder, labels = make_decoder(layers=2), some_labels()
    logprobs = decoder(torch.randn(6, 4).double(), labels)
    assert logprobs.shape == (6, 9, 6)
    assert logprobs.max() < 0
    torch.testing.assert_close(logprobs.exp().sum(2), torch.ones(6, 9).double())


def test_gradient_reaches_exactly_the_steps_that_have_a_target():
    decoder, labels = make_decoder(), some_labels()
    logprobs = decoder(torch.randn(6, 4).double(), labels).detach().requires_grad_()
    targets = F.pad(caption_targets(labels, decoder.end_id), (1, 0))
    F.nll_loss(logprobs.flatten(0, 1), targets.flatten() - 1, ignore_index=-1).backward()
    assert logprobs.grad is not None
    reached = logprobs.grad.abs().amax(2) > 0
    expected = torch.ones(6, 9, dtype=torch.bool)
    expected[:, 0] = False  # the image step predicts nothing
    expected[0, 5:] = expected[3, 6:] = expected[4, 2:] = False  # START, the words, then nothing after END
    assert torch.equal(reached, expected)


def test_targets_are_the_words_and_one_end_per_caption():
    labels = torch.tensor([[3, 1, 0, 0], [2, 2, 1, 4], [0, 0, 0, 0], [1, 0, 2, 0]])
    expected = [[3, 1, 6, 0, 0], [2, 2, 1, 4, 6], [6, 0, 0, 0, 0], [1, 6, 2, 0, 0]]
    assert caption_targets(labels, 6).tolist() == expected


@pytest.mark.parametrize("layers", [1, 2])
def test_gradients_agree_with_finite_differences(layers):
    decoder, labels = make_decoder(layers=layers), some_labels()
    features = torch.randn(6, 4).double().requires_grad_()
    assert torch.autograd.gradcheck(lambda x, *_: mean_loss(decoder, x, labels), (features, *decoder.parameters()))
    assert torch.autograd.gradcheck(lambda x: decoder(x, labels), (features,))


@pytest.mark.parametrize("layers", [1, 2])
def test_loss_is_the_mean_over_the_targets_of_the_full_forward_pass(layers):
    decoder, labels = make_decoder(layers=layers), some_labels()
    labels[5] = torch.tensor([1, 0, 2, 0, 0, 3, 0])  # words after a 0 count, the 0 itself does not
    features = torch.randn(6, 4).double()
    logprobs = decoder(features, labels)
    terms = []
    for n, caption in enumerate(labels.tolist()):
        ended = False
        for t, word in enumerate([*caption, 0], start=1):
            if word or not ended:
                terms.append(-logprobs[n, t, (word or decoder.end_id) - 1])
            ended |= word == 0
    total, count = loss_sum(decoder, features, torch.arange(6), labels)
    assert count == len(terms)
    torch.testing.assert_close(total, torch.stack(terms).sum())
    torch.testing.assert_close(mean_loss(decoder, features, labels), torch.stack(terms).mean())


def test_loss_ignores_the_order_of_captions_and_how_far_they_are_padded():
    decoder, labels = make_decoder(), some_labels()
    features = torch.randn(6, 4).double()
    whole = mean_loss(decoder, features, labels)
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    torch.testing.assert_close(mean_loss(decoder, features[order], F.pad(labels, (0, 9))[order]), whole)


@pytest.mark.parametrize("layers", [1, 2])
def test_padding_costs_no_work(layers):
    """All matrix products together take what one row per fed token and one per target cost."""
    decoder, labels = make_decoder(vocab_size=50, layers=layers), some_labels()
    features = torch.randn(6, 4).double()
    with FlopCounterMode(display=False) as counter:
        total, targets = loss_sum(decoder, features.requires_grad_(), torch.arange(6), F.pad(labels, (0, 9)))
    assert targets == 8 * 3 + 4 + 5 + 1
    # 32 gates; 4 numbers come in from below and 8 from the step before, which the image step does not have.
    first, further = (targets + 6) * 4 + targets * 8, (targets + 6) * 8 + targets * 8
    forward = 2 * 32 * (first + further * (layers - 1)) + targets * 2 * 8 * 51
    assert counter.get_total_flops() == forward
    with FlopCounterMode(display=False) as counter:
        total.backward()
    assert counter.get_total_flops() == 2 * forward


def test_loss_under_autocast_and_without_gradients_is_the_same_loss():
    torch.manual_seed(0)
    decoder, labels = make_decoder(vocab_size=300, encoding=16, rnn=32).float(), some_labels(num=70)
    features = torch.randn(70, 16)
    exact = mean_loss(decoder, features, labels)
    exact.backward()
    expected = [parameter.grad.clone() for parameter in decoder.parameters()]
    with torch.no_grad():
        assert mean_loss(decoder, features, labels) == exact
    decoder.zero_grad()
    with torch.autocast("cpu", torch.bfloat16):
        rounded = mean_loss(decoder, features, labels)
    rounded.backward()
    assert rounded.dtype == torch.float32
    assert rounded.item() == pytest.approx(exact.item(), rel=1e-3)
    for parameter, gradient in zip(decoder.parameters(), expected, strict=True):
        assert parameter.grad.dtype == torch.float32
        assert (parameter.grad - gradient).norm() < 0.03 * gradient.norm()


def test_first_loss_is_that_of_guessing_and_a_tiny_set_is_learnt_by_heart():
    decoder, labels = make_decoder(encoding=7, rnn=24), some_labels()
    features = torch.randn(6, 7, generator=torch.Generator().manual_seed(1)).double()
    optimizer = torch.optim.Adagrad(decoder.parameters(), lr=0.1, eps=1e-8)
    losses = []
    for _ in range(40):
        optimizer.zero_grad()
        loss = mean_loss(decoder, features, labels)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert abs(losses[0] - math.log(6)) < 0.15
    assert losses[-1] < 0.2


def test_initial_weights_fill_torch7s_ranges():
    torch.manual_seed(0)
    decoder = Decoder(300, 100, 64, 2)
    bounds = {"weight_ih_l0": 0.1, "bias_ih_l0": 0.1, "weight_ih_l1": 0.125, "weight_hh_l0": 0.125, "bias_hh_l1": 0.125}
    for name, bound in bounds.items():
        assert 0.95 * bound < getattr(decoder.lstm, name).abs().max() <= bound
    for parameter in decoder.output.parameters():
        assert 0.95 / 8 < parameter.abs().max() <= 1 / 8
    assert abs(decoder.embedding.weight.std().item() - 1) < 0.02


def test_dropout_acts_in_training_mode_only_and_without_bias():
    torch.manual_seed(0)
    decoder, labels = make_decoder(layers=2), some_labels()
    features = torch.randn(6, 4).double()
    assert mean_loss(decoder, features, labels) == mean_loss(decoder, features, labels)
    decoder.train()
    assert mean_loss(decoder, features, labels) != mean_loss(decoder, features, labels)
    hidden = torch.ones(400, 500)
    dropped = dropout(hidden, 0.5, training=True)
    assert set(dropped.unique().tolist()) == {0.0, 2.0}
    assert abs(dropped.mean().item() - 1) < 0.02


@pytest.mark.parametrize("layers", [1, 2])
def test_stepping_gives_what_the_forward_pass_gives(layers):
    decoder, labels = make_decoder(layers=layers), some_labels()
    features = torch.randn(6, 4).double()
    logprobs = decoder(features, labels)
    state, tokens = decoder.start(features), torch.full((6,), decoder.end_id)
    for t in range(8):
        step, state = decoder.step(tokens, state)
        torch.testing.assert_close(step, logprobs[:, t + 1])
        tokens = labels[:, min(t, 6)].clamp(min=1)


@pytest.mark.skipif(not can_pack(torch.device("cpu")), reason="this CPU has no bfloat16 instructions")
@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("rows", [1, 16, 48])
@torch.inference_mode()
def test_packed_weights_give_the_same_steps(layers, rows):
    decoder = make_decoder(300, 32, 64, layers).to(torch.bfloat16)
    packed = copy.deepcopy(decoder)
    packed.pack()
    features, tokens = torch.randn(rows, 32), torch.randint(1, 302, (rows,))
    wanted, found = decoder.start(features), packed.start(features)
    for _ in range(3):
        (wanted_logprobs, wanted), (logprobs, found) = decoder.step(tokens, wanted), packed.step(tokens, found)
        assert logprobs.dtype == torch.float32
        torch.testing.assert_close(logprobs, wanted_logprobs, atol=0.03, rtol=0.01)


def test_half_precision_weights_give_float32_logprobs():
    decoder = make_decoder().bfloat16()
    logprobs, _ = decoder.step(torch.tensor([6, 1]), decoder.start(torch.randn(2, 4)))
    assert logprobs.dtype == torch.float32
    torch.testing.assert_close(logprobs.exp().sum(1), torch.ones(2))


def test_logprobs_losses_and_gradients_are_the_originals(original):
    decoder, arrays, cases = original
    layers = decoder.lstm.num_layers
    names = {"embedding.weight": "lookup_table.weight", "output.weight": "decoder.weight"}
    names |= {"output.bias": "decoder.bias"} | dict(lstm_names(layers))
    for case, facts in cases.items():
        labels = arrays[f"{case}.labels"].t()
        features = arrays[f"{case}.features"].requires_grad_()
        image_of_caption = torch.arange(len(features)).repeat_interleave(facts["seq_per_img"])

        logprobs = arrays[f"{case}.logprobs"].transpose(0, 1)
        computed = ~logprobs.isnan()
        assert (decoder(features[image_of_caption], labels) - logprobs)[computed].abs().max() < 1e-4

        decoder.zero_grad()
        total, count = loss_sum(decoder, features, image_of_caption, labels)
        (total / count).backward()
        assert count == facts["n_targets"]
        assert abs(total.item() / count - facts["loss"]) < 1e-5
        assert_close_in_norm(features.grad, arrays[f"{case}.dfeatures"])
        for name, parameter in decoder.named_parameters():
            expected = arrays[f"{case}.grad.{names[name]}"]
            assert_close_in_norm(parameter.grad, gates(expected) if name.startswith("lstm") else expected)


def assert_close_in_norm(ours: Tensor | None, expected: Tensor) -> None:
    assert ours is not None
    assert (ours - expected).norm() <= 1e-4 * expected.norm()
