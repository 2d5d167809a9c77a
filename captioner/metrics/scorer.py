"""The one function that training, evaluation and `caption-score` call for scores."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from captioner.errors import InputError
from captioner.metrics.measure import Measure
from captioner.metrics.ngrams import NgramTable, bleu, cider
from captioner.metrics.rouge import rouge_l
from captioner.metrics.tokenizers import tokenise_python

METRICS = ("Bleu", "METEOR", "ROUGE_L", "CIDEr", "SPICE")
WITHOUT_JAVA = ("Bleu", "ROUGE_L", "CIDEr")


@dataclass(frozen=True)
class Scores:
    """Scores of N predictions.

    Attributes:
        measures: name (Bleu_1 .. Bleu_4, METEOR, ROUGE_L, CIDEr, SPICE) → scores that can be resampled.
        skipped: name → why the metric could not run.
        notes: what a reader of the numbers should know.
    """

    measures: dict[str, Measure]
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
        tokenizer: "python", or "ptb" for coco-caption's own (needs Java).
        df_references: images (one list of captions each) that CIDEr's document frequencies are counted on;
            None: the evaluated references, as coco-caption does.

    Raises:
        InputError: nothing to score, or an image without references.
    """
    if len(predictions) != len(references):
        raise ValueError(f"{len(predictions)} predictions, {len(references)} lists of references")
    if not predictions:
        raise InputError("there are no captions to score")
    for i, captions in enumerate(references):
        if not captions:
            raise InputError(f"caption {i + 1} of {len(references)} has no references", expected="at least one each")
    predicted = tokenise_python(predictions)
    grouped = _tokenise_groups(references)
    notes = []
    table = NgramTable(predicted, grouped, _tokenise_groups(df_references) if df_references else None)
    measures: dict[str, Measure] = {}
    for name in METRICS:
        if name not in metrics:
            continue
        if name == "Bleu":
            measures.update(bleu(table))
        elif name == "ROUGE_L":
            measures[name] = rouge_l(predicted, grouped)
        elif name == "CIDEr":
            measures[name] = cider(table)
            if table.num_df_documents == 1:
                notes.append("CIDEr of one image is 0: its document frequencies come from the evaluated references")
    return Scores(measures, notes=notes)


def _tokenise_groups(groups: Sequence[Sequence[str]]) -> list[list[str]]:
    flat = iter(tokenise_python([caption for captions in groups for caption in captions]))
    return [[next(flat) for _ in captions] for captions in groups]
