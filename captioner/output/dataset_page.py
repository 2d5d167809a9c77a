"""A data set on the page, before training or as prepared: pictures with their captions, splits, rare words, doubles.

Besides what `page` writes there is
    words.json    [[word, how often, 1 if it is in the vocabulary, 0 if it becomes UNK], ..], the most frequent first
and in about.json "findings": [{"text": .., "show": a filter of the page}, ..]; rows have "captions", "split" and, where
pictures look the same, "duplicates": a number that they share.
"""

import contextlib
import json
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from captioner.data.captioned import CaptionedPicture
from captioner.data.dataset import Dataset
from captioner.data.options import DatasetOptions
from captioner.data.splits import assign_splits
from captioner.data.statistics import count_words
from captioner.data.vocabulary import UNK, Vocab
from captioner.output.page import VisWriter, sole_writer
from captioner.output.page_files import write_data_script
from captioner.output.results import Row
from captioner.runtime.files import atomic_write

WORDS = "words.json"
AT_ONCE = 64  # pictures copied at a time


def write_dataset_page(
    folder: Path,
    pictures: Sequence[CaptionedPicture],
    report: dict[str, Any],
    options: DatasetOptions,
    title: str,
    overwrite: bool = False,
) -> Path:
    """Write the page of pictures and captions that `data.check.check` has looked at.

    Args:
        pictures: all of them, in the order in which `report` knows them; unreadable ones are named and not shown.
        report: from `check`, called with the same options.
        overwrite: whether files in the folder that are not ours may be replaced.

    Returns:
        The path of index.html.

    Raises:
        InputError: a file cannot be written.
    """
    unreadable = {entry["file_path"] for entry in report["unreadable"]}
    kept = [picture for picture in pictures if picture.file_path not in unreadable]
    splits = assign_splits(kept, options.num_val, options.num_test, options.seed)
    groups = _groups(report["duplicates"])

    def rows(page: VisWriter) -> Iterator[Row]:
        for first in tqdm(range(0, len(kept), AT_ONCE), desc="page", disable=None):
            some = range(first, min(first + AT_ONCE, len(kept)))
            copied = page.add_pictures([(place + 1, Path(kept[place].path)) for place in some])
            for place, copy in zip(some, copied, strict=True):
                picture = kept[place]
                row: dict[str, object] = {
                    "image_id": place + 1 if picture.id is None else picture.id,
                    "file_name": picture.file_path,
                    "captions": picture.captions,
                    "split": splits[place],
                    **copy,
                }
                if picture.file_path in groups:
                    row["duplicates"] = groups[picture.file_path]
                yield row

    counts = count_words(picture.words for picture in kept)
    vocab = Vocab.build(counts, options.word_count_threshold, options.tokenizer)
    with _writer(folder, overwrite) as page:
        return _finish(page, rows(page), title, counts, vocab.words, _findings(report))


def write_prepared_page(folder: Path, dataset: Dataset, *, title: str, overwrite: bool = False) -> Path:
    """Write the page of a prepared dataset: its pictures as the network sees them, and its captions.

    Captions of training images are what the dataset holds of them: split into words, cut, rare words as UNK.

    Returns:
        The path of index.html.

    Raises:
        InputError: a file cannot be written.
    """
    dataset.require_whole_file()

    def rows(page: VisWriter) -> Iterator[Row]:
        for first in tqdm(range(0, len(dataset.info), AT_ONCE), desc="page", disable=None):
            some = range(first, min(first + AT_ONCE, len(dataset.info)))
            copied = page.add_pictures([(place + 1, np.asarray(dataset.images[place])) for place in some])
            for place, copy in zip(some, copied, strict=True):
                info = dataset.info[place]
                yield {
                    "image_id": info.get("id", place + 1),
                    "file_name": str(info.get("file_path", "")),
                    "captions": dataset.references_of(place),
                    "split": info["split"],
                    **copy,
                }

    counts = dict(zip(dataset.vocab.words, dataset.word_counts(), strict=True))
    unknown = counts.pop(UNK, 0)
    findings = []
    if unknown:
        share = unknown / (unknown + sum(counts.values()))
        findings.append({"text": f"Words that became {UNK}: {unknown:,} ({share:.1%})", "show": "unk"})
    with _writer(folder, overwrite) as page:
        return _finish(page, rows(page), title, counts, dataset.vocab.words, findings)


@contextlib.contextmanager
def _writer(folder: Path, overwrite: bool) -> Iterator[VisWriter]:
    with sole_writer(folder):
        page = VisWriter(folder, overwrite)
        page.claim([WORDS, f"{WORDS}.js"])
        yield page


def _finish(
    page: VisWriter,
    rows: Iterator[Row],
    title: str,
    counts: Mapping[str, int],
    known: Collection[str],
    findings: Iterable[dict[str, str]],
) -> Path:
    vocabulary = set(known)
    ordered = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    with atomic_write(page.folder / WORDS, "w", encoding="utf-8") as stream:
        json.dump([[word, count, int(word in vocabulary)] for word, count in ordered], stream, ensure_ascii=False)
    write_data_script(page.folder / WORDS)
    about = {
        "title": title,
        "date": datetime.now().astimezone().isoformat(timespec="seconds"),
        "words": True,
        "findings": list(findings),
    }
    return page.finish(rows, {}, about)


def _groups(duplicates: Sequence[dict[str, Any]]) -> dict[str, int]:
    """A number per set of pictures that look the same; each entry names an earlier picture."""
    groups: dict[str, int] = {}
    for entry in duplicates:
        number = groups.setdefault(entry["same_as"], len(groups) + 1)
        groups[entry["file_path"]] = number
    return groups


def _findings(report: dict[str, Any]) -> Iterator[dict[str, str]]:
    def names(entries: Sequence[str]) -> str:
        return ", ".join(entries[:5]) + (f" and {len(entries) - 5:,} more" if len(entries) > 5 else "")

    if report["duplicates"]:
        across = report["duplicates_across_splits"]
        text = f"There twice: {len(report['duplicates']):,}; in two splits: {across:,}"
        yield {"text": text, "show": "duplicates"}
    for key, title in (
        ("unreadable", "Cannot be read"),
        ("misnamed", "Not what the file's name says"),
        ("same_file_twice", "Named more than once"),
        ("duplicate_ids", "With the id of another picture"),
        ("empty_captions", "Captions without a word"),
        ("without_captions", "Without a caption"),
    ):
        entries = [entry["file_path"] if isinstance(entry, dict) else str(entry) for entry in report[key]]
        if entries:
            yield {"text": f"{title}: {len(entries):,} ({names(entries)})"}
