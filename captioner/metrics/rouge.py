"""ROUGE-L (Lin 2004) as coco-caption computes it: best precision and best recall over the references, beta 1.2."""

from collections.abc import Sequence

import numpy as np

from captioner.metrics.measure import Measure, mean_measure

BETA = 1.2


def rouge_l(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> Measure:
    """ROUGE_L of tokenised captions (words separated by single blanks).

    Splitting at single blanks makes an empty caption one empty word, as in coco-caption: it matches nothing but
    another empty caption.
    """
    scores = np.zeros(len(predictions))
    for i, (prediction, captions) in enumerate(zip(predictions, references, strict=True)):
        words = prediction.split(" ")
        positions: dict[str, int] = {}
        for place, word in enumerate(words):
            positions[word] = positions.get(word, 0) | 1 << place
        precision = recall = 0.0
        for caption in captions:
            other = caption.split(" ")
            common = _common_subsequence(positions, len(words), other)
            precision = max(precision, common / len(words))
            recall = max(recall, common / len(other))
        if precision:
            scores[i] = (1 + BETA**2) * precision * recall / (recall + BETA**2 * precision)
    return mean_measure(scores)


def _common_subsequence(positions: dict[str, int], length: int, other: list[str]) -> int:
    """Length of the longest common subsequence, one machine-word step per word of `other`.

    Bit-parallel dynamic programming (Hyyrö 2004): a zero bit at place j of `row` means that the subsequence grows at
    word j; `positions` has a bit for each place of a word. Python's integers make it right for any length.
    """
    ones = (1 << length) - 1
    row = ones
    for word in other:
        matches = row & positions.get(word, 0)
        if matches:
            row = ((row + matches) | (row - matches)) & ones
    return length - row.bit_count()
