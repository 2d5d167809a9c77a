"""A look at pictures and captions before a dataset is made of them: what cannot be used, what is there twice, words."""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from captioner.data.build import dataset_bytes, read_with_progress
from captioner.data.captioned import CaptionedPicture, read_captioned
from captioner.data.decode_pool import available_cpus
from captioner.data.images import misnamed
from captioner.data.near_duplicates import Thumbnails
from captioner.data.options import DatasetOptions
from captioner.data.pixel_statistics import PixelStatistics
from captioner.data.splits import assign_splits
from captioner.data.statistics import count_words, describe, statistics
from captioner.data.vocabulary import Vocab
from captioner.runtime.quantities import bytes_text

# For the estimate, as measured on Linux (bench/prepro.py).
_MEMORY_PER_PROCESS = 180_000_000
_MEMORY_PER_CAPTION = 370

_SHOWN = 20  # names per list of the text; the report has them all


def check(
    inputs: Sequence[str],
    images_roots: Sequence[str],
    options: DatasetOptions,
    pixels: PixelStatistics,
    num_workers: int | None = None,
) -> dict[str, Any]:
    """Read everything and report what a dataset of it would be.

    Args:
        inputs, images_roots, num_workers: as of `prepare`.
        pixels: the pictures are added to it.

    Returns:
        The report, of plain types; see `report_text`.

    Raises:
        InputError: an input is at fault as a whole.
    """
    pictures, findings = read_captioned(inputs, images_roots, options.tokenizer)
    workers = available_cpus() if num_workers is None else num_workers
    thumbnails = Thumbnails()
    unreadable, wrong_names = [], []
    kept: list[CaptionedPicture] = []
    began = time.monotonic()
    for index, result in enumerate(
        read_with_progress([picture.path for picture in pictures], workers, image_mode=options.image_mode)
    ):
        name = pictures[index].file_path
        if isinstance(result, str):
            unreadable.append({"file_path": name, "reason": result})
            continue
        thumbnails.add(len(kept), result)
        pixels.add(result)
        kept.append(pictures[index])
        content = misnamed(Path(pictures[index].path))
        if content:
            wrong_names.append({"file_path": name, "content": content})
    seconds = time.monotonic() - began

    splits = assign_splits(kept, options.num_val, options.num_test, options.seed)
    same = [
        {
            "file_path": kept[pair.second].file_path,
            "split": splits[pair.second],
            "same_as": kept[pair.first].file_path,
            "same_as_split": splits[pair.first],
            "exact": pair.exact,
        }
        for pair in thumbnails.pairs()
    ]
    words = [picture.words for picture in kept]
    counts = count_words(words)
    vocab = Vocab.build(counts, options.word_count_threshold, options.tokenizer)
    figures = statistics(words, splits, counts, vocab, options.max_length)
    return {
        "readable": len(kept),
        "unreadable": unreadable,
        "misnamed": wrong_names,
        "duplicates": same,
        "duplicates_across_splits": sum(entry["split"] != entry["same_as_split"] for entry in same),
        **vars(findings),
        "statistics": figures,
        "pixels": pixels.figures(),
        "estimate": {
            "dataset_bytes": dataset_bytes(len(kept), figures["captions"], options.max_length),
            "memory_bytes": _MEMORY_PER_PROCESS * (workers + 1)
            + _MEMORY_PER_CAPTION * sum(len(picture.captions) for picture in pictures),
            "seconds": round(seconds, 1),
            "images_per_second": round(len(pictures) / max(seconds, 1e-9), 1),
        },
    }


def report_text(report: dict[str, Any], max_length: int) -> str:
    """The report to read."""
    lines: list[str] = []

    def section(title: str, names: Sequence[str]) -> None:
        if names:
            lines.append(f"{len(names):,} {title}")
            lines.extend(f"  {name}" for name in names[:_SHOWN])
            if len(names) > _SHOWN:
                lines.append(f"  .. and {len(names) - _SHOWN:,} more (see --output)")

    section("shards are damaged", [f"{entry['file_path']}: {entry['reason']}" for entry in report["damaged_shards"]])
    section("pictures cannot be read", [f"{entry['file_path']}: {entry['reason']}" for entry in report["unreadable"]])
    section("files are not what their names say", [f"{e['file_path']}: is {e['content']}" for e in report["misnamed"]])
    for across, title in ((True, "pictures are in two splits"), (False, "pictures are there twice in one split")):
        section(
            title,
            [
                f"{entry['file_path']} ({entry['split']}) is {'' if entry['exact'] else 'nearly '}"
                f"{entry['same_as']} ({entry['same_as_split']})"
                for entry in report["duplicates"]
                if (entry["split"] != entry["same_as_split"]) is across
            ],
        )
    section("pictures named more than once, to be joined", report["same_file_twice"])
    section("pictures with the id of another one", report["duplicate_ids"])
    section("captions without a word", report["empty_captions"])
    section("pictures without a caption", report["without_captions"])
    if not lines:
        lines.append("nothing wrong with the pictures")
    figures, estimate = report["statistics"], report["estimate"]
    lines.append(describe(figures, max_length))
    lines.append("threshold   " + " ".join(f"{threshold:>7}" for threshold in figures["unk_share_at_threshold"]))
    lines.append("  words     " + " ".join(f"{number:7,}" for number in figures["vocabulary_at_threshold"].values()))
    lines.append("  UNK       " + " ".join(f"{share:7.2%}" for share in figures["unk_share_at_threshold"].values()))
    if report["pixels"]:
        mean, deviation = (
            ", ".join(f"{value:.3f}" for value in report["pixels"][name]) for name in ("mean", "standard_deviation")
        )
        lines.append(f"pixels      mean of red, green, blue {mean}; standard deviation {deviation} (0 to 255)")
    lines.append(
        f"to prepare  {bytes_text(estimate['dataset_bytes'])} on disk, {bytes_text(estimate['memory_bytes'])} of"
        f" memory, about {max(1, round(estimate['seconds'])):,} s ({estimate['images_per_second']:,.0f} images/s)"
    )
    return "\n".join(lines)
