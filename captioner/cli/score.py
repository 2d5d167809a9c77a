"""caption-score: predictions against what people said, or given captions by what a model thinks of them."""

import argparse
import json
import logging
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from captioner.cli.options import (
    Parser,
    Range,
    add_overwrite,
    add_precision,
    flag,
    gpu_number,
    images_at_once,
    run,
    seed_number,
    workers,
)
from captioner.errors import InputError
from captioner.runtime.files import atomic_write

if TYPE_CHECKING:  # numpy and torch are imported late, so that --help and argument errors are instant
    from captioner.data.batch import Batch
    from captioner.metrics.pairing import Joined, Pair, Reference

log = logging.getLogger(__name__)


def build_parser() -> Parser:
    """The command's options."""
    p = Parser(
        prog="caption-score",
        description="Score captions against references: BLEU, METEOR, ROUGE_L, CIDEr and SPICE as coco-caption's. "
        "Images are joined by file name or image id. METEOR, SPICE and --tokenizer ptb need Java and the extra "
        "`metrics`; what cannot run is skipped. Or, with --images and --captions: log p(caption | image).",
    )
    p.add_argument("--output", metavar="S.json", help="also write the scores here")
    add_overwrite(p)
    g = p.add_argument_group("against references")
    g.add_argument("--predictions", metavar="P.json", help="[{image_id or file_name, caption}, ..]")
    g.add_argument("--references", metavar="R.json", help="COCO annotations or any raw data")
    g.add_argument("--metrics", default="all", help="some of Bleu,METEOR,ROUGE_L,CIDEr,SPICE, separated by commas")
    g.add_argument("--tokenizer", choices=("python", "ptb"), default="python", help="ptb: coco-caption's own")
    g.add_argument("--per_caption", type=flag, default="0", help="scores of each caption, worst first, or in --output")
    g.add_argument("--compare", metavar="OTHER.json", help="predictions of another system: test the difference")
    g.add_argument(
        "--view", metavar="FOLDER", help="with --compare: show both on the page in this folder, side by side"
    )
    g.add_argument("--bootstrap", type=Range(int, 1, 10**6), default=1000, help="resamples for the intervals")
    g.add_argument("--df", metavar="R.json", help="references to count CIDEr's document frequencies on")
    g.add_argument("--train_captions", metavar="R.json", help="captions trained on: gives the share of novel ones")
    g.add_argument("--seed", type=seed_number, default=123, help="of the resamples")
    g = p.add_argument_group(
        "by a model, least fitting first",
        "logprob: log p(caption | image); gain: the same minus the log of its mean probability with other pictures",
    )
    g.add_argument("--images", metavar="DIR", help="folder of the pictures")
    g.add_argument("--captions", metavar="F", help="captions by file name, in any form that --references takes")
    g.add_argument("--model", nargs="+", default=[], help="checkpoints, averaged; default: the bundled one")
    g.add_argument(
        "--batch_size", type=images_at_once, default=8, help="images at once; the results do not depend on it"
    )
    g.add_argument("--gpuid", type=gpu_number, default=0, help="GPU to use; -1 is the CPU")
    add_precision(g)
    g.add_argument("--num_workers", type=workers, default=2, help="threads that read and decode pictures")
    return p


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of `caption-score`."""
    p = build_parser()
    opt = p.parse_args(argv)
    against, by_model = (opt.predictions, opt.references), (opt.images, opt.captions)
    if all(against) and not any((*by_model, *opt.model)):
        return run("caption-score", lambda: _score(opt))
    if all(by_model) and not any(against):
        return run("caption-score", lambda: _rate(opt))
    return p.error("give --predictions with --references, or --images with --captions")


def _score(opt: argparse.Namespace) -> None:
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
            address = write_comparison(Path(opt.view), systems, [known.captions for _, known in pairs])
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


def _rate(opt: argparse.Namespace) -> None:
    """log p(caption | image) of every caption: the least fitting first to stdout, in the file's order to --output."""
    from tqdm import tqdm

    from captioner.data.batches import shares
    from captioner.inference.load import load_models
    from captioner.inference.model import Model
    from captioner.inference.sources import FileSource
    from captioner.output.results import require_known_suffix, write_results
    from captioner.output.rows import LikelihoodRow, likelihood_rows
    from captioner.runtime.device import choose_device
    from captioner.runtime.memory import keep_freed_memory

    if opt.output:
        require_known_suffix(Path(opt.output))
    described = _with_files(opt.captions, Path(opt.images))
    keep_freed_memory()
    source = FileSource([(file, {"file_path": reference.name}) for file, reference in described])
    model = Model(load_models(opt.model), choose_device(opt.gpuid), opt.precision, calibration=source)
    groups = list(shares(len(source), opt.batch_size, 0, 1))
    batches = source.batches(groups, opt.num_workers, model.image_mode)
    rows: list[LikelihoodRow] = []

    def readable() -> "Iterator[Batch]":
        for batch in tqdm(batches, total=len(groups), disable=None, unit="batch"):
            for _, reason in batch.skipped:
                log.warning("skipped %s", reason)
            yield batch

    for position, judged in model.likelihoods(readable(), [reference.captions for _, reference in described]):
        reference = described[position][1]
        rows += likelihood_rows(reference.image_id, reference.name, reference.captions, judged)
    if not rows:
        raise InputError(f"{opt.images}: none of the {len(described):,} pictures could be read")
    if opt.output:
        write_results(Path(opt.output), rows)
    print(f"{'gain':>8}  {'logprob':>8}  caption")
    for row in sorted(rows, key=lambda row: -math.inf if row["gain"] is None else row["gain"]):
        gain, logprob = ("-" if row[name] is None else f"{row[name]:.2f}" for name in ("gain", "logprob"))
        print(f"{gain:>8}  {logprob:>8}  {row['caption']}  ({row['file_name']})")


def _with_files(captions: str, folder: Path) -> "list[tuple[Path, Reference]]":
    """Each described image with its file: by its path in the folder, or by its name alone where only that exists.

    Raises:
        InputError: no such folder, or an image without a file name.
    """
    from captioner.metrics.pairing import read_references

    if not folder.is_dir():
        raise InputError(f"{folder}: is no folder", expected="the folder of the pictures")
    described = []
    for reference in read_references(captions):
        if not reference.name:
            raise InputError(
                f"{captions}: image {reference.label} has no file name", expected='"file_path" of each image'
            )
        path = folder / reference.name
        beside = folder / path.name
        described.append((beside if beside.is_file() and not path.is_file() else path, reference))
    return described


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
