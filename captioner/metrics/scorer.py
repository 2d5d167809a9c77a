"""The one function that training, evaluation and `caption-score` call for scores."""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain, islice

from captioner.data.tokenizers import tokenise
from captioner.errors import InputError
from captioner.metrics import java
from captioner.metrics.measure import Measure
from captioner.metrics.ngrams import NgramTable, bleu, cider
from captioner.metrics.rouge import rouge_l

METRICS = ("Bleu", "METEOR", "ROUGE_L", "CIDEr", "SPICE")
WITHOUT_JAVA = ("Bleu", "ROUGE_L", "CIDEr")
_ORDER = ("Bleu_1", "Bleu_2", "Bleu_3", "Bleu_4", "METEOR", "ROUGE_L", "CIDEr", "SPICE")  # as coco-caption prints them


@dataclass(frozen=True)
class Scores:
    """Scores of N predictions.

    Attributes:
        measures: name (Bleu_1 .. Bleu_4, METEOR, ROUGE_L, CIDEr, SPICE) → scores that can be resampled.
        skipped: metric → why it could not run.
        notes: what a reader of the numbers should know.
        tokenised: the N predictions as they were compared, words separated by blanks.
    """

    measures: dict[str, Measure]
    tokenised: list[str]
    skipped: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @property
    def corpus(self) -> dict[str, float]:
        """Name → score of the whole set."""
        return {name: measure.score for name, measure in self.measures.items()}

    @property
    def per_caption(self) -> dict[str, list[float]]:
        """Name → N scores, one for each prediction."""
        return {name: measure.per_caption.tolist() for name, measure in self.measures.items()}

    @property
    def skipped_line(self) -> str:
        """What could not run, and why, in one line; "" where everything did."""
        names_of: dict[str, list[str]] = {}
        for name, reason in self.skipped.items():
            names_of.setdefault(reason, []).append(name)
        return "; ".join(f"{' and '.join(names)} skipped because {reason}" for reason, names in names_of.items())


def score(
    predictions: Sequence[str],
    references: Sequence[Sequence[str]],
    *,
    metrics: Sequence[str] = WITHOUT_JAVA,
    tokenizer: str = "python",
    df_references: Sequence[Sequence[str]] | None = None,
) -> Scores:
    """Score N predictions, each against the references of its image.

    Args:
        predictions: N captions as written; empty ones are allowed.
        references: N lists of at least one caption.
        metrics: names from METRICS. One that cannot run is listed under `skipped`, the others go on.
        tokenizer: "python" (`ptb` of captioner.data.tokenizers), or "ptb" for coco-caption's own (needs Java).
        df_references: images (one list of captions each) that CIDEr's document frequencies are counted on;
            None: the evaluated references, as coco-caption does.

    Raises:
        InputError: nothing to score, an image without references, or the PTB tokeniser cannot run.
    """
    if len(predictions) != len(references):
        raise ValueError(f"{len(predictions)} predictions, {len(references)} lists of references")
    if not predictions:
        raise InputError("there are no captions to score")
    for i, captions in enumerate(references):
        if not captions:
            raise InputError(f"caption {i + 1} of {len(references)} has no references", expected="at least one each")

    measures: dict[str, Measure] = {}
    skipped: dict[str, str] = {}
    notes: list[str] = []
    with contextlib.ExitStack() as running:
        groups = [predictions, *references, *(df_references or ())]
        tokenised = tokenise_groups(groups, tokenizer)
        words, truth = tokenised[0], tokenised[1 : len(references) + 1]
        meteor = None
        if "METEOR" in metrics:
            with _skipping("METEOR", skipped):
                meteor = java.Meteor(words, truth)  # at work while the other scores are computed
                running.callback(meteor.stop)
        if "Bleu" in metrics or "CIDEr" in metrics:
            table = NgramTable(words, truth, tokenised[len(references) + 1 :])
            if "Bleu" in metrics:
                measures.update(bleu(table))
            if "CIDEr" in metrics:
                measures["CIDEr"] = cider(table)
                if len(table.df_documents) == 1:
                    notes.append("CIDEr of one image is 0 by definition: give document frequencies of a larger set")
        if "ROUGE_L" in metrics:
            measures["ROUGE_L"] = rouge_l(words, truth)
        if meteor:
            with _skipping("METEOR", skipped):
                measures["METEOR"] = meteor.measure()
        if "SPICE" in metrics:
            with _skipping("SPICE", skipped):
                measures["SPICE"] = java.spice(words, truth)
    return Scores({name: measures[name] for name in _ORDER if name in measures}, words, skipped, notes)


@contextlib.contextmanager
def _skipping(metric: str, skipped: dict[str, str]) -> Iterator[None]:
    try:
        yield
    except java.Unavailable as error:
        skipped[metric] = str(error)


def tokenise_groups(groups: Sequence[Sequence[str]], tokenizer: str) -> list[list[str]]:
    """Tokenise lists of captions; what comes back has the same shape.

    Raises:
        InputError: the PTB tokeniser cannot run.
    """
    flat = list(chain.from_iterable(groups))
    if tokenizer == "ptb":
        try:
            tokenised = iter(java.tokenise_ptb(flat))
        except java.Unavailable as error:
            raise InputError(f"tokenizer ptb cannot run: {error}", remedy="use the tokenizer python") from error
    elif tokenizer == "python":
        tokenised = (" ".join(tokenise(caption, "ptb")) for caption in flat)
    else:
        raise ValueError(f"no such tokenizer: {tokenizer}")
    return [list(islice(tokenised, len(captions))) for captions in groups]
