"""The attending language model against plain loops, finite differences, and its own parts alone."""

import math

import pytest
import torch
from test_decoder import loss_sum, some_labels
from torch import Tensor
from torch.nn import functional as F

from captioner.model import attention_decoder
from captioner.model.attention_decoder import AttentionDecoder

IMAGES, CELLS, WIDTH = 4, 6, 4
IMAGE_OF_CAPTION = torch.tensor([2, 0, 2, 1, 0, 2])  # image 3 has no caption; rows of an image stand apart


def make_decoder(vocab_size: int = 5, rnn: int = 8, heads: int = 2, seed: int = 0) -> AttentionDecoder:
    torch.manual_seed(seed)
    decoder = AttentionDecoder(vocab_size, WIDTH, rnn, heads, 0.5, 0.3).double().eval()
    with torch.no_grad():
        for parameter in decoder.parameters():  # biases, too, that matter
            parameter += 0.3 * torch.randn_like(parameter)
    return decoder


def some_grids(images: int = IMAGES, seed: int = 1) -> Tensor:
    return torch.randn(images, CELLS, WIDTH, generator=torch.Generator().manual_seed(seed)).double()


def by_hand(decoder: AttentionDecoder, grid: Tensor, tokens: list[int]) -> tuple[Tensor, Tensor]:
    """Log-probabilities (T, V+1) and weights (T, heads, G) along one caption, cell by cell and head by head."""

    def lstm(module: torch.nn.LSTM, x: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
        gates = module.weight_ih_l0 @ x + module.bias_ih_l0 + module.weight_hh_l0 @ h + module.bias_hh_l0
        i, f, g, o = gates.chunk(4)
        c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
        return torch.sigmoid(o) * torch.tanh(c), c

    d = decoder.query.out_features // decoder.heads
    h1 = c1 = h2 = c2 = grid.new_zeros(decoder.lstm1.hidden_size)
    logprobs, looked = [], []
    for token in tokens:
        word = decoder.embedding.weight[token - 1] * math.sqrt(WIDTH)
        h1, c1 = lstm(decoder.lstm1, torch.cat([word, sum(grid) / len(grid)]), h1, c1)
        query, parts, weights = decoder.query.weight @ h1, [], []
        for head in range(decoder.heads):
            own = slice(head * d, (head + 1) * d)
            scores = [float(query[own] @ (decoder.key.weight @ cell)[own]) / math.sqrt(d) for cell in grid]
            shares = [math.exp(score) / sum(map(math.exp, scores)) for score in scores]
            values = [(decoder.value.weight @ cell + decoder.value.bias)[own] for cell in grid]
            parts.append(sum(share * value for share, value in zip(shares, values, strict=True)))
            weights.append(shares)
        h2, c2 = lstm(decoder.lstm2, torch.cat([*parts, h1]), h2, c2)
        logits = decoder.embedding.weight @ (decoder.head.weight @ h2 + decoder.head.bias) + decoder.output_bias
        logprobs.append(logits - logits.exp().sum().log())
        looked.append(weights)
    return torch.stack(logprobs), torch.tensor(looked).double()


@torch.no_grad()
def test_every_number_is_that_of_plain_loops():
    decoder, labels, grids = make_decoder(), some_labels(), some_grids()
    logprobs = decoder(grids, labels, IMAGE_OF_CAPTION)
    attention = decoder.attention(grids, labels, IMAGE_OF_CAPTION)
    assert logprobs.shape == (6, 8, 6) and attention.shape == (6, 8, CELLS)
    for caption, ids in enumerate(labels.tolist()):
        tokens = [decoder.end_id, *(word or 1 for word in ids)]
        expected, looked = by_hand(decoder, grids[IMAGE_OF_CAPTION[caption]], tokens)
        torch.testing.assert_close(logprobs[caption], expected)
        torch.testing.assert_close(attention[caption], looked.mean(1))
    assert attention.std() > 0.01  # it looks somewhere
    first = decoder(grids, labels[:4])
    torch.testing.assert_close(first, decoder(grids, labels[:4], torch.arange(4)))
    torch.testing.assert_close(decoder.attention(grids, labels[:4]).sum(2), torch.ones(4, 8).double())


def test_gradients_agree_with_finite_differences():
    decoder, labels = make_decoder(vocab_size=3, rnn=4), some_labels(vocab_size=3)
    grids = some_grids().requires_grad_()

    def loss(encodings: Tensor, *_: Tensor) -> Tensor:
        total, num_targets = loss_sum(decoder, encodings, IMAGE_OF_CAPTION, labels)
        return total / num_targets

    assert torch.autograd.gradcheck(loss, (grids, *decoder.parameters()))
    loss(grids).backward()
    assert grids.grad is not None
    assert (grids.grad.abs().amax((1, 2)) > 0).tolist() == [True, True, True, False]


def test_loss_is_the_mean_over_the_targets_of_the_full_forward_pass():
    decoder, labels, grids = make_decoder(), some_labels(), some_grids()
    labels[5] = torch.tensor([1, 0, 2, 0, 0, 3, 0])  # words after a 0 count, the 0 itself does not
    logprobs = decoder(grids, labels, IMAGE_OF_CAPTION)
    terms = []
    for n, caption in enumerate(labels.tolist()):
        ended = False
        for t, word in enumerate([*caption, 0]):
            if word or not ended:
                terms.append(-logprobs[n, t, (word or decoder.end_id) - 1])
            ended |= word == 0
    total, count = loss_sum(decoder, grids, IMAGE_OF_CAPTION, labels)
    assert count == len(terms)
    torch.testing.assert_close(total, torch.stack(terms).sum())
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    shuffled = loss_sum(decoder, grids, IMAGE_OF_CAPTION[order], F.pad(labels, (0, 9))[order])
    torch.testing.assert_close(shuffled[0], total)


def test_loss_under_autocast_is_the_same_loss():
    torch.manual_seed(0)
    decoder, labels = make_decoder(vocab_size=300, rnn=32).float(), some_labels(num=70, vocab_size=300)
    grids, image = some_grids(20).float(), torch.arange(70) % 20
    exact, count = loss_sum(decoder, grids, image, labels)
    (exact / count).backward()
    expected = [parameter.grad.clone() for parameter in decoder.parameters()]
    decoder.zero_grad()
    with torch.autocast("cpu", torch.bfloat16):
        rounded, _ = loss_sum(decoder, grids, image, labels)
    (rounded / count).backward()
    assert rounded.dtype == torch.float32
    assert rounded.item() == pytest.approx(exact.item(), rel=1e-3)
    for parameter, gradient in zip(decoder.parameters(), expected, strict=True):
        assert (parameter.grad - gradient).norm() < 0.05 * gradient.norm()


@torch.no_grad()
def test_dropout_acts_in_training_mode_only():
    decoder, labels, grids = make_decoder(), some_labels(), some_grids()

    def different_losses() -> int:
        return len({float(loss_sum(decoder, grids, IMAGE_OF_CAPTION, labels)[0]) for _ in range(2)})

    assert different_losses() == 1
    decoder.train()
    for words, output, expected in ((0.3, 0.0, 2), (0.0, 0.3, 2), (0.0, 0.0, 1)):
        decoder.drop_prob_words, decoder.drop_prob = words, output
        assert different_losses() == expected


def test_a_new_model_guesses_and_a_tiny_set_is_learnt_by_heart():
    torch.manual_seed(0)
    decoder, labels, grids = AttentionDecoder(5, WIDTH, 24, 2, 0.0, 0.0).double(), some_labels(), some_grids(6)
    optimizer = torch.optim.Adam(decoder.parameters(), lr=0.02)
    losses = []
    for _ in range(60):
        optimizer.zero_grad()
        total, count = loss_sum(decoder, grids, torch.arange(6), labels)
        (total / count).backward()
        optimizer.step()
        losses.append(total.item() / count)
    assert abs(losses[0] - math.log(6)) < 0.3
    assert losses[-1] < 0.2


@torch.no_grad()
def test_stepping_gives_what_the_forward_pass_gives():
    decoder, labels, grids = make_decoder(), some_labels()[:4], some_grids()
    logprobs = decoder(grids, labels)
    state, tokens = decoder.start(grids), torch.full((4,), decoder.end_id)
    for t in range(7):
        step, state = decoder.step(tokens, state)
        torch.testing.assert_close(step, logprobs[:, t])
        tokens = labels[:, t].clamp(min=1)


@pytest.mark.parametrize("image", [[0, 0, 1, 1, 2, 2, 3, 3], [0, 1, 1, 1, 3], [2], [0, 1, 2, 3]])
@torch.no_grad()
def test_rows_of_an_image_share_its_grid(image):
    """Whatever rows go on, each is what it would be alone; keys and values are there once per image that has rows."""
    decoder, grids = make_decoder(), some_grids()
    words = torch.arange(len(image)) % 5 + 1
    _, state = decoder.step(torch.full((4,), decoder.end_id), decoder.start(grids))
    state = state.select(torch.tensor(image))
    assert len(state.keys) == len(state.values) == len(set(image))
    first, state = decoder.step(words, state)
    rows = torch.arange(len(image) - 1, len(image))  # of the last image one row stays
    second, _ = decoder.step(words[rows], state.select(rows))
    for row, (own, word) in enumerate(zip(image, words.tolist(), strict=True)):
        expected, _ = by_hand(decoder, grids[own], [decoder.end_id, word, word])
        torch.testing.assert_close(first[row], expected[1])
    torch.testing.assert_close(second[0], expected[2])


@pytest.mark.parametrize(("image", "per_image"), [([0, 0, 1, 1, 2, 2, 3, 3], 2), ([1, 1, 3, 3], 2), ([0, 2], 1)])
@torch.no_grad()
def test_rows_of_which_all_images_have_as_many_need_not_be_counted(image, per_image):
    decoder, grids = make_decoder(), some_grids()
    _, state = decoder.step(torch.full((4,), decoder.end_id), decoder.start(grids))
    for rows in (torch.tensor(image), torch.arange(len(image)).flip(0).view(-1, per_image).flip(0).flatten()):
        counted, told = state.select(rows), state.select(rows, per_image)
        assert told.rows.width == counted.rows.width and told.rows.place is None is counted.rows.place
        for name in ("keys", "values", "from_mean", "h1", "c1", "h2", "c2"):
            assert torch.equal(getattr(told, name), getattr(counted, name)), name
        assert torch.equal(told.rows.image, counted.rows.image)
        state = told
    assert state.select(torch.arange(len(image)), per_image).rows is state.rows  # nobody left


@torch.no_grad()
def test_half_precision_weights_give_float32_logprobs():
    decoder, grids = make_decoder(), some_grids(2).float()
    exact, _ = decoder.step(torch.tensor([6, 6]), decoder.start(grids))
    decoder = decoder.bfloat16()
    logprobs, state = decoder.step(torch.tensor([6, 6]), decoder.start(grids))
    assert logprobs.dtype == state.c1.dtype == state.c2.dtype == torch.float32
    assert state.keys.dtype == torch.bfloat16
    torch.testing.assert_close(logprobs.exp().sum(1), torch.ones(2))
    torch.testing.assert_close(logprobs, exact.float(), atol=0.05, rtol=0)


@torch.no_grad()
def test_packed_weights_give_the_same_steps(monkeypatch):
    """The layout for bfloat16 needs another CPU; which weights are packed as what can be seen on any."""

    class Linear(torch.nn.Linear):
        def __init__(self, weight: Tensor, bias: Tensor) -> None:
            super().__init__(weight.shape[1], weight.shape[0], dtype=weight.dtype)
            assert weight.is_contiguous()
            self.weight.copy_(weight)
            self.bias.copy_(bias)

    monkeypatch.setattr(attention_decoder, "PackedLinear", Linear)
    decoder, packed, grids = make_decoder(), make_decoder(), some_grids()
    packed.pack()
    for parameter in packed.parameters():
        if parameter is not packed.embedding.weight:
            parameter.zero_()  # only the packed weights count; words are still looked up
    packed.key.weight.copy_(decoder.key.weight)  # a grid is read once, with the weights as they are
    packed.value.load_state_dict(decoder.value.state_dict())
    wanted, found = decoder.start(grids), packed.start(grids)
    for tokens in (torch.full((4,), 6), torch.tensor([1, 2, 3, 4])):
        (logprobs, wanted), (same, found) = decoder.step(tokens, wanted), packed.step(tokens, found)
        torch.testing.assert_close(same, logprobs)
