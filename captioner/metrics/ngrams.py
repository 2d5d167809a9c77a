"""BLEU and CIDEr-D from one table of n-gram counts, with array operations instead of a dictionary per caption.

Definitions and constants are those of coco-caption, so that scores are comparable with published ones:
BLEU after Papineni et al. 2002 (closest reference length), CIDEr-D after Vedantam et al. 2015.

Letters: N images (one prediction each), R references of them, C captions of all kinds, T tokens of all captions
together, G distinct n-grams of one order, E entries of a table, P distinct (image, n-gram) pairs.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np

from captioner.metrics.measure import Measure, mean_measure

MAX_ORDER = 4  # both metrics use 1-grams to 4-grams
CIDER_SIGMA = 6.0  # width of CIDEr-D's penalty on the difference in length, in bigrams
_BLEU_TINY, _BLEU_SMALL = 1e-15, 1e-9  # coco-caption's guards against 0/0; they decide BLEU of hopeless captions


@dataclass(frozen=True)
class _Order:
    """The n-grams of one order: an entry per image, n-gram and caption, in this order, so that what a prediction and
    its references have in common stands together.

    Attributes:
        document: (E,) image.
        gram: (E,) n-gram, 0..G-1.
        slot: (E,) caption of the image: 0 is the prediction, references count from 1.
        count: (E,) how often the caption has the n-gram.
        pair: (E,) the (image, n-gram) pair of the entry, 0..P-1.
        pair_start: (P,) the first entry of each pair.
        document_frequency: (G,) number of images with the n-gram in a reference.
    """

    document: np.ndarray
    gram: np.ndarray
    slot: np.ndarray
    count: np.ndarray
    pair: np.ndarray
    pair_start: np.ndarray
    document_frequency: np.ndarray

    def of_prediction(self, values: np.ndarray) -> np.ndarray:
        """(E,) values of entries → (P,) those of the pairs' predictions, 0 where the prediction lacks the n-gram."""
        found = np.zeros(len(self.pair_start), values.dtype)
        predicted = self.slot == 0
        found[self.pair[predicted]] = values[predicted]
        return found


class NgramTable:
    """The n-grams of N predictions and of the references of the same N images.

    Args:
        predictions: N tokenised captions (words separated by white space).
        references: per image, its tokenised references (at least one).
        df_references: references of the images (others than the scored ones) that CIDEr's document frequencies are
            counted on; None: the scored ones, as coco-caption does.
    """

    def __init__(
        self,
        predictions: Sequence[str],
        references: Sequence[Sequence[str]],
        df_references: Sequence[Sequence[str]] | None = None,
    ) -> None:
        self.num_images = n = len(predictions)
        # Images of df_references come after the scored ones and have no prediction.
        groups = [*references, *(df_references or ())]
        group_size = np.array([len(captions) for captions in groups])
        self.num_references = group_size[:n]  # (N,)
        words = [caption.split() for caption in chain(predictions, chain.from_iterable(groups))]
        lengths = np.fromiter(map(len, words), np.int64, len(words))  # (C,)
        num_scored = n + int(self.num_references.sum())
        self.prediction_length, self.reference_length = lengths[:n], lengths[n:num_scored]  # (N,), (R,) words
        self.first_reference = np.cumsum(group_size) - group_size  # of each image, among all references
        document = np.concatenate([np.arange(n), np.repeat(np.arange(len(groups)), group_size)])  # (C,)
        self.reference_document = document[n:num_scored]  # (R,)
        slot = np.arange(len(words)) - n - self.first_reference[document] + 1
        slot[:n] = 0
        self.df_documents = range(n if df_references else 0, len(groups))
        self.orders = [
            self._order(document[caption], gram, slot[caption], num_grams)
            for caption, gram, num_grams in _ngrams(words, lengths)
        ]

    def _order(self, document: np.ndarray, gram: np.ndarray, slot: np.ndarray, num_grams: int) -> _Order:
        num_slots = int(slot.max(initial=0)) + 1
        key, count = np.unique((document * num_grams + gram) * num_slots + slot, return_counts=True)
        pair_key, slot = np.divmod(key, num_slots)
        document, gram = np.divmod(pair_key, max(num_grams, 1))
        starts = np.ones(len(key), bool)
        starts[1:] = pair_key[1:] != pair_key[:-1]
        # A pair has a reference if its last entry is one.
        last = np.ones(len(key), bool)
        last[:-1] = starts[1:]
        counted = last & (slot > 0) & (document >= self.df_documents.start)
        frequency = np.bincount(gram[counted], minlength=num_grams)
        scored = slice(0, int(np.searchsorted(document, self.num_images)))
        return _Order(
            document[scored],
            gram[scored],
            slot[scored],
            count[scored],
            np.cumsum(starts[scored]) - 1,
            np.flatnonzero(starts[scored]),
            frequency,
        )


def _ngrams(words: list[list[str]], lengths: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray, int]]:
    """Per order: the caption and the n-gram's id for every place where an n-gram begins, and G."""
    flat = list(chain.from_iterable(words))
    ids = {word: i for i, word in enumerate(dict.fromkeys(flat))}
    tokens = np.fromiter(map(ids.__getitem__, flat), np.int64, len(flat))  # (T,)
    caption = np.repeat(np.arange(len(words)), lengths)  # (T,) the caption of each token
    remaining = np.repeat(np.cumsum(lengths), lengths) - np.arange(len(tokens))  # (T,) tokens to the caption's end
    gram = tokens.copy()  # (T,) id of the n-gram that begins at each token
    yield caption, gram, len(ids)
    for order in range(2, MAX_ORDER + 1):
        begin = np.flatnonzero(remaining >= order)
        code = gram[begin] * len(ids) + tokens[begin + order - 1]
        distinct, gram[begin] = np.unique(code, return_inverse=True)
        yield caption[begin], gram[begin], len(distinct)


def bleu(table: NgramTable) -> dict[str, Measure]:
    """Bleu_1 to Bleu_4 with the reference length closest to the prediction's (the shorter of two equally close)."""
    n = table.num_images
    length = table.prediction_length.astype(np.float64)
    correct = np.zeros((n, MAX_ORDER))
    for k, order in enumerate(table.orders):
        if len(order.count):
            highest = np.maximum.reduceat(np.where(order.slot > 0, order.count, 0), order.pair_start)  # in a reference
            clipped = np.minimum(order.of_prediction(order.count), highest)
            correct[:, k] = np.bincount(order.document[order.pair_start], clipped, minlength=n)
    guessed = np.maximum(length[:, None] - np.arange(MAX_ORDER), 0)
    rows = np.concatenate([correct, guessed, length[:, None], _closest_lengths(table)[:, None]], axis=1)  # (N, 10)
    return {f"Bleu_{k}": Measure(_Bleu(k)(rows), rows, _Bleu(k)) for k in range(1, MAX_ORDER + 1)}


def _closest_lengths(table: NgramTable) -> np.ndarray:
    away = np.abs(table.reference_length - table.prediction_length[table.reference_document])
    scale = table.reference_length.max() + 1
    first = table.first_reference[: table.num_images]
    return (np.minimum.reduceat(away * scale + table.reference_length, first) % scale).astype(np.float64)


@dataclass(frozen=True)
class _Bleu:
    order: int

    def __call__(self, sums: np.ndarray) -> np.ndarray:
        correct, guessed = sums[..., : self.order], sums[..., MAX_ORDER : MAX_ORDER + self.order]
        length, closest = sums[..., -2], sums[..., -1]
        precision = np.prod((correct + _BLEU_TINY) / (guessed + _BLEU_SMALL), axis=-1) ** (1 / self.order)
        ratio = (length + _BLEU_TINY) / (closest + _BLEU_SMALL)
        return precision * np.exp(np.minimum(0.0, 1 - 1 / ratio))


def sentence_bleu(correct: Sequence[int], length: int, closest: int) -> float:
    """BLEU of one caption.

    Args:
        correct: per order, how many of its n-grams are in a reference, each no oftener than in one of them.
        length: its words.
        closest: the length of the reference closest to it.
    """
    guessed = [max(length - order, 0) for order in range(len(correct))]
    return float(_Bleu(len(correct))(np.array([*correct, *guessed, length, closest], np.float64)))


def cider(table: NgramTable) -> Measure:
    """CIDEr-D (as coco-caption, scaled by 10): tf-idf cosine with clipped counts and a length penalty."""
    n, num_references = table.num_images, len(table.reference_document)
    similarity = np.zeros(num_references)  # (R,) summed over orders
    for order in table.orders:
        idf = np.log(len(table.df_documents)) - np.log(np.maximum(order.document_frequency, 1))
        weight = order.count * idf[order.gram]
        predicted = order.of_prediction(weight)  # (P,)
        norm = np.sqrt(np.bincount(order.document[order.pair_start], predicted**2, minlength=n))  # (N,)
        referred = np.flatnonzero(order.slot > 0)
        reference = table.first_reference[order.document[referred]] + order.slot[referred] - 1
        weight = weight[referred]
        reference_norm = np.sqrt(np.bincount(reference, weight**2, minlength=num_references))  # (R,)
        common = weight * np.minimum(weight, predicted[order.pair[referred]])
        dot = np.bincount(reference, common, minlength=num_references)
        norms = norm[table.reference_document] * reference_norm
        similarity += np.divide(dot, norms, out=np.zeros_like(norms), where=norms != 0)
    bigrams = np.maximum(table.prediction_length - 1, 0)[table.reference_document]
    longer = bigrams - np.maximum(table.reference_length - 1, 0)
    similarity *= np.exp(-(longer**2) / (2 * CIDER_SIGMA**2))
    total = np.bincount(table.reference_document, similarity, minlength=n)
    return mean_measure(10 * total / MAX_ORDER / table.num_references)
