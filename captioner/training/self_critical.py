"""Self-critical training: captions are sampled, and made likelier the more they beat the other samples of their photo.

Rennie et al. 2017 (policy gradient with CIDEr as the reward), with the mean of a photo's other samples as the baseline
(Luo 2020), which needs no search.

Letters: N images, S samples per image, K = N·S samples, T words of the longest, V words, R samples not yet ended.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import numpy as np
import torch
from torch import Tensor

from captioner.data.batch import Batch
from captioner.data.dataset import Dataset
from captioner.data.epoch_order import source_of
from captioner.metrics.reward import DocumentFrequencies, rewards
from captioner.model.caption_model import CaptionModel
from captioner.model.decoding import UNFINISHED
from captioner.search.rules import State, Step
from captioner.training.health_checks import SampleTrend


@dataclass(frozen=True)
class Samples:
    """Sampled captions.

    Attributes:
        words: per sample its ids; END is the last, unless the sample has become too long for one.
        logprob: (K,) of what was chosen, under the distribution it was drawn from, with its gradient.
    """

    words: list[list[int]]
    logprob: Tensor


def sample_captions(
    model: CaptionModel, encodings: Tensor, *, samples: int, temperature: float, banned: Sequence[int]
) -> Samples:
    """Draw captions, and keep the way of the gradient: a sample's log-probability is that of this very computation.

    So dropout is the same for both, of features, words and output, and what cannot be drawn has no probability: the
    gradient would else raise what is never tried, until nothing else is left.

    Args:
        encodings: of N images.
        samples: S; those of an image stand together.
        temperature: of the softmax; below 1 it keeps to likelier words.
        banned: ids that are never drawn.
    """
    decoder, device = model.decoder, encodings.device
    end_id, step = decoder.end_id, cast(Step, decoder.step)
    running = torch.arange(len(encodings) * samples, device=device)  # (R,) which samples have not ended
    state: State = decoder.start(encodings).select(running // samples)
    tokens = torch.full_like(running, end_id)  # START
    logprob = torch.zeros(len(running), device=device, dtype=torch.promote_types(encodings.dtype, torch.float32))
    chosen: list[tuple[Tensor, Tensor]] = []
    out = torch.tensor([word - 1 for word in banned], dtype=torch.int64, device=device)
    for _ in range(model.config.max_length + 1):
        logprobs, state = step(tokens, state)
        drawn_from = (logprobs / temperature).index_fill(1, out, -torch.inf).log_softmax(1)  # (R, V+1)
        columns = torch.multinomial(drawn_from.detach().exp(), 1)
        logprob = logprob.index_add(0, running, drawn_from.gather(1, columns).squeeze(1))
        tokens = columns.squeeze(1) + 1
        chosen.append((running, tokens))
        going_on = (tokens != end_id).nonzero().squeeze(1)
        if not len(going_on):
            break
        running, tokens, state = running[going_on], tokens[going_on], state.select(going_on)
    words: list[list[int]] = [[] for _ in range(len(encodings) * samples)]
    for samples_of_step, tokens in chosen:
        for sample, token in zip(samples_of_step.tolist(), tokens.tolist(), strict=True):
            words[sample].append(token)
    return Samples(words, logprob)


class SelfCritical:
    """The loss of self-critical training.

    Each source of a mixed data set has document frequencies of its own: rare words of one are common in another, and
    photos with a single reference would drown those with five.

    Args:
        dataset: whose captions of `indices`, all of them, are counted for CIDEr.
        samples: per image, at least 2.
        bleu_weight: of BLEU-4 beside CIDEr-D in the reward.
    """

    def __init__(
        self, dataset: Dataset, indices: np.ndarray, *, samples: int, temperature: float, bleu_weight: float
    ) -> None:
        self.samples, self.temperature, self.bleu_weight = samples, temperature, bleu_weight
        self.end_id = dataset.vocab.size + 1
        self.banned = [dataset.vocab.unk_id] if dataset.vocab.unk_id else []
        rows: dict[str, list[int]] = {}
        for index in indices.tolist():
            rows.setdefault(source_of(dataset.info[index]), []).append(index)
        self.frequencies = {source: self._count(dataset, images) for source, images in rows.items()}
        unfinished = [i for i, word in enumerate(dataset.vocab.words, start=1) if word in UNFINISHED]
        lengths = [np.count_nonzero(dataset.captions_of(index)) / len(dataset.captions_of(index)) for index in indices]
        self.trend = SampleTrend(float(np.mean(lengths)) + 1, unfinished, self.end_id)

    def _count(self, dataset: Dataset, images: list[int]) -> DocumentFrequencies:
        captions = [with_end(dataset.captions_of(index), self.end_id) for index in images]
        image = np.repeat(np.arange(len(images)), [len(of_image) for of_image in captions])
        return DocumentFrequencies.of(np.concatenate(captions), image, self.end_id)

    def loss_sum(self, model: CaptionModel, batch: Batch) -> tuple[Tensor, int]:
        """−reward summed over the samples of a batch whose labels are all references; its gradient is the policy's.

        Returns:
            A scalar, and the number of samples.
        """
        encodings = model.encode(batch.inputs)
        samples = sample_captions(
            model, encodings, samples=self.samples, temperature=self.temperature, banned=self.banned
        )
        self.trend.add(samples.words)
        references = with_end(batch.captions.labels.numpy(), self.end_id)
        of_image = batch.captions.image_of_caption.numpy()
        found: list[float] = []
        for image, info in enumerate(batch.info):
            known = [[word for word in row if word] for row in references[of_image == image].tolist()]
            mine = samples.words[image * self.samples : (image + 1) * self.samples]
            found += rewards(mine, known, self.frequencies[source_of(info)], self.bleu_weight)
        reward = torch.tensor(found).to(samples.logprob.device)
        loss = -(advantages(reward, self.samples) * samples.logprob).sum()
        return loss + (-reward.sum() - loss).detach(), len(found)


def advantages(reward: Tensor, samples: int) -> Tensor:
    """(K,) each reward less the mean of the other samples of its image."""
    of_image = reward.unflatten(0, (-1, samples))
    others = (of_image.sum(1, keepdim=True) - of_image) / (samples - 1)
    return (of_image - others).flatten()


def with_end(captions: np.ndarray, end_id: int) -> np.ndarray:
    """(M, D) 0-padded ids → (M, D+1) with END after the last word of each; what follows a 0 does not count."""
    length = (np.cumprod(captions != 0, axis=1)).sum(axis=1)
    place = np.arange(captions.shape[1] + 1)
    padded = np.pad(captions.astype(np.int64), ((0, 0), (0, 1)))
    return np.where(place < length[:, None], padded, np.where(place == length[:, None], end_id, 0))
