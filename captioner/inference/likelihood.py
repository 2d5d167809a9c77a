"""log p(caption | image) of given captions: ranking candidates, and finding captions that belong to another picture.

A low probability alone finds rare words and long sentences. What finds a caption of another picture is its gain: how
much likelier the model finds it with its own picture than with others (an estimate of pointwise mutual information).

Letters: M captions, D words of the longest, V words, E encoding.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from captioner.data.batch import Batch
from captioner.data.tokenizers import tokenise
from captioner.data.vocabulary import Vocab
from captioner.inference.caption import Likelihood
from captioner.inference.captioner import Captioner
from captioner.model.target_logprobs import target_logprobs

NUM_OTHERS = 4  # pictures that a caption is also judged with; twice as many find no more
CAPTIONS_AT_ONCE = 64  # bounds the (M, D, V) table of probabilities: 50 MB for 20 words out of 10,000


def likelihoods(
    captioner: Captioner, batches: Iterable[Batch], captions: Sequence[Sequence[str]]
) -> Iterator[tuple[int, list[Likelihood]]]:
    """Judge the captions of every image; several models average their probabilities.

    All images are encoded first, then each caption is judged with its own and with NUM_OTHERS other images, evenly
    spread over the run. How images are batched does not matter.

    Args:
        batches: the images; those that could not be read are left out.
        captions: for each position of the run, the captions of that image.

    Yields:
        The position of an image and what the model thinks of its captions, in their order.
    """
    encodings: dict[int, list[Tensor]] = {}  # by position, (E,) of each model
    for batch in batches:
        while batch.positions and batch.positions[-1] not in encodings:
            with captioner.turn, torch.inference_mode(), captioner.pieces.of(batch) as pieces:
                for piece in pieces:
                    rows = zip(*captioner.encode(piece.to(captioner.device)), strict=True)
                    encodings.update(zip(piece.positions, map(list, rows), strict=True))
    positions = list(encodings)
    num_others = min(NUM_OTHERS, len(positions) - 1)
    for place, position in enumerate(positions):
        spread = [(place + k * len(positions) // (num_others + 1)) % len(positions) for k in range(num_others + 1)]
        with captioner.turn, torch.inference_mode():
            own, *others = (_judge(captioner, encodings[positions[i]], captions[position]) for i in spread)
        yield position, [_with_gain(one, elsewhere) for one, *elsewhere in zip(own, *others, strict=True)]


def judge(captioner: Captioner, batch: Batch, texts: Sequence[str]) -> list[Likelihood]:
    """Judge captions of the first image of a batch."""
    with captioner.turn, torch.inference_mode():
        encoding = [own[0] for own in captioner.encode(batch.to(captioner.device))]
        return _judge(captioner, encoding, texts)


def _with_gain(own: Likelihood, elsewhere: Sequence[Likelihood]) -> Likelihood:
    if not elsewhere or not math.isfinite(own.logprob):
        return own
    mean = torch.tensor([other.logprob for other in elsewhere]).logsumexp(0).item() - math.log(len(elsewhere))
    return replace(own, gain=own.logprob - mean)


def _judge(captioner: Captioner, encoding: Sequence[Tensor], texts: Sequence[str]) -> list[Likelihood]:
    """Judge captions of one image, whose encoding by each model is given."""
    judged: list[Likelihood] = []
    for start in range(0, len(texts), CAPTIONS_AT_ONCE):
        some = texts[start : start + CAPTIONS_AT_ONCE]
        judged += _judge_at_once(captioner, encoding, some)
    return judged


def _judge_at_once(captioner: Captioner, encoding: Sequence[Tensor], texts: Sequence[str]) -> list[Likelihood]:
    """Judge M captions of one image."""
    vocab = captioner.vocab
    tokens = [tokenise(text, vocab.tokenizer) for text in texts]
    labels = pad_sequence([_ids(words, vocab) for words in tokens], batch_first=True).to(captioner.device)  # (M, D)
    image_of_caption = labels.new_zeros(len(labels))
    logprobs = torch.stack(
        [
            target_logprobs(model.decoder, own.unsqueeze(0), labels, image_of_caption)
            for model, own in zip(captioner.models, encoding, strict=True)
        ]
    )
    mean = (logprobs.logsumexp(0) - math.log(len(logprobs))).tolist()  # (M, D+1)
    judged = []
    for words, row in zip(tokens, mean, strict=True):
        unknown = tuple(word for word in words if word not in vocab)
        read, scores = words, row[: len(words) + 1]
        if unknown and vocab.unk_id:
            read = [word if word in vocab else vocab.word(vocab.unk_id) for word in words]
        elif unknown:
            scores = [-math.inf if word not in vocab else score for word, score in zip(words, row, strict=False)]
            scores.append(row[len(words)])
        judged.append(Likelihood(tuple(read), tuple(scores), unknown))
    return judged


def _ids(words: Sequence[str], vocab: Vocab) -> Tensor:
    # Without UNK an unknown word is read as word 1, which keeps the others' places; its own score is not used.
    known = words if vocab.unk_id else [word if word in vocab else vocab.word(1) for word in words]
    return torch.tensor(vocab.encode(known, len(words)), dtype=torch.long)
