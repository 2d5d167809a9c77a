"""Pictures and captions → a dataset: read the pictures, then decide splits and words over what could be read."""

import logging
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from captioner.data.build import PartialPixels, fill, require_disk_space
from captioner.data.captioned import CaptionedPicture, read_captioned
from captioner.data.dataset_writer import encode_labels, fingerprint_of, finish_h5, write_dataset_json
from captioner.data.decode_pool import available_cpus
from captioner.data.image_mode import ImageMode
from captioner.data.splits import assign_splits, without_split
from captioner.data.statistics import count_words, statistics
from captioner.data.vocabulary import Vocab
from captioner.errors import InputError
from captioner.runtime.files import require_writable_folder
from captioner.runtime.outputs import require_output

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Prepared:
    """What became of it: figures about the captions (see `statistics`), and what is left out with the reason."""

    statistics: dict[str, Any]
    skipped: list[dict[str, str]]


def prepare(
    input_json: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    images_root: str | os.PathLike[str] | Sequence[str | os.PathLike[str]] = (),
    *,
    num_val: int,
    num_test: int = 0,
    output_h5: str | Path = "data.h5",
    output_json: str | Path = "data.json",
    max_length: int = 16,
    word_count_threshold: int = 5,
    tokenizer: str = "ascii",
    on_error: Literal["skip", "fail"] = "skip",
    num_workers: int | None = None,
    resume: bool = True,
    image_mode: ImageMode = "squash",
    seed: int = 123,
) -> Prepared:
    """Write a dataset's h5 and json file: what caption-prepro does, with its options and defaults.

    Pictures are read in other processes, so a script calls this below `if __name__ == "__main__":`, or with
    `num_workers=0`.

    Args:
        input_json: descriptions of pictures and captions, or folders of photo.jpg + photo.txt; one or several.
        images_root: folders that file paths start from: one for each input, one for all, or none.
        num_val, num_test: sizes of these splits, where the inputs have none.
        max_length: words of a caption; longer ones are cut.
        word_count_threshold: words seen so often or less become UNK.
        tokenizer: one of TOKENIZERS.
        on_error: "fail" ends at an unreadable picture or a damaged shard.
        num_workers: processes that read pictures; None: one per CPU.
        resume: continue an interrupted run.
        image_mode: what becomes of pictures that are no squares, see `images.read_image`; kept in the json.
        seed: of the random splits.

    Raises:
        InputError: an input or an option is at fault, or the disk is full.
    """
    inputs, images_roots = _names(input_json), _names(images_root)
    h5_path, json_path = _output_paths(output_h5, output_json)
    pictures, findings = read_captioned(inputs, images_roots, tokenizer)
    _output_paths(output_h5, output_json)  # now that it is known which files of folders are inputs
    for line in findings.lines():
        log.warning("%s", line)
    say_splits(pictures, inputs, num_val + num_test)
    if on_error == "fail" and findings.damaged_shards:
        damaged = findings.damaged_shards[0]
        raise InputError(
            f"{damaged['file_path']}: {damaged['reason']}", remedy="repair it, or leave out --on_error fail"
        )
    skipped = findings.damaged_shards + [
        {"file_path": name, "reason": "has no caption"} for name in findings.without_captions
    ]
    if not pictures:
        raise InputError(f"{', '.join(inputs)}: no picture has a caption")
    without_split(pictures, num_val, num_test)  # before hours of reading
    require_disk_space(h5_path, len(pictures), sum(len(picture.captions) for picture in pictures), max_length)

    with PartialPixels(h5_path, [picture.path for picture in pictures], resume, image_mode) as partial:
        for index, reason in fill(partial, available_cpus() if num_workers is None else num_workers):
            if on_error == "fail":
                raise InputError(f"{pictures[index].path}: {reason}", remedy="repair it, or leave out --on_error fail")
            log.warning("skipped %s: %s", pictures[index].path, reason)
            skipped.append({"file_path": pictures[index].file_path, "reason": reason})
        kept = [picture for picture, reason in zip(pictures, partial.reasons, strict=True) if reason is None]
        if not kept:
            partial.discard()
            raise InputError(
                f"{', '.join(inputs)}: none of its {len(pictures)} pictures could be read",
                remedy=f"is {os.path.abspath(pictures[0].path)} there? See --images_root",
            )
        splits = assign_splits(kept, num_val, num_test, seed)
        words = [picture.words for picture in kept]
        counts = count_words(words)
        vocab = Vocab.build(counts, word_count_threshold, tokenizer)
        arrays = encode_labels(words, vocab, max_length)
        figures = statistics(words, splits, counts, vocab, max_length)

        def info() -> Iterator[dict[str, Any]]:
            for picture, split in zip(kept, splits, strict=True):
                yield _info(picture, split, with_source=len(inputs) > 1)

        # Squashed is what a json without this key means: the original's, and all before there was a choice.
        more = {} if image_mode == "squash" else {"image_mode": image_mode}
        fingerprint = fingerprint_of(vocab, info(), arrays[0], *more.values())
        finish_h5(partial.pixels_path, len(kept), *arrays, fingerprint)
        write_dataset_json(json_path, vocab, info(), fingerprint, statistics=figures, skipped=skipped, **more)
        partial.publish(h5_path)
    return Prepared(figures, skipped)


def _names(paths: str | os.PathLike[str] | Sequence[str | os.PathLike[str]]) -> list[str]:
    if isinstance(paths, str | os.PathLike):
        return [os.fspath(paths)] if os.fspath(paths) else []
    return [os.fspath(path) for path in paths]


def say_splits(pictures: Sequence[CaptionedPicture], inputs: Sequence[str], num_asked: int) -> None:
    """Log where numbers for splits were given, but pictures have splits already."""
    num_without = sum(picture.split is None for picture in pictures)
    if num_asked and num_without == 0 and pictures:
        log.info("%s says what is train, val and test: --num_val and --num_test do not apply", ", ".join(inputs))
    elif num_asked and num_without < len(pictures):
        log.info(
            "%s of %s pictures have a split: --num_val and --num_test are taken from the others",
            f"{len(pictures) - num_without:,}",
            f"{len(pictures):,}",
        )


def _info(picture: CaptionedPicture, split: str, with_source: bool) -> dict[str, Any]:
    """The json's entry of one picture. Those of val and test carry their captions, to score against."""
    info: dict[str, Any] = {"split": split, "file_path": picture.file_path}
    if picture.id is not None:
        info["id"] = picture.id
    if with_source:
        info["source"] = picture.source
    if split != "train":
        info["captions"] = picture.captions
    return info


def _output_paths(output_h5: str | Path, output_json: str | Path) -> tuple[Path, Path]:
    """Where the dataset goes, proven to be writable, and to replace nothing but an older dataset."""
    h5_path, json_path = Path(output_h5), Path(output_json)
    if os.path.realpath(h5_path) == os.path.realpath(json_path):
        raise InputError(f"--output_h5 and --output_json are both {h5_path}", expected="two files")
    for path in (h5_path, json_path):
        require_output(path, ["dataset"])
        require_writable_folder(path.parent, "the dataset")
    return h5_path, json_path
