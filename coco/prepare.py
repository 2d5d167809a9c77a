"""COCO's annotation files → coco_raw.json for caption-prepro, and the list of pictures to download.

    python coco/prepare.py --annotations annotations/captions_val2014.json annotations/captions_train2014.json

joins the files as the original's notebook does. With Karpathy's dataset_coco.json as --splits, each picture gets
his split, and pictures that he leaves out are left out.
"""

import argparse
import dataclasses
import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from captioner.cli.options import Parser, add_overwrite, run
from captioner.data.records import Record, read_records
from captioner.errors import InputError
from captioner.runtime.files import atomic_write

IMAGES_URL = "http://images.cocodataset.org"

_FOLDER = re.compile(r"(?:train|val|test)20\d\d")


def build_parser() -> argparse.ArgumentParser:
    p = Parser(prog="coco/prepare.py", description="Turn COCO's annotations into input for caption-prepro.")
    p.add_argument("--annotations", nargs="+", default=[], help="COCO's captions_*.json files")
    p.add_argument("--splits", default="", help="Karpathy's dataset_coco.json; alone, its captions are used as well")
    p.add_argument("--output", default="coco_raw.json", help="input for caption-prepro")
    p.add_argument("--urls", default="", help="also write this list for caption-download")
    add_overwrite(p)
    return p


def main(argv: Sequence[str] | None = None) -> int:
    opt = build_parser().parse_args(argv)
    return run("coco/prepare.py", lambda: prepare(opt))


def prepare(opt: argparse.Namespace) -> None:
    """Write coco_raw.json, and the list of URLs if asked for."""
    if not opt.annotations and not opt.splits:
        raise InputError("nothing to prepare", remedy="name files with --annotations or --splits")
    if opt.annotations:
        records = [record for path in opt.annotations for record in read_annotations(path)]
        if opt.splits:
            records = with_splits(records, read_records(opt.splits), opt.splits)
    else:
        records = read_records(opt.splits)
    write_json(opt.output, [entry(record) for record in records])
    if opt.urls:
        with atomic_write(opt.urls, "w", encoding="utf-8") as stream:
            stream.writelines(f"{IMAGES_URL}/{record.file_path}\t{record.file_path}\n" for record in records)
    captions = sum(len(record.captions) for record in records)
    print(f"wrote {opt.output}: {len(records):,} images, {captions:,} captions")
    if opt.urls:
        print(f"wrote {opt.urls}; to fetch the pictures: caption-download {opt.urls} --folder images")


def read_annotations(path: str | Path) -> list[Record]:
    """The records of one annotation file, each with the folder of its picture ("val2014/COCO_val2014_..jpg").

    Raises:
        InputError: the file is damaged, or neither its name nor the pictures' names tell the folder.
    """
    records = []
    for record in read_records(path):
        folder = _FOLDER.search(record.file_path) or _FOLDER.search(Path(path).name)
        if folder is None:
            raise InputError(
                f"{path}: cannot tell the folder of {record.file_path}",
                expected="COCO's own file names, such as captions_val2017.json",
            )
        name = PurePosixPath(record.file_path).name
        records.append(dataclasses.replace(record, file_path=f"{folder[0]}/{name}"))
    return records


def with_splits(records: Sequence[Record], described: Sequence[Record], source: str) -> list[Record]:
    """The records that `described` has a split for (by id), with that split.

    Raises:
        InputError: none of them is there.
    """
    splits = {record.id: record.split for record in described}
    kept = [dataclasses.replace(record, split=splits[record.id]) for record in records if record.id in splits]
    if not kept:
        raise InputError(
            f"{source}: has none of the pictures of the annotations", expected="Karpathy's dataset_coco.json"
        )
    return kept


def entry(record: Record) -> dict[str, Any]:
    """One element of coco_raw.json, the original's form."""
    return {name: value for name, value in dataclasses.asdict(record).items() if value is not None}


def write_json(path: str | Path, content: object) -> None:
    with atomic_write(path, "w", encoding="utf-8") as stream:
        json.dump(content, stream)


if __name__ == "__main__":
    sys.exit(main())
