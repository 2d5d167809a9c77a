"""Next-word accuracy against a count by hand, and through a model."""

import pytest
import torch

from captioner.model.accuracy import hits
from captioner.model.attention_decoder import AttentionDecoder
from captioner.model.caption_model import CaptionModel
from captioner.model.config import ModelConfig
from captioner.model.decoder import Decoder


def test_it_is_what_topk_says() -> None:
    torch.manual_seed(0)
    hidden, weight, bias = torch.randn(600, 8), torch.randn(30, 8), torch.randn(30)
    columns = torch.randint(30, (600,))
    best = (hidden @ weight.T + bias).topk(5).indices
    wanted = [int((best[:, 0] == columns).sum()), int((best == columns[:, None]).any(1).sum())]
    assert hits(hidden, weight, bias, columns).tolist() == wanted
    assert 0 < wanted[0] < wanted[1] < 600


def test_of_equal_words_the_first_is_the_likeliest() -> None:
    columns = torch.arange(10)
    assert hits(torch.ones(10, 2), torch.ones(10, 2), torch.zeros(10), columns).tolist() == [1, 5]


@pytest.mark.parametrize("decoder", ["lstm", "attention"])
def test_a_model_counts_words_and_ends(decoder: str) -> None:
    torch.manual_seed(1)
    config = ModelConfig(
        vocab_size=9, encoding_size=8, rnn_size=8, cnn_layer="pool5", conv_widths=(2,) * 13, fc_width=1,
        decoder=decoder, attention_heads=2,
    )  # fmt: skip
    model = CaptionModel(config).eval()
    assert isinstance(model.decoder, Decoder | AttentionDecoder)
    encodings = torch.randn(2, 8) if decoder == "lstm" else torch.randn(2, 49, 8)
    labels = torch.tensor([[1, 2, 3, 0], [4, 0, 0, 0], [5, 6, 7, 8]])
    images = torch.tensor([0, 0, 1])
    loss, count, found = model.loss_and_hits(encodings, images, labels)
    logprobs = model.decoder(encodings, labels, images)[:, -5:]  # without the LSTM's image step
    answers = torch.tensor([[1, 2, 3, 10, 0], [4, 10, 0, 0, 0], [5, 6, 7, 8, 10]]) - 1
    told = answers >= 0
    assert count == 11
    assert loss.item() == pytest.approx(
        -(logprobs.gather(2, answers.clamp(0)[..., None])[..., 0][told].sum().item()), rel=1e-4
    )
    best = logprobs.topk(5).indices
    hit = best == answers[..., None]
    assert found.tolist() == [int((hit[..., 0] & told).sum()), int((hit.any(2) & told).sum())]
