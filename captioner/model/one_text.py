"""What language models think of one text as the beginning of each photo's caption: a search for photos by words.

Equal to their `step` along the text, in fewer products. Words are read once, not once for every photo. A model that
attends is not asked for the keys and values of all cells, which pay only where dozens of words look at a photo:
for head h, q·(K x) is (Kᵀq)·x, and the mean of values V x is V of the mean of x.

Letters: N photos, G cells of a photo's grid, D words of the text, E encoding, H hidden, A heads of d = H/A numbers.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from captioner.kernels import lstm_weights
from captioner.model.attention_decoder import AttentionDecoder
from captioner.model.decoder import Decoder
from captioner.model.search_step import lstm_cell, widen


def text_logprobs(decoder: Decoder | AttentionDecoder, encodings: Tensor, ids: Sequence[int]) -> Tensor:
    """Natural log-probability of each word of a text, given the photo and the words before it; END is not asked for.

    Args:
        encodings: (N, E) or (N, G, E).
        ids: D of them, 1-based.

    Returns:
        (N, D), float32 or wider.
    """
    tokens = torch.tensor([decoder.end_id, *ids], device=encodings.device)
    before, targets = tokens[:-1], tokens[1:]
    if isinstance(decoder, AttentionDecoder):
        return _attending(decoder, encodings, before, targets)
    state, found = decoder.start(encodings), []
    for token, target in zip(before, targets, strict=True):
        logprobs, state = decoder.step(token.expand(len(encodings)), state)
        found.append(logprobs[:, target - 1])
    return torch.stack(found, 1)


def _attending(decoder: AttentionDecoder, encodings: Tensor, tokens: Tensor, targets: Tensor) -> Tensor:
    weight = decoder.embedding.weight
    grid = encodings.to(weight.dtype)
    w_ih, w_hh, b_ih, b_hh = lstm_weights(decoder.lstm1, 0)
    width = weight.shape[1]
    from_words = F.linear(decoder.embedding(tokens - 1) * decoder.word_scale, w_ih[:, :width])  # (D, 4H)
    from_mean = F.linear(grid.mean(1), w_ih[:, width:], b_ih + b_hh)  # (N, 4H)
    hidden1 = _along(from_words.unsqueeze(1) + from_mean, w_hh)  # (D, N, H)
    context = _context(decoder, hidden1.transpose(0, 1), grid).transpose(0, 1)
    w_ih, w_hh, b_ih, b_hh = lstm_weights(decoder.lstm2, 0)
    hidden2 = _along(F.linear(torch.cat([context, hidden1], 2), w_ih, b_ih + b_hh), w_hh)
    logits = widen(F.linear(decoder.head(hidden2), weight, decoder.output_bias))  # (D, N, V+1)
    chosen = logits.gather(2, (targets - 1)[:, None, None].expand(-1, len(grid), 1)).squeeze(2)
    return (chosen - logits.logsumexp(2)).t()


def _along(inputs: Tensor, w_hh: Tensor) -> Tensor:
    """Hidden states (D, N, H) of an LSTM from what its inputs add to the gates, (D, N, 4H)."""
    h, c = lstm_cell(inputs[0], widen(torch.zeros_like(inputs[0, :, : w_hh.shape[1]])))
    hidden = [h]
    for gates in inputs[1:]:
        h, c = lstm_cell(gates + F.linear(h, w_hh), c)
        hidden.append(h)
    return torch.stack(hidden)


def _context(decoder: AttentionDecoder, hidden: Tensor, grid: Tensor) -> Tensor:
    """What is seen (N, D, H) where these states (N, D, H) look at grids (N, G, E)."""
    count, length, _ = hidden.shape
    heads = decoder.heads
    queries = decoder.query(hidden).unflatten(2, (heads, -1))  # (N, D, A, d)
    size = queries.shape[3]
    keys = decoder.key.weight.unflatten(0, (heads, -1))  # (A, d, E)
    of_cells = torch.matmul(queries.permute(2, 0, 1, 3).flatten(1, 2), keys)  # (A, N·D, E)
    of_cells = of_cells.unflatten(1, (count, length)).permute(1, 2, 0, 3).flatten(1, 2)  # (N, D·A, E)
    weights = widen(of_cells @ grid.transpose(1, 2) / size**0.5).softmax(2).to(grid.dtype)  # (N, D·A, G)
    means = (weights @ grid).unflatten(1, (length, heads)).permute(2, 0, 1, 3).flatten(1, 2)  # (A, N·D, E)
    values = torch.matmul(means, decoder.value.weight.unflatten(0, (heads, -1)).transpose(1, 2))  # (A, N·D, d)
    return values.unflatten(1, (count, length)).permute(1, 2, 0, 3).flatten(2) + decoder.value.bias
