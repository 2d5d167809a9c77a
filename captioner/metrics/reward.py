"""The scores of single captions as a training reward: CIDEr-D and BLEU-4 over word ids, a few at a time.

The same numbers as `ngrams.cider` and `ngrams.bleu` give for a whole corpus, without building its table anew for a
handful of captions.

Letters: M captions, D ids of the longest.
"""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from captioner.errors import InputError
from captioner.metrics.ngrams import CIDER_SIGMA, MAX_ORDER, sentence_bleu

Grams = list[Counter[int]]  # per order 1-4: n-gram → how often


@dataclass(frozen=True)
class DocumentFrequencies:
    """In how many images' references an n-gram stands.

    Attributes:
        num_images: of which references were counted.
        counts: per order 1-4; n-grams of a single image are left out, for they weigh as much as unknown ones.
        base: n-grams are numbers in this base, a digit for each id.
    """

    num_images: int
    counts: list[dict[int, int]]
    base: int

    @classmethod
    def of(cls, captions: np.ndarray, image: np.ndarray, num_ids: int) -> "DocumentFrequencies":
        """Count the n-grams of captions (M, D), 0-padded ids 1..num_ids, of images (M,).

        Raises:
            InputError: so many words that 4-grams are no 64-bit numbers.
        """
        base = num_ids + 1
        if base**MAX_ORDER >= 2**63:
            raise InputError(f"{num_ids} words are too many for a CIDEr reward", expected="at most 55,000")
        _, document = np.unique(image, return_inverse=True)
        num_images = int(document.max(initial=-1)) + 1
        words, counts = captions.astype(np.int64), []
        gram = np.zeros_like(words)
        for order in range(MAX_ORDER):
            ends = words[:, order:]
            gram = gram[:, : ends.shape[1]] * base + ends  # of the n-gram that begins in each place
            row, _ = present = np.nonzero(ends)  # captions are 0-padded: where the last id is, all are
            keys, dense = np.unique(gram[present], return_inverse=True)
            pairs = np.unique(dense * max(num_images, 1) + document[row])
            frequency = np.bincount(pairs // max(num_images, 1), minlength=len(keys))
            shared = frequency > 1
            counts.append(dict(zip(keys[shared].tolist(), frequency[shared].tolist(), strict=True)))
        return cls(num_images, counts, base)

    def grams(self, caption: Sequence[int]) -> Grams:
        """The n-grams of a caption's ids."""
        found: Grams = []
        before = [0] * len(caption)
        for order in range(MAX_ORDER):
            before = [gram * self.base + word for gram, word in zip(before, caption[order:], strict=False)]
            found.append(Counter(before))
        return found

    def weigh(self, grams: Grams) -> tuple[list[dict[int, float]], list[float]]:
        """tf-idf of each n-gram, and the length of the vector of each order."""
        logarithm = math.log(self.num_images)
        weights = [
            {gram: count * (logarithm - math.log(known.get(gram, 1))) for gram, count in of_order.items()}
            for of_order, known in zip(grams, self.counts, strict=True)
        ]
        return weights, [math.sqrt(sum(weight**2 for weight in of_order.values())) for of_order in weights]


def rewards(
    captions: Sequence[Sequence[int]],
    references: Sequence[Sequence[int]],
    frequencies: DocumentFrequencies,
    bleu_weight: float = 0.0,
) -> list[float]:
    """CIDEr-D + bleu_weight · BLEU-4 of each of several captions of one image.

    Args:
        captions: ids, END as one of them, so that a caption that breaks off has less in common with the references.
        references: of the image, in the same way.
    """
    known = [(frequencies.grams(reference), len(reference)) for reference in references]
    weighed = [(*frequencies.weigh(grams), length) for grams, length in known]
    found = []
    for caption in captions:
        grams = frequencies.grams(caption)
        reward = _cider(frequencies.weigh(grams), len(caption), weighed)
        if bleu_weight:
            reward += bleu_weight * _bleu(grams, len(caption), known)
        found.append(reward)
    return found


def _cider(
    caption: tuple[list[dict[int, float]], list[float]],
    length: int,
    references: Sequence[tuple[list[dict[int, float]], list[float], int]],
) -> float:
    weights, norms = caption
    total = 0.0
    for reference, reference_norms, reference_length in references:
        similarity = 0.0
        for mine, theirs, norm, other in zip(weights, reference, norms, reference_norms, strict=True):
            if norm and other:
                shared = [(weight, theirs[gram]) for gram, weight in mine.items() if gram in theirs]
                common = sum(min(weight, other_weight) * other_weight for weight, other_weight in shared)
                similarity += common / (norm * other)
        longer = max(length - 1, 0) - max(reference_length - 1, 0)
        total += similarity * math.exp(-(longer**2) / (2 * CIDER_SIGMA**2))
    return 10 * total / MAX_ORDER / len(references)


def _bleu(grams: Grams, length: int, references: Sequence[tuple[Grams, int]]) -> float:
    correct = []
    for order, of_order in enumerate(grams):
        ceiling: Counter[int] = Counter()
        for reference, _ in references:
            ceiling |= reference[order]
        correct.append(sum(min(count, ceiling[gram]) for gram, count in of_order.items()))
    closest = min((other for _, other in references), key=lambda other: (abs(other - length), other))
    return sentence_bleu(correct, length, closest)
