"""caption-score --predictions: captions against what people said."""

import argparse
import json
import logging
from pathlib import Path
from typing import TYPE_CHECKING

from captioner.errors import InputError
from captioner.runtime.files import atomic_write

if TYPE_CHECKING:
    from captioner.metrics.pairing import Joined, Pair

log = logging.getLogger(__name__)


def score_predictions(opt: argparse.Namespace) -> None:
    """Scores to stdout, to --output, and two systems side by side as a page to --view."""
    from captioner.metrics import report
    from captioner.metrics.pairing import join, read_predictions, read_references
    from captioner.metrics.scored import describe_scores, score_pairs
    from captioner.metrics.significance import compare
    from captioner.output.comparison import write_comparison

    if opt.view and not opt.compare:
        raise InputError("--view shows two systems side by side", remedy="name the other one with --compare")
    metrics = _metrics(opt.metrics)
    references = read_references(opt.references)
    df_references = [reference.captions for reference in read_references(opt.df)] if opt.df else None
    training = [reference.captions for reference in read_references(opt.train_captions)] if opt.train_captions else None
    joined = join(read_predictions(opt.predictions), references)
    pairs, others = joined.pairs, list["Pair"]()
    if opt.compare:
        pairs, others = _of_both(joined, join(read_predictions(opt.compare), references), opt)
    for line in report.unmatched_lines(joined, opt.predictions, opt.references):
        log.warning("%s", line)

    measured = {"metrics": metrics, "tokenizer": opt.tokenizer, "df_references": df_references}
    scores = score_pairs(pairs, **measured)
    scored = describe_scores(
        scores, pairs, joined, tokenizer=opt.tokenizer, bootstrap=opt.bootstrap, seed=opt.seed, training=training
    )
    print(f"{len(pairs):,} images, joined by {joined.by}; tokenizer {opt.tokenizer}")
    print("\n".join(report.score_lines(scores, scored.intervals)))
    print(report.diversity_line(scored.diversity))
    written = scored.as_json()
    written["options"] = {name: getattr(opt, name) for name in ("tokenizer", "bootstrap", "seed", "df")}
    if opt.compare:
        other = score_pairs(others, **measured)
        comparisons = compare(scores.measures, other.measures, num_samples=opt.bootstrap, seed=opt.seed)
        print(f"compared with {opt.compare}")
        print("\n".join(report.comparison_lines(other, comparisons)))
        written["compare"] = {"predictions": opt.compare, **report.comparison_as_json(other, comparisons)}
        if opt.view:
            rows_of = (report.per_caption_rows(pairs, scores), report.per_caption_rows(others, other))
            systems = list(zip((opt.predictions, opt.compare), rows_of, strict=True))
            known = [reference.captions for _, reference in pairs]
            address = write_comparison(Path(opt.view), systems, known, opt.overwrite)
            print(f"side by side: {address}")
    if opt.per_caption and scores.measures:
        rows = scored.per_caption
        if opt.output:
            written["imgToEval"] = report.by_image(rows)
        else:
            print("\n".join(json.dumps(row, ensure_ascii=False) for row in report.worst_first(rows)))
    if opt.output:
        with atomic_write(opt.output, "w", encoding="utf-8") as stream:
            json.dump(written, stream, ensure_ascii=False, indent=1)
            stream.write("\n")


def _metrics(text: str) -> tuple[str, ...]:
    from captioner.metrics import METRICS

    if text == "all":
        return METRICS
    wanted = {part.strip().lower() for part in text.split(",")}
    unknown = wanted - {name.lower() for name in METRICS}
    if unknown:
        raise InputError(f"--metrics: {sorted(unknown)[0]!r} is unknown", expected=f"some of {','.join(METRICS)}")
    return tuple(name for name in METRICS if name.lower() in wanted)


def _of_both(joined: "Joined", other: "Joined", opt: argparse.Namespace) -> "tuple[list[Pair], list[Pair]]":
    """The images that both systems captioned, in the same order."""
    of_other = {id(reference): (prediction, reference) for prediction, reference in other.pairs}
    pairs = [pair for pair in joined.pairs if id(pair[1]) in of_other]
    if not pairs:
        raise InputError(
            f"{opt.predictions} and {opt.compare} have no image in common", expected="captions of the same images"
        )
    if len(pairs) < max(len(joined.pairs), len(other.pairs)):
        log.warning("compared on the %s images that both files caption", f"{len(pairs):,}")
    return pairs, [of_other[id(reference)] for _, reference in pairs]
