"""BLEU and CIDEr-D from one table of n-gram counts, with array operations instead of a dictionary per caption.

Definitions and constants are those of coco-caption, so that scores are comparable with published ones:
BLEU after Papineni et al. 2002 (closest reference length), CIDEr-D after Vedantam et al. 2015.

Letters: N images (one prediction each), C captions (predictions, then references), T tokens of all captions together,
G distinct n-grams of one order, E entries of a table = (caption, n-gram) pairs.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np

from captioner.metrics.measure import Measure, mean_measure

MAX_ORDER = 4  # both metrics use 1-grams to 4-grams
CIDER_SIGMA = 6.0  # width of CIDEr-D's penalty on the difference in length, in bigrams
_BLEU_TINY, _BLEU_SMALL = 1e-15, 1e-9  # coco-caption's guards against 0/0; they decide BLEU of hopeless captions


@dataclass(frozen=True)
class _Entries:
    """Distinct (caption, n-gram) pairs of one order, by rising caption, then n-gram."""

    caption: np.ndarray  # (E,) int64
    gram: np.ndarray  # (E,) int64, 0..G-1
    count: np.ndarray  # (E,) int64


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
        self.num_images = len(predictions)
        self.num_references = np.array([len(captions) for captions in references])  # (N,)
        groups = list(references) + list(df_references or [])
        words = [caption.split() for caption in chain(predictions, chain.from_iterable(groups))]
        self.lengths = np.fromiter(map(len, words), np.int64, len(words))  # (C,) words per caption
        # Document = image. References of image i belong to document i, those of df_references to later ones.
        documents = np.repeat(np.arange(len(groups)), [len(captions) for captions in groups])
        self.document = np.concatenate([np.arange(self.num_images), documents])  # (C,)
        self.scored = self.num_images + int(self.num_references.sum())  # captions before this one are scored
        self.first_df_document = self.num_images if df_references else 0
        self.num_df_documents = len(groups) - self.first_df_document
        self.orders = [self._order(entries) for entries in _count(words, self.lengths)]

    def _order(self, entries: _Entries) -> "_Order":
        num_grams = int(entries.gram.max(initial=-1)) + 1
        predicted = int(np.searchsorted(entries.caption, self.num_images))
        key = self.document[entries.caption] * num_grams + entries.gram
        of_df = key[predicted:][self.document[entries.caption[predicted:]] >= self.first_df_document]
        frequency = np.bincount(np.unique(of_df) % max(num_grams, 1), minlength=num_grams)
        end = int(np.searchsorted(entries.caption, self.scored))
        prediction_key, reference_key = key[:predicted], key[predicted:end]
        if predicted:
            place = np.minimum(np.searchsorted(prediction_key, reference_key), predicted - 1)
            shared = np.flatnonzero(prediction_key[place] == reference_key)
        else:
            place, shared = np.zeros(0, np.int64), np.zeros(0, np.int64)
        return _Order(
            _Entries(entries.caption[:predicted], entries.gram[:predicted], entries.count[:predicted]),
            _Entries(entries.caption[predicted:end], entries.gram[predicted:end], entries.count[predicted:end]),
            shared,
            place[shared],
            frequency,
        )


@dataclass(frozen=True)
class _Order:
    """One n-gram order: predictions, references, and which n-grams a reference shares with its image's prediction."""

    prediction: _Entries
    reference: _Entries
    shared: np.ndarray  # entries of `reference` that the prediction also has
    partner: np.ndarray  # the entry of `prediction` for each of them
    document_frequency: np.ndarray  # (G,) number of documents with the n-gram


def _count(words: list[list[str]], lengths: np.ndarray) -> list[_Entries]:
    ids: dict[str, int] = {}
    tokens = np.fromiter((ids.setdefault(word, len(ids)) for word in chain.from_iterable(words)), np.int64)  # (T,)
    caption = np.repeat(np.arange(len(words)), lengths)  # (T,) the caption of each token
    remaining = np.repeat(np.cumsum(lengths), lengths) - np.arange(len(tokens))  # (T,) tokens to the caption's end
    gram = np.zeros(len(tokens), np.int64)  # (T,) id of the n-gram that begins at each token
    tables = []
    for order in range(1, MAX_ORDER + 1):
        begin = np.flatnonzero(remaining >= order)
        code = gram[begin] * len(ids) + tokens[begin + order - 1]
        distinct, gram[begin] = np.unique(code, return_inverse=True)
        key, count = np.unique(caption[begin] * max(len(distinct), 1) + gram[begin], return_counts=True)
        tables.append(_Entries(*np.divmod(key, max(len(distinct), 1)), count))
    return tables


def bleu(table: NgramTable) -> dict[str, Measure]:
    """Bleu_1 to Bleu_4 with the reference length closest to the prediction's (the shorter of two equally close)."""
    n = table.num_images
    length = table.lengths[:n].astype(np.float64)
    correct = np.zeros((n, MAX_ORDER))
    for k, order in enumerate(table.orders):
        in_references = np.zeros_like(order.prediction.count)  # highest count in any one reference
        np.maximum.at(in_references, order.partner, order.reference.count[order.shared])
        clipped = np.minimum(order.prediction.count, in_references)
        correct[:, k] = np.bincount(order.prediction.caption, clipped, minlength=n)
    guessed = np.maximum(length[:, None] - np.arange(MAX_ORDER), 0)
    rows = np.concatenate([correct, guessed, length[:, None], _closest_lengths(table)[:, None]], axis=1)  # (N, 10)
    return {f"Bleu_{k}": Measure(_Bleu(k)(rows), rows, _Bleu(k)) for k in range(1, MAX_ORDER + 1)}


def _closest_lengths(table: NgramTable) -> np.ndarray:
    references = table.lengths[table.num_images : table.scored]
    away = np.abs(references - np.repeat(table.lengths[: table.num_images], table.num_references))
    scale = references.max(initial=0) + 1
    first = np.cumsum(table.num_references) - table.num_references
    return (np.minimum.reduceat(away * scale + references, first) % scale).astype(np.float64)


@dataclass(frozen=True)
class _Bleu:
    order: int

    def __call__(self, sums: np.ndarray) -> np.ndarray:
        correct, guessed = sums[..., : self.order], sums[..., MAX_ORDER : MAX_ORDER + self.order]
        length, closest = sums[..., -2], sums[..., -1]
        precision = np.prod((correct + _BLEU_TINY) / (guessed + _BLEU_SMALL), axis=-1) ** (1 / self.order)
        ratio = (length + _BLEU_TINY) / (closest + _BLEU_SMALL)
        return precision * np.exp(np.minimum(0.0, 1 - 1 / ratio))


def cider(table: NgramTable) -> Measure:
    """CIDEr-D (as coco-caption, scaled by 10): tf-idf cosine with clipped counts and a length penalty."""
    n, scored = table.num_images, table.scored
    document = table.document[n:scored]  # (R,) image of each reference
    bigrams = np.maximum(table.lengths[:scored] - 1, 0)
    similarity = np.zeros(scored - n)  # (R,) summed over orders
    for order in table.orders:
        idf = np.log(table.num_df_documents) - np.log(np.maximum(order.document_frequency, 1))
        predicted = order.prediction.count * idf[order.prediction.gram]
        referred = order.reference.count * idf[order.reference.gram]
        norm = np.sqrt(np.bincount(order.prediction.caption, predicted**2, minlength=n))[document]
        norm *= np.sqrt(np.bincount(order.reference.caption - n, referred**2, minlength=scored - n))
        common = referred[order.shared]
        common = common * np.minimum(common, predicted[order.partner])
        dot = np.bincount(order.reference.caption[order.shared] - n, common, minlength=scored - n)
        similarity += np.divide(dot, norm, out=np.zeros_like(norm), where=norm != 0)
    longer = bigrams[:n][document] - bigrams[n:]
    similarity *= np.exp(-(longer**2) / (2 * CIDER_SIGMA**2))
    total = np.bincount(document, similarity, minlength=n)
    return mean_measure(10 * total / MAX_ORDER / table.num_references)
