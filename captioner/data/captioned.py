"""From records as they were found to the pictures of a dataset: joined, without empty captions and repeated ids.

Here each caption is split into words, once. They stay in memory: 100,000 pictures with five captions each take 185 MB.
"""

import itertools
import logging
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from captioner.data.listing import SHARD_SUFFIXES, require_pyarrow
from captioner.data.parquet_files import is_parquet
from captioner.data.records import Record, find_images_root, stream_records
from captioner.data.tar_files import cut_off_at, is_tar
from captioner.data.tokenizers import tokenise
from captioner.errors import InputError
from captioner.runtime.files import shortest_names

log = logging.getLogger(__name__)

_PROBES = 20  # pictures of an input by which its images' root is found


@dataclass(slots=True)
class CaptionedPicture:
    """One picture with its captions, as written and as words."""

    path: str  # the file to read
    file_path: str  # its name in the dataset
    id: int | str | None
    split: str | None
    source: str  # the name of the input that it comes from
    captions: list[str] = field(default_factory=list)
    words: list[tuple[str, ...]] = field(default_factory=list)


@dataclass
class Findings:
    """What was odd about the records; each entry names a picture by its file path."""

    same_file_twice: list[str] = field(default_factory=list)  # joined with the first
    duplicate_ids: list[str] = field(default_factory=list)  # kept without their id
    empty_captions: list[str] = field(default_factory=list)  # once per caption left out
    without_captions: list[str] = field(default_factory=list)  # left out
    damaged_shards: list[dict[str, str]] = field(default_factory=list)  # "file_path", "reason"; what they have is taken

    def lines(self) -> list[str]:
        """One line for each kind of finding that occurred, with its count and the first name."""
        texts = {
            "same_file_twice": "named more than once; their captions were joined",
            "duplicate_ids": "with the id of another picture; they keep their place, but no id",
            "empty_captions": "captions without a word, left out",
            "without_captions": "pictures without a caption, left out",
        }
        return [
            f"{len(names):,} {'pictures ' if not text.startswith(('captions', 'pictures')) else ''}{text}"
            f" (first: {names[0]})"
            for kind, text in texts.items()
            if (names := getattr(self, kind))
        ]


@dataclass(frozen=True)
class _Input:
    """One description of pictures and captions."""

    path: str
    name: str
    root: Path  # that its file paths start from
    records: Iterator[Record]


def read_captioned(
    inputs: Sequence[str], images_roots: Sequence[str] = (), tokenizer: str = "ascii"
) -> tuple[list[CaptionedPicture], Findings]:
    """Read descriptions of pictures and captions as one: join entries of one file, drop captions without words and
    pictures without captions.

    Of several inputs the pictures are named from the folder that all their roots share, and know their input's name. A
    shard of which nothing can be read costs nothing else, unless it is the only input.

    Args:
        inputs: files or folders, see `records`.
        images_roots: where file paths start from: one for each input, one for all, or none (then they are looked for).

    Returns:
        The pictures in the order of the inputs, and what was found.

    Raises:
        InputError: an input is at fault, or one file is in two splits.
    """
    findings = Findings()
    opened = _open(inputs, images_roots, findings)
    common = opened[0].root if len(inputs) == 1 else _common_folder([one.root for one in opened])
    pictures: dict[str, CaptionedPicture] = {}
    shared: dict[str, str] = {}  # captions repeat few words: each is kept once
    for one in opened:
        for record in one.records:
            path = one.root / record.file_path
            name = record.file_path if len(inputs) == 1 else _name(path, common)
            picture = pictures.get(name)
            if picture is None:
                picture = pictures[name] = CaptionedPicture(str(path), name, record.id, record.split, one.name)
            else:
                _join(picture, record.split, findings)
            for caption in record.captions:
                words = tuple([shared.setdefault(word, word) for word in tokenise(caption, tokenizer)])
                if words:
                    picture.captions.append(caption)
                    picture.words.append(words)
                else:
                    findings.empty_captions.append(name)
        if is_tar(one.path) and (end := cut_off_at(one.path)) is not None:
            findings.damaged_shards.append({"file_path": one.path, "reason": f"damaged or cut off after byte {end:,}"})
    findings.without_captions = [picture.file_path for picture in pictures.values() if not picture.captions]
    kept = [picture for picture in pictures.values() if picture.captions]
    _drop_repeated_ids(kept, findings)
    return kept, findings


def _open(inputs: Sequence[str], images_roots: Sequence[str], findings: Findings) -> list[_Input]:
    """The inputs with their roots. They are named by their files; by more of the path where that is ambiguous."""
    if len(images_roots) not in (0, 1, len(inputs)):
        raise InputError(
            f"{len(images_roots)} --images_root for {len(inputs)} --input_json", expected="one for each, or one for all"
        )
    roots = list(images_roots) * (len(inputs) if len(images_roots) == 1 else 1) or [""] * len(inputs)
    if len({os.path.realpath(path) for path in inputs}) < len(inputs):
        raise InputError(f"--input_json {' '.join(inputs)}: names one of them twice")
    if any(map(is_parquet, inputs)):
        require_pyarrow()
    opened = []
    for path, root, name in zip(inputs, roots, shortest_names(inputs), strict=True):
        records = stream_records(path, root)
        try:
            first = list(itertools.islice(records, _PROBES))
        except InputError as error:
            if len(inputs) == 1 or not (path.lower().endswith(SHARD_SUFFIXES) and os.path.exists(path)):
                raise
            log.warning("skipped %s", error)
            findings.damaged_shards.append({"file_path": path, "reason": str(error).removeprefix(f"{path}: ")})
            continue
        found = find_images_root(path, [record.file_path for record in first], root)
        if not root and found != Path():
            log.info("taking pictures from %s", found)
        opened.append(_Input(path, name, found, itertools.chain(first, records)))
    if not opened:
        first_one = findings.damaged_shards[0]
        raise InputError(f"none of {len(inputs)} shards can be read: {first_one['file_path']}: {first_one['reason']}")
    return opened


def _common_folder(roots: Sequence[Path]) -> Path | None:
    """The folder that all roots lie in; None if there is none (Windows: on several drives)."""
    try:
        common = Path(os.path.commonpath([root.absolute() for root in roots]))
    except ValueError:
        return None
    log.info("the names of pictures start from %s", common)
    return common


def _name(path: Path, common: Path | None) -> str:
    whole = Path(os.path.abspath(path))
    return (whole.relative_to(common) if common and whole.is_relative_to(common) else whole).as_posix()


def _join(picture: CaptionedPicture, split: str | None, findings: Findings) -> None:
    findings.same_file_twice.append(picture.file_path)
    if picture.split != split:
        raise InputError(
            f"{picture.file_path} is in the split {picture.split!r} and in {split!r}", remedy="leave it in one of them"
        )


def _drop_repeated_ids(pictures: Sequence[CaptionedPicture], findings: Findings) -> None:
    ids: set[int | str] = set()
    for picture in pictures:
        if picture.id is not None and picture.id in ids:
            findings.duplicate_ids.append(picture.file_path)
            picture.id = None
        elif picture.id is not None:
            ids.add(picture.id)
