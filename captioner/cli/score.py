"""caption-score: predictions against what people said, with intervals, comparison of systems and diversity."""

import argparse
import json
import logging
from collections.abc import Sequence
from itertools import chain
from typing import TYPE_CHECKING

from captioner.cli.options import Parser, flag, positive, run
from captioner.errors import InputError
from captioner.files import atomic_write

if TYPE_CHECKING:  # numpy is imported late, so that --help and argument errors are instant
    from captioner.metrics.pairing import Joined, Pair

log = logging.getLogger(__name__)


def parser() -> Parser:
    """The command's options."""
    p = Parser(
        prog="caption-score",
        description="Score captions against references: BLEU, METEOR, ROUGE_L, CIDEr and SPICE as coco-caption's. "
        "Images are joined by file name or image id. METEOR, SPICE and --tokenizer ptb need Java and the extra "
        "`metrics`; what cannot run is skipped.",
    )
    p.add_argument("--predictions", required=True, metavar="P.json", help="[{image_id or file_name, caption}, ..]")
    p.add_argument("--references", required=True, metavar="R.json", help="COCO annotations or any raw data")
    p.add_argument("--output", metavar="S.json", help="also write the scores here")
    p.add_argument("--metrics", default="all", help="some of Bleu,METEOR,ROUGE_L,CIDEr,SPICE, separated by commas")
    p.add_argument("--tokenizer", choices=("python", "ptb"), default="python", help="ptb: coco-caption's own")
    p.add_argument("--per_caption", type=flag, default="0", help="scores of each caption, worst first, or in --output")
    p.add_argument("--compare", metavar="OTHER.json", help="predictions of another system: test the difference")
    p.add_argument("--bootstrap", type=positive, default=1000, help="resamples for the intervals")
    p.add_argument("--df", metavar="R.json", help="references to count CIDEr's document frequencies on")
    p.add_argument("--train_captions", metavar="R.json", help="captions trained on: gives the share of novel ones")
    p.add_argument("--seed", type=int, default=123, help="of the resamples")
    return p


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of `caption-score`."""
    opt = parser().parse_args(argv)
    return run("caption-score", lambda: _score(opt))


def _score(opt: argparse.Namespace) -> None:
    from captioner.metrics import Scores, report, score, tokenise_groups
    from captioner.metrics.diversity import diversity
    from captioner.metrics.pairing import join, read_predictions, read_references
    from captioner.metrics.significance import bootstrap_intervals, compare

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

    def measure(pairs: "Sequence[Pair]") -> Scores:
        return score(
            [prediction.caption for prediction, _ in pairs],
            [reference.captions for _, reference in pairs],
            metrics=metrics,
            tokenizer=opt.tokenizer,
            df_references=df_references,
        )

    scores = measure(pairs)
    intervals = bootstrap_intervals(scores.measures, num_samples=opt.bootstrap, seed=opt.seed)
    known = chain.from_iterable(tokenise_groups(training, opt.tokenizer)) if training else None
    figures = diversity(scores.tokenised, known)
    print(f"{len(pairs):,} images, joined by {joined.by}; tokenizer {opt.tokenizer}")
    print("\n".join(report.score_lines(scores, intervals)))
    print(report.diversity_line(figures))
    written = report.as_json(joined, scores, intervals, figures)
    written["options"] = {name: getattr(opt, name) for name in ("tokenizer", "bootstrap", "seed", "df")}
    if opt.compare:
        other = measure(others)
        comparisons = compare(scores.measures, other.measures, num_samples=opt.bootstrap, seed=opt.seed)
        print(f"compared with {opt.compare}")
        print("\n".join(report.comparison_lines(other, comparisons)))
        written["compare"] = {"predictions": opt.compare, **report.comparison_as_json(other, comparisons)}
    if opt.per_caption and scores.measures:
        rows = report.per_caption_rows(pairs, scores)
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


if __name__ == "__main__":
    raise SystemExit(main())
