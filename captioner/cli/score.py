"""caption-score: predictions against what people said, or given captions by what a model thinks of them."""

import argparse
import dataclasses
import json
import logging
import math
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from captioner.cli.options import (
    Parser,
    Range,
    add_overwrite,
    add_precision,
    all_or_some,
    flag,
    gpu_number,
    images_at_once,
    positive,
    run,
    seed_number,
    workers,
)
from captioner.cli.score_predictions import score_predictions
from captioner.errors import InputError, printable
from captioner.runtime.files import atomic_write

if TYPE_CHECKING:  # numpy and torch are imported late, so that --help and argument errors are instant
    from captioner.data.batch import Batch
    from captioner.inference.find import PhotoSearch, Query
    from captioner.inference.sources import FileSource
    from captioner.metrics.pairing import Reference
    from captioner.output.rows import LikelihoodRow

log = logging.getLogger(__name__)

Item = TypeVar("Item")
RECALL_AT = (1, 5, 10)


def build_parser() -> Parser:
    """The command's options."""
    p = Parser(
        prog="caption-score",
        description="Score captions against references: BLEU, METEOR, ROUGE_L, CIDEr and SPICE as coco-caption's. "
        "Images are joined by file name or image id. METEOR, SPICE and --tokenizer ptb need Java and the extra "
        "`metrics`; what cannot run is skipped. Or, with --images and --captions: log p(caption | image). Or, with "
        "--images and --query: the photos that suit a text best.",
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
        "--view",
        metavar="FOLDER",
        help="with --compare: show both on the page in this folder, side by side; with --query: show what is found",
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
    g.add_argument("--query", nargs="+", default=[], metavar="TEXT", help="find photos by words; -: lines of stdin")
    g.add_argument("--top", type=positive, default=20, help="photos to show for each text")
    g.add_argument("--recursive", type=flag, default="0", help="with --query: photos in subfolders, too")
    g.add_argument(
        "--recall",
        type=all_or_some,
        metavar="N",
        help="use N of --captions (-1: all) as texts, and say how often the photo is among the first 1, 5 and 10",
    )
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
    if all(against) and not any((*by_model, *opt.model, *opt.query)):
        return run("caption-score", lambda: score_predictions(opt))
    if all(by_model) and not any((*against, *opt.query)):
        return run("caption-score", lambda: _recall(opt) if opt.recall else _rate(opt))
    if opt.images and opt.query and not any((*against, opt.captions)):
        return run("caption-score", lambda: _find(opt))
    return p.error("give --predictions with --references, --images with --captions, or --images with --query")


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


def _recall(opt: argparse.Namespace) -> None:
    """How well known captions find their photos."""
    from captioner.inference.sources import FileSource

    described = _with_files(opt.captions, Path(opt.images))
    source = FileSource([(file, {"id": known.image_id, "file_path": known.name}) for file, known in described])
    scores = _measure_recall(opt, source, [known.captions for _, known in described])
    if opt.output:
        with atomic_write(opt.output, "w", encoding="utf-8") as stream:
            json.dump(scores, stream, indent=1)
            stream.write("\n")


def _with_files(captions: str, folder: Path) -> "list[tuple[Path, Reference]]":
    """Each described image with its file: by its path in the folder, or by its name alone where only that exists.

    Raises:
        InputError: no such folder, or an image without a file name.
    """
    from captioner.metrics.pairing import read_references

    if not os.path.isdir(folder):
        raise InputError(f"{folder}: is no folder", expected="the folder of the pictures")
    described = []
    for reference in read_references(captions):
        if not reference.name:
            raise InputError(
                f"{captions}: image {reference.label} has no file name", expected='"file_path" of each image'
            )
        path = folder / reference.name
        beside = folder / path.name
        described.append((beside if os.path.isfile(beside) and not os.path.isfile(path) else path, reference))
    return described


def _find(opt: argparse.Namespace) -> None:
    """The photos that suit each text best: to stdout, to --output, and as a page to --view."""
    from captioner.inference.sources import open_folder
    from captioner.output.page import VisWriter, sole_writer
    from captioner.output.results import require_known_suffix, write_results

    if opt.output:
        require_known_suffix(Path(opt.output))
    if opt.view and (len(opt.query) > 1 or opt.query == ["-"]):
        raise InputError("--view shows what one text finds", remedy="give one --query")
    if opt.view:
        VisWriter(opt.view, opt.overwrite)  # refuses now
    source = open_folder(opt.images, opt.recursive, -1)
    photos = _open_search(opt, source, [text for text in opt.query if text != "-"])
    rows: list[LikelihoodRow] = []
    for text in _queries(opt.query):
        try:
            query = photos.query(text)
        except InputError as error:  # one of stdin; those of the command line are known to be good
            log.warning("%s", error)
            continue
        found = _found_rows(photos, source, text, query, opt.top)
        rows += found
        print(f"{'gain':>8}  {'logprob':>8}  {printable(text)}")
        for row in found:
            print(f"{row['gain']:>8.2f}  {row['logprob']:>8.2f}  {printable(str(row['file_name']))}", flush=True)
    if opt.output:
        write_results(Path(opt.output), rows)
    if opt.view:
        with sole_writer(opt.view):
            page = VisWriter(opt.view, opt.overwrite)
            path_of = {info["file_path"]: path for path, info in source.files}
            pictures = page.add_pictures([(row["image_id"], path_of[row["file_name"]]) for row in rows])
            shown = [{**row, **picture} for row, picture in zip(rows, pictures, strict=True)]
            log.info("page: %s", page.finish(shown, {}, {"title": opt.query[0], "pictures": True}))


def _measure_recall(
    opt: argparse.Namespace, source: "FileSource", captions: Sequence[Sequence[str]]
) -> dict[str, float]:
    """How often the photo that a known caption is about comes among the first 1, 5 and 10, in shares.

    Args:
        captions: of each photo of the source.
    """
    import numpy as np

    photos = _open_search(opt, source)
    known = [(position, text) for position in photos.positions for text in captions[position]]
    if not known:
        raise InputError(f"{opt.captions}: has no captions of photos that can be read")
    count = len(known) if opt.recall < 0 else min(opt.recall, len(known))
    chosen = [known[round(number * len(known) / count)] for number in range(count)]  # evenly spread
    ranks = [_rank(photos, position, text) for position, text in _progress(chosen, " captions")]
    scores = {f"R@{most}": float(np.mean([rank <= most for rank in ranks])) for most in RECALL_AT}
    scores["median_rank"] = float(np.median(ranks))
    print(f"{count:,} captions, each searched among {len(photos.positions):,} photos")
    print("  ".join(f"{name} {100 * scores[name]:.1f} %" for name in scores if name != "median_rank"), end="")
    print(f"  median rank {scores['median_rank']:g}")
    return scores


def _rank(photos: "PhotoSearch", position: int, text: str) -> int:
    try:
        query = photos.query(text)
    except InputError:  # no word that the model knows
        return len(photos.positions)
    return photos.rank(query, position)


def _open_search(opt: argparse.Namespace, source: "FileSource", texts: Sequence[str] = ()) -> "PhotoSearch":
    """A search among the photos of a source, ready for texts.

    Args:
        texts: some that are looked at before the photos are, which takes long.

    Raises:
        InputError: no photo can be read, or the model knows no word of a text.
    """
    from captioner.data.batches import shares
    from captioner.inference.find import PhotoSearch, digests_of
    from captioner.inference.load import load_models
    from captioner.inference.model import Model
    from captioner.inference.sources import FileSource
    from captioner.runtime.device import choose_device
    from captioner.runtime.files import cache_folder
    from captioner.runtime.memory import keep_freed_memory

    keep_freed_memory()
    checkpoints = load_models(opt.model)
    model = Model(checkpoints, choose_device(opt.gpuid), opt.precision, calibration=source)
    photos = PhotoSearch(model.captioner, digests_of(checkpoints, model.captioner.arithmetic), cache_folder())
    for text in texts:
        photos.query(text)

    def batches(positions: Sequence[int]) -> "Iterator[Batch]":
        log.info("%s photos are new and looked at", f"{len(positions):,}")
        new = FileSource([source.files[position] for position in positions])
        groups = list(shares(len(new), opt.batch_size, 0, 1))
        for batch in _progress(new.batches(groups, opt.num_workers, model.image_mode), " batches", len(groups)):
            for _, reason in batch.skipped:
                log.warning("skipped %s", reason)
            yield dataclasses.replace(batch, positions=[positions[place] for place in batch.positions])

    photos.open([path for path, _ in source.files], batches)
    if not photos.positions:
        raise InputError(f"{opt.images}: none of the {len(source):,} pictures could be read")
    return photos


def _found_rows(
    photos: "PhotoSearch", source: "FileSource", text: str, query: "Query", top: int
) -> "list[LikelihoodRow]":
    """One row for each of the best photos; `rank` is that among them."""
    from captioner.output.rows import likelihood_rows

    rows = []
    if query.unknown:
        log.warning("%s: the model does not know %s%s; searched without", text, ", ".join(query.unknown), query.hint)
    for rank, found in enumerate(photos.find(query)[:top], start=1):
        info = source.files[found.position][1]
        (row,) = likelihood_rows(info["id"], info["file_path"], [text], [found.likelihood])
        row["rank"] = rank
        rows.append(row)
    return rows


def _queries(given: Sequence[str]) -> Iterator[str]:
    """The texts of --query; "-" are the lines of stdin, as they come."""
    for text in given:
        if text == "-":
            yield from (line.strip() for line in sys.stdin if line.strip())
        else:
            yield text


def _progress(items: "Iterable[Item]", unit: str, total: int | None = None) -> "Iterable[Item]":
    """A bar on a terminal."""
    from tqdm import tqdm

    bar: Iterable[Item] = tqdm(items, total=total, unit=unit, disable=None)
    return bar


if __name__ == "__main__":
    raise SystemExit(main())
