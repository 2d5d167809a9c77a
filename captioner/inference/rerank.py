"""The n best captions of an image in another order than the search's (and so another best one).

Letters: M captions of an image, D words of the longest.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from captioner.metrics.reward import DocumentFrequencies, rewards
from captioner.model.attention_decoder import AttentionDecoder
from captioner.model.decoder import Decoder
from captioner.model.target_logprobs import target_logprobs
from captioner.search.options import Hypothesis, SearchOptions

# CIDEr without a corpus: every n-gram is in one document of three, and so weighs as much as any other.
_ALIKE = 3


def reranked(
    hypotheses: Sequence[Hypothesis],
    options: SearchOptions,
    vocab_size: int,
    decoders: Sequence[Decoder | AttentionDecoder],
    encodings: Sequence[Tensor],
) -> list[Hypothesis]:
    """The captions of one image in the order that `options.rerank` wants, the `options.kept` best of them.

    Args:
        decoders, encodings: of every model; (1, E) or (1, G, E).
    """
    if options.rerank == "consensus":
        scores = expected_cider(hypotheses, vocab_size, equally_likely=options.sample)
    else:
        scores = mean_logprobs(hypotheses, options.length_penalty, decoders, encodings)
    order = sorted(range(len(hypotheses)), key=lambda i: -scores[i])  # what is equal stays in the search's order
    return [hypotheses[i] for i in order[: options.kept]]


def expected_cider(hypotheses: Sequence[Hypothesis], vocab_size: int, equally_likely: bool) -> list[float]:
    """Minus the Bayes risk of each caption: its mean CIDEr-D with each of them as the reference, by their probability
    (Kumar & Byrne 2004). All n-grams weigh alike, for there is no corpus to count them in.

    Args:
        equally_likely: they were drawn at random, and so are there as often as they are likely.
    """
    end = vocab_size + 1
    captions = [[*found.tokens, end] if found.finished else list(found.tokens) for found in hypotheses]
    alike = DocumentFrequencies(_ALIKE, [{}, {}, {}, {}], end + 1)
    logprobs = torch.zeros(len(hypotheses)) if equally_likely else torch.tensor([h.logprob for h in hypotheses])
    scores = torch.tensor([rewards(captions, [reference], alike) for reference in captions], dtype=torch.float64)
    return (logprobs.double().softmax(0) @ scores).tolist()


def mean_logprobs(
    hypotheses: Sequence[Hypothesis],
    length_penalty: float,
    decoders: Sequence[Decoder | AttentionDecoder],
    encodings: Sequence[Tensor],
) -> list[float]:
    """The mean of what the models' log p of each caption is, over its length ** length_penalty."""
    rows = [torch.tensor(found.tokens, dtype=torch.long) for found in hypotheses]
    labels = pad_sequence(rows, batch_first=True).to(encodings[0].device)  # (M, D)
    image = labels.new_zeros(len(labels))
    scored = torch.stack(
        [target_logprobs(own, seen, labels, image) for own, seen in zip(decoders, encodings, strict=True)]
    )
    mean = scored.double().mean(0).tolist()  # (M, D+1)
    counts = [len(found.word_logprobs) for found in hypotheses]  # a caption that was cut off has no END
    return [math.fsum(row[:count]) / max(count, 1) ** length_penalty for row, count in zip(mean, counts, strict=True)]
