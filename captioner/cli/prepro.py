"""caption-prepro: pictures and captions → a dataset (h5 and json)."""

import argparse
import json
import logging
import time
from array import array
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from captioner.cli.options import Parser, flag, non_negative, run, seed_number, words, workers
from captioner.errors import InputError

if TYPE_CHECKING:
    from captioner.data.caption_file import CaptionFile
    from captioner.data.clean import Findings, Picture

log = logging.getLogger(__name__)

# For the estimate of --check, as measured on Linux (bench/prepro.py).
_MEMORY_PER_PROCESS = 180_000_000
_MEMORY_PER_CAPTION = 150

_SHOWN = 20  # names per list of the text that --check prints; --output has them all


def build_parser() -> argparse.ArgumentParser:
    p = Parser(prog="caption-prepro", description="Turn pictures and captions into a dataset for caption-train.")
    p.add_argument(
        "--input_json",
        required=True,
        help="pictures and captions: the original's JSON, Karpathy's, COCO's, JSONL, CSV/TSV, Flickr8k .token,"
        " or a folder of photo.jpg + photo.txt",
    )
    p.add_argument("--num_val", required=True, type=non_negative, help="images of the validation split")
    p.add_argument("--output_json", default="data.json", help="the dataset's json file")
    p.add_argument("--output_h5", default="data.h5", help="the dataset's h5 file")
    p.add_argument("--max_length", default=16, type=words, help="words of a caption; longer ones are cut")
    p.add_argument("--images_root", default="", help="folder that the paths of the pictures start from")
    p.add_argument("--word_count_threshold", default=5, type=non_negative, help="words seen so often or less are UNK")
    p.add_argument("--num_test", default=0, type=non_negative, help="images of the test split")
    p.add_argument(
        "--tokenizer",
        default="ascii",
        choices=("ascii", "unicode", "ptb"),
        help="how captions become words: "
        "ascii is the original's rule (tshirt), unicode is for any language, ptb is how scores read them (t-shirt)",
    )
    p.add_argument("--on_error", default="skip", choices=("skip", "fail"), help="what to do at an unreadable picture")
    p.add_argument("--num_workers", type=workers, help="processes that read pictures (default: one per CPU)")
    p.add_argument("--resume", default=True, type=flag, help="continue an interrupted run")
    p.add_argument("--seed", default=123, type=seed_number, help="of the random splits")
    p.add_argument("--check", default=False, type=flag, help="only look and report, write no dataset")
    p.add_argument("--output", default="", help="with --check 1: write the report to this JSON file")
    return p


def main(argv: Sequence[str] | None = None) -> int:
    opt = build_parser().parse_args(argv)
    return run("caption-prepro", lambda: check(opt) if opt.check else prepare(opt))


def prepare(opt: argparse.Namespace) -> None:
    """Write the dataset: tidy the records, read the pictures, then decide splits and words over what survived."""
    from captioner.data.build import PartialPixels, fill, require_disk_space
    from captioner.data.caption_file import Tokenised
    from captioner.data.dataset import encode_labels, fingerprint_of, finish_h5, write_dataset_json
    from captioner.data.splits import assign_splits
    from captioner.data.statistics import count_words, describe, statistics
    from captioner.data.vocabulary import Vocab

    h5_path, json_path = output_paths(opt)
    root, pictures, captions, findings = read_input(opt, h5_path.parent)
    report_findings(findings)
    skipped = [{"file_path": name, "reason": "has no caption"} for name in findings.without_captions]
    if not pictures:
        raise InputError(f"{opt.input_json}: no picture has a caption")
    paths = [str(root / picture.file_path) for picture in pictures]
    require_disk_space(h5_path, len(pictures), captions.num_captions, opt.max_length)

    with PartialPixels(h5_path, paths, opt.resume) as partial:
        for index, reason in fill(partial, num_workers(opt)):
            if opt.on_error == "fail":
                raise InputError(f"{paths[index]}: {reason}", remedy="repair it, or leave out --on_error fail")
            log.warning("skipped %s: %s", paths[index], reason)
            skipped.append({"file_path": pictures[index].file_path, "reason": reason})
        kept = array("q", (index for index, reason in enumerate(partial.reasons) if reason is None))
        if not kept:
            partial.discard()
            raise InputError(
                f"{opt.input_json}: none of its {len(pictures)} pictures could be read",
                remedy=f"are they in {root.absolute()}? See --images_root",
            )
        words = Tokenised(captions, kept, opt.tokenizer)
        splits = assign_splits([pictures[index] for index in kept], opt.num_val, opt.num_test, opt.seed)
        counts = count_words(words)
        vocab = Vocab.build(counts, opt.word_count_threshold, opt.tokenizer)
        arrays = encode_labels(words, vocab, opt.max_length)
        figures = statistics(words, splits, counts, vocab, opt.max_length)

        def info() -> Iterator[dict[str, Any]]:
            for index, split in zip(kept, splits, strict=True):
                yield image_info(pictures[index], split, captions[index])

        fingerprint = fingerprint_of(vocab, info(), arrays[0])
        finish_h5(partial.pixels_path, len(kept), *arrays, fingerprint)
        write_dataset_json(json_path, vocab, info(), fingerprint, statistics=figures, skipped=skipped)
        partial.publish(h5_path)
    print(describe(figures, opt.max_length))
    if skipped:
        print(f'skipped     {len(skipped):,} pictures; see "skipped" in {json_path}')
    print(f"wrote       {h5_path} and {json_path}")


def output_paths(opt: argparse.Namespace) -> tuple[Path, Path]:
    """Where the dataset goes, proven to be writable and not to be the input."""
    from captioner.runtime.files import require_writable_folder

    h5_path, json_path = Path(opt.output_h5), Path(opt.output_json)
    if opt.output:
        raise InputError("--output is for the report of --check 1", remedy="see --output_h5 and --output_json")
    if h5_path.absolute() == json_path.absolute():
        raise InputError(f"--output_h5 and --output_json are both {h5_path}", expected="two files")
    for path in (h5_path, json_path):
        if path.is_dir():
            raise InputError(f"{path}: is a folder", expected="the name of a file")
        require_writable_folder(path.parent, "the dataset")
        if path.exists() and Path(opt.input_json).exists() and path.samefile(opt.input_json):
            raise InputError(f"{path}: is the input, which the dataset would overwrite", remedy="name another output")
    return h5_path, json_path


def read_input(
    opt: argparse.Namespace, folder: Path | None = None
) -> tuple[Path, "list[Picture]", "CaptionFile", "Findings"]:
    """The folder that paths start from, the pictures with captions, these captions (kept in a file in `folder`), and
    what was odd."""
    from captioner.data.clean import clean_records
    from captioner.data.records import find_images_root, stream_records

    pictures, captions, findings = clean_records(stream_records(opt.input_json, opt.images_root), opt.tokenizer, folder)
    if pictures and pictures[0].split is not None and opt.num_val + opt.num_test > 0:
        log.info("%s says what is train, val and test: --num_val and --num_test do not apply", opt.input_json)
    root = find_images_root(opt.input_json, [picture.file_path for picture in pictures[:20]], opt.images_root)
    if not opt.images_root and root != Path():
        log.info("taking pictures from %s", root)
    return root, pictures, captions, findings


def report_findings(findings: "Findings") -> None:
    for line in findings.lines():
        log.warning("%s", line)


def num_workers(opt: argparse.Namespace) -> int:
    from captioner.data.decode_pool import available_cpus

    return available_cpus() if opt.num_workers is None else opt.num_workers


def image_info(picture: "Picture", split: str, captions: list[str]) -> dict[str, Any]:
    """The json's entry of one picture. Those of val and test carry their captions, to score against."""
    info: dict[str, Any] = {"split": split, "file_path": picture.file_path}
    if picture.id is not None:
        info["id"] = picture.id
    if split != "train":
        info["captions"] = captions
    return info


def check(opt: argparse.Namespace) -> None:
    """What --check does: read everything, report, write no dataset."""
    from captioner.data.build import dataset_bytes, read_with_progress
    from captioner.data.caption_file import Tokenised
    from captioner.data.images import misnamed
    from captioner.data.near_duplicates import Fingerprints
    from captioner.data.splits import assign_splits
    from captioner.data.statistics import count_words, statistics
    from captioner.data.vocabulary import Vocab
    from captioner.runtime.files import atomic_write

    root, pictures, captions, findings = read_input(opt)
    paths = [root / picture.file_path for picture in pictures]
    fingerprints = Fingerprints()
    unreadable, wrong_names, kept = [], [], []
    began = time.monotonic()
    for index, result in enumerate(read_with_progress([str(path) for path in paths], num_workers(opt))):
        if isinstance(result, str):
            unreadable.append({"file_path": pictures[index].file_path, "reason": result})
            continue
        kept.append(index)
        fingerprints.add(index, result)
        content = misnamed(paths[index])
        if content:
            wrong_names.append({"file_path": pictures[index].file_path, "content": content})
    seconds = time.monotonic() - began
    memory = _MEMORY_PER_PROCESS * (num_workers(opt) + 1) + _MEMORY_PER_CAPTION * captions.num_captions

    splits = dict(
        zip(kept, assign_splits([pictures[i] for i in kept], opt.num_val, opt.num_test, opt.seed), strict=True)
    )
    same = [
        {
            "file_path": pictures[pair.second].file_path,
            "split": splits[pair.second],
            "same_as": pictures[pair.first].file_path,
            "same_as_split": splits[pair.first],
            "exact": pair.exact,
        }
        for pair in fingerprints.pairs()
    ]
    of_kept = Tokenised(captions, kept, opt.tokenizer)
    counts = count_words(of_kept)
    vocab = Vocab.build(counts, opt.word_count_threshold, opt.tokenizer)
    figures = statistics(of_kept, list(splits.values()), counts, vocab, opt.max_length)
    report: dict[str, Any] = {
        "readable": len(kept),
        "unreadable": unreadable,
        "misnamed": wrong_names,
        "duplicates": same,
        "duplicates_across_splits": sum(entry["split"] != entry["same_as_split"] for entry in same),
        **vars(findings),
        "statistics": figures,
        "estimate": {
            "dataset_bytes": dataset_bytes(len(kept), figures["captions"], opt.max_length),
            "memory_bytes": memory,
            "seconds": round(seconds, 1),
            "images_per_second": round(len(paths) / max(seconds, 1e-9), 1),
        },
    }
    print(report_text(report, opt.max_length))
    if opt.output:
        with atomic_write(opt.output, "w", encoding="utf-8") as stream:
            json.dump(report, stream, indent=1)
    if not kept:
        raise InputError(
            f"{opt.input_json}: none of its {len(pictures) + len(findings.without_captions)} pictures can be used"
        )


def report_text(report: dict[str, Any], max_length: int) -> str:
    """The report of --check to read."""
    from captioner.data.statistics import describe

    lines: list[str] = []

    def section(title: str, names: Sequence[str]) -> None:
        if names:
            lines.append(f"{len(names):,} {title}")
            lines.extend(f"  {name}" for name in names[:_SHOWN])
            if len(names) > _SHOWN:
                lines.append(f"  .. and {len(names) - _SHOWN:,} more (see --output)")

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
    lines.append(
        f"to prepare  {estimate['dataset_bytes'] / 1e9:.2f} GB on disk, {estimate['memory_bytes'] / 1e9:.1f} GB of"
        f" memory, about {max(1, round(estimate['seconds'])):,} s ({estimate['images_per_second']:,.0f} images/s)"
    )
    return "\n".join(lines)


if __name__ == "__main__":
    raise SystemExit(main())
