"""Captions in another order: by consensus against plain loops, by several models against the likelihood of each."""

import math
from collections import Counter

import pytest
import torch
from test_attention_decoder import make_decoder as make_attention_decoder
from test_decoder import make_decoder

import captioner
from captioner.errors import InputError
from captioner.inference.rerank import expected_cider, reranked
from captioner.search import Hypothesis, SearchOptions

END = 8


def hypothesis(tokens: tuple[int, ...], logprob: float, finished: bool = True) -> Hypothesis:
    return Hypothesis(tokens, (logprob / (len(tokens) + finished),) * (len(tokens) + finished), logprob, finished)


HYPOTHESES = [
    hypothesis((1, 2, 3, 4), -1.0),
    hypothesis((5, 6, 7), -1.1),
    hypothesis((5, 6, 7, 4), -1.2),
    hypothesis((5, 6, 7, 4, 4, 2), -1.3, finished=False),
]


def cider(caption: list[int], reference: list[int]) -> float:
    """CIDEr-D of one reference (Vedantam et al. 2015), all n-grams alike."""
    total = 0.0
    for order in range(1, 5):
        mine, theirs = (
            Counter(tuple(words[i : i + order]) for i in range(len(words) - order + 1))
            for words in (caption, reference)
        )
        norms = [math.sqrt(sum(count**2 for count in grams.values())) for grams in (mine, theirs)]
        if all(norms):
            total += sum(min(mine[gram], count) * count for gram, count in theirs.items()) / math.prod(norms)
    return 10 * total / 4 * math.exp(-((len(caption) - len(reference)) ** 2) / 72)


@pytest.mark.parametrize("sample", [False, True])
def test_consensus_is_the_caption_that_the_others_agree_with(sample):
    words = [[*h.tokens, END] if h.finished else list(h.tokens) for h in HYPOTHESES]
    weights = [1.0 if sample else math.exp(h.logprob) for h in HYPOTHESES]
    expected = [
        sum(weight * cider(caption, reference) for weight, reference in zip(weights, words, strict=True)) / sum(weights)
        for caption in words
    ]
    assert expected_cider(HYPOTHESES, END - 1, sample) == pytest.approx(expected, rel=1e-6)
    found = reranked(HYPOTHESES, SearchOptions(rerank="consensus", kept=2, sample=sample), END - 1, [], [])
    order = sorted(range(4), key=lambda i: -expected[i])
    assert found == [HYPOTHESES[i] for i in order[:2]] and found[0] is not HYPOTHESES[0]


@torch.no_grad()
@pytest.mark.parametrize("length_penalty", [0.0, 1.0])
def test_models_order_by_the_mean_of_their_log_p(length_penalty):
    decoders = [make_decoder(vocab_size=7, seed=1), make_attention_decoder(vocab_size=7, seed=2)]
    encodings = [torch.randn(1, 4).double(), torch.randn(1, 5, 4).double()]
    expected = []
    for found in HYPOTHESES:
        total = 0.0
        for decoder, encoding in zip(decoders, encodings, strict=True):
            state, token = decoder.start(encoding), END
            for word in [*found.tokens, END][: len(found.word_logprobs)]:
                logprobs, state = decoder.step(torch.tensor([token]), state)
                total += float(logprobs[0, word - 1])
                token = word
        expected.append(total / 2 / len(found.word_logprobs) ** length_penalty)
    options = SearchOptions(rerank="models", kept=4, length_penalty=length_penalty)
    order = sorted(range(4), key=lambda i: -expected[i])
    assert reranked(HYPOTHESES, options, 7, decoders, encodings) == [HYPOTHESES[i] for i in order]


def test_from_python_and_the_command(tiny_model, command, tmp_path):
    pictures = [f"examples/{name}.jpg" for name in ("cat", "coffee", "rocket")]
    model = captioner.load_model([tiny_model, tiny_model], "cpu", "fp32")
    every = model.caption(pictures, beam_size=6, n_best=6)
    for rerank in ("consensus", "models"):
        found = model.caption(pictures, beam_size=6, n_best=2, rerank=rerank, batch_size=3)
        alone = [model.caption(picture, beam_size=6, n_best=2, rerank=rerank) for picture in pictures]
        for one, single, all_six in zip(found, alone, every, strict=True):
            texts = {caption.text for caption in (all_six, *all_six.alternatives)}
            assert {one.text, one.alternatives[0].text} <= texts and len(one.alternatives) == 1
            assert (one.text, one.alternatives[0].text) == (single.text, single.alternatives[0].text)
            if rerank == "models":  # they are the same model twice
                assert one.text == all_six.text and one.logprob == pytest.approx(all_six.logprob)
    assert model.search_options(rerank="consensus").n_best == 10  # more than the usual beams, to choose from
    samples = model.caption(pictures, sample=True, n_best=5, rerank="consensus")
    assert all(len(caption.alternatives) == 4 for caption in samples)
    with pytest.raises(InputError, match="several models"):
        captioner.load_model(tiny_model, "cpu", "fp32").caption(pictures, rerank="models")
    with pytest.raises(InputError, match="more than one caption"):
        model.caption(pictures, rerank="consensus", sample=True)
    arguments = [*pictures, "--model", tiny_model, "--gpuid", -1, "--precision", "fp32", "--vis_dir", ""]
    done = command("eval", *arguments, "--rerank", "consensus")
    assert done.returncode == 0 and len(done.stdout.splitlines()) == 3, done.stderr
    done = command("eval", *arguments, "--rerank", "models")
    assert done.returncode == 1 and "several models" in done.stderr
