"""caption-prepro: pictures and captions → a dataset (h5 and json)."""

import argparse
import hashlib
import json
import logging
import random
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from captioner.cli.options import Parser, flag, non_negative, positive, run
from captioner.errors import InputError

log = logging.getLogger(__name__)


def build_parser() -> argparse.ArgumentParser:
    p = Parser(prog="caption-prepro", description="Turn pictures and captions into a dataset for caption-train.")
    p.add_argument("--input_json", required=True, help="description of pictures and captions, or a folder of them")
    p.add_argument("--num_val", required=True, type=non_negative, help="images of the validation split")
    p.add_argument("--output_json", default="data.json", help="the dataset's json file")
    p.add_argument("--output_h5", default="data.h5", help="the dataset's h5 file")
    p.add_argument("--max_length", default=16, type=positive, help="words of a caption; longer ones are cut")
    p.add_argument("--images_root", default="", help="folder that the paths of the pictures are relative to")
    p.add_argument("--word_count_threshold", default=5, type=non_negative, help="words seen so often or less: UNK")
    p.add_argument("--num_test", default=0, type=non_negative, help="images of the test split")
    p.add_argument("--on_error", default="skip", choices=("skip", "fail"), help="what an unreadable picture does")
    p.add_argument("--num_workers", type=non_negative, help="processes that read pictures (default: one per CPU)")
    p.add_argument("--resume", default=True, type=flag, metavar="0|1", help="continue an interrupted run")
    p.add_argument("--seed", default=123, type=int, help="of the random splits")
    return p


def main(argv: Sequence[str] | None = None) -> int:
    opt = build_parser().parse_args(argv)
    return run("caption-prepro", lambda: prepare(opt))


def prepare(opt: argparse.Namespace) -> None:
    from captioner.dataset import encode_labels, finish_h5, write_dataset_json
    from captioner.prepare import PartialPixels, fill, require_disk_space
    from captioner.rawdata import read_records
    from captioner.reading import available_cpus
    from captioner.text import Vocab, tokenise

    records = read_records(opt.input_json, opt.images_root)
    h5_path, json_path = Path(opt.output_h5), Path(opt.output_json)
    paths = [str(Path(opt.images_root, record.file_path)) for record in records]
    workers = available_cpus() if opt.num_workers is None else opt.num_workers
    require_disk_space(h5_path.parent, len(records), sum(len(r.captions) for r in records), opt.max_length)
    with PartialPixels(h5_path, paths, opt.resume) as partial:
        for index, reason in fill(partial, paths, workers):
            log.warning("skipped %s: %s", paths[index], reason)
        skipped = [
            {"file_path": r.file_path, "reason": reason}
            for r, reason in zip(records, partial.reasons, strict=True)
            if reason is not None
        ]
        kept = [r for r, reason in zip(records, partial.reasons, strict=True) if reason is None]
        if not kept:
            raise InputError("no picture could be read")
        splits = assign_splits(kept, opt.num_val, opt.num_test, opt.seed)
        captions = [[tokenise(caption) for caption in record.captions] for record in kept]
        counts = Counter(token for of_image in captions for tokens in of_image for token in tokens)
        vocab = Vocab.build(counts, opt.word_count_threshold)
        arrays = encode_labels(captions, vocab, opt.max_length)
        info = []
        for record, split in zip(kept, splits, strict=True):
            entry = {"split": split, "file_path": record.file_path}
            if record.id is not None:
                entry["id"] = record.id
            if split != "train":
                entry["captions"] = record.captions
            info.append(entry)
        fingerprint = hashlib.sha256(json.dumps([vocab.words, info]).encode() + arrays[0].tobytes()).hexdigest()
        finish_h5(partial.pixels_path, len(kept), *arrays, fingerprint)
        write_dataset_json(json_path, vocab, info, fingerprint, skipped=skipped)
        partial.publish(h5_path)
    print(f"wrote {h5_path} and {json_path}: {len(kept)} images, {len(arrays[0])} captions, {vocab.size} words")


def assign_splits(records: Sequence, num_val: int, num_test: int, seed: int) -> list[str]:
    if records[0].split:
        return [record.split for record in records]
    order = list(range(len(records)))
    random.Random(seed).shuffle(order)
    splits = ["train"] * len(records)
    for place, index in enumerate(order[: num_val + num_test]):
        splits[index] = "val" if place < num_val else "test"
    return splits


if __name__ == "__main__":
    sys.exit(main())
