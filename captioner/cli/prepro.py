"""caption-prepro: pictures and captions → a dataset (h5 and json)."""

import argparse
import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from captioner.cli.options import Parser, add_overwrite, flag, non_negative, run, seed_number, words, workers
from captioner.data.image_mode import IMAGE_MODES
from captioner.data.tokenizers import TOKENIZERS
from captioner.errors import InputError

if TYPE_CHECKING:
    from captioner.data.options import DatasetOptions


class _AddAll(argparse.Action):
    """Several values, over several uses of the option; the default, kept as the original has it, is not one of them."""

    def __call__(self, parser: object, namespace: argparse.Namespace, values: Any, name: object = None) -> None:
        setattr(namespace, self.dest, [*(getattr(namespace, self.dest) or []), *values])


def build_parser() -> argparse.ArgumentParser:
    p = Parser(prog="caption-prepro", description="Turn pictures and captions into a dataset for caption-train.")
    p.add_argument(
        "--input_json",
        required=True,
        nargs="+",
        action=_AddAll,
        metavar="FILE",
        help="pictures and captions: the original's JSON, Karpathy's, COCO's, JSONL, CSV/TSV, Flickr8k .token, lines of"
        " path and label, a folder of photo.jpg + photo.txt, or one with a folder per class; several make one dataset",
    )
    p.add_argument("--num_val", type=non_negative, help="images of the validation split (required for a new dataset)")
    p.add_argument("--output_json", default="data.json", help="the dataset's json file")
    p.add_argument("--output_h5", default="data.h5", help="the dataset's h5 file")
    p.add_argument("--max_length", default=16, type=words, help="words of a caption; longer ones are cut")
    p.add_argument(
        "--images_root",
        default="",
        nargs="+",
        action=_AddAll,
        metavar="FOLDER",
        help="folder that the paths of the pictures start from: one for each input, or one for all",
    )
    p.add_argument("--word_count_threshold", default=5, type=non_negative, help="words seen so often or less are UNK")
    p.add_argument("--num_test", default=0, type=non_negative, help="images of the test split")
    p.add_argument(
        "--tokenizer",
        default="ascii",
        choices=TOKENIZERS,
        help="how captions become words: ascii is the original's rule (tshirt), unicode is for any language, ptb is how"
        " scores read them (t-shirt)",
    )
    p.add_argument(
        "--image_mode",
        default="squash",
        choices=IMAGE_MODES,
        help="what becomes of pictures that are no squares: squash changes their aspect as the original does, crop"
        " keeps the middle, pad adds a border; models trained on them do the same to the pictures they caption",
    )
    p.add_argument(
        "--on_error", default="skip", choices=("skip", "fail"), help="what to do at an unreadable picture or shard"
    )
    p.add_argument("--num_workers", type=workers, help="processes that read pictures (default: one per CPU)")
    p.add_argument("--resume", default=True, type=flag, help="continue an interrupted run")
    p.add_argument("--seed", default=123, type=seed_number, help="of the random splits")
    p.add_argument("--check", default=False, type=flag, help="only look and report, write no dataset")
    p.add_argument("--view", default="", metavar="FOLDER", help="look, as --check 1, and write a page of what is there")
    p.add_argument("--input_h5", default="", help="with --view: a prepared dataset, of which --input_json is the json")
    p.add_argument("--output", default="", help="with --check 1: write the report to this JSON file")
    p.add_argument("--mean_image", default="", help="with --check 1: write the mean of all pictures to this PNG file")
    add_overwrite(p)
    return p


def main(argv: Sequence[str] | None = None) -> int:
    parser = build_parser()
    opt = parser.parse_args(argv)
    if opt.num_val is None and not opt.input_h5:
        parser.error("the following arguments are required: --num_val")
    if opt.input_h5:
        return run("caption-prepro", lambda: _view_prepared(opt))
    return run("caption-prepro", lambda: _with_local_inputs(opt))


def _with_local_inputs(opt: argparse.Namespace) -> None:
    """What is at addresses is read twice, and one picture at a time: from copies beside the dataset."""
    from captioner.data.shards import fetched

    with fetched(opt.input_json, f"{opt.output_h5}.fetched") as opt.input_json:
        if opt.check or opt.view:
            _check(opt)
        else:
            _prepare(opt)


def _dataset_options(opt: argparse.Namespace) -> "DatasetOptions":
    from captioner.data.options import DatasetOptions

    return DatasetOptions(**{field.name: getattr(opt, field.name) for field in dataclasses.fields(DatasetOptions)})


def _prepare(opt: argparse.Namespace) -> None:
    from captioner.data.prepare import prepare
    from captioner.data.statistics import describe, unk_hint

    if opt.output or opt.mean_image:
        raise InputError(
            f"{'--output' if opt.output else '--mean_image'} is for the report of --check 1",
            remedy="see --output_h5 and --output_json",
        )
    prepared = prepare(
        opt.input_json,
        opt.images_root,
        output_h5=opt.output_h5,
        output_json=opt.output_json,
        on_error=opt.on_error,
        num_workers=opt.num_workers,
        resume=opt.resume,
        **vars(_dataset_options(opt)),
    )
    print(describe(prepared.statistics, opt.max_length))
    if hint := unk_hint(prepared.statistics, opt.word_count_threshold):
        print(hint)
    if prepared.skipped:
        print(f'skipped     {len(prepared.skipped):,} pictures or parts of shards; see "skipped" in {opt.output_json}')
    print(f"wrote       {opt.output_h5} and {opt.output_json}")


def _check(opt: argparse.Namespace) -> None:
    """What --check does: read everything, report, write no dataset."""
    from captioner.data.check import check, report_text
    from captioner.data.pixel_statistics import PixelStatistics, write_mean_image
    from captioner.data.statistics import unk_hint
    from captioner.runtime.files import atomic_write

    pixels = PixelStatistics()
    report = check(opt.input_json, opt.images_root, _dataset_options(opt), pixels, opt.num_workers)
    print(report_text(report, opt.max_length))
    if hint := unk_hint(report["statistics"], opt.word_count_threshold):
        print(hint)
    if opt.output:
        with atomic_write(opt.output, "w", encoding="utf-8") as stream:
            json.dump(report, stream, indent=1)
    if opt.mean_image and report["readable"]:
        write_mean_image(opt.mean_image, pixels)
    if opt.view and report["readable"]:
        print(f"page        {_write_page(opt, report)} (open it by double click)")
    if not report["readable"]:
        without = len(report["unreadable"]) + len(report["without_captions"])
        raise InputError(f"{', '.join(opt.input_json)}: none of its {without} pictures can be used")


def _view_prepared(opt: argparse.Namespace) -> None:
    """The page of a dataset that is prepared already."""
    from captioner.data.dataset import Dataset
    from captioner.output.dataset_page import write_prepared_page

    if not opt.view or len(opt.input_json) != 1:
        raise InputError(
            f"--input_h5 {opt.input_h5}: a prepared dataset is only looked at",
            remedy="say --view FOLDER, and name its one json file with --input_json",
        )
    dataset = Dataset.open(opt.input_h5, opt.input_json[0])
    page = write_prepared_page(
        Path(opt.view), dataset, title=Path(opt.input_h5).resolve().name, overwrite=opt.overwrite
    )
    print(f"page        {page} (open it by double click)")


def _write_page(opt: argparse.Namespace, report: dict[str, Any]) -> Path:
    """What --view does after the look."""
    from captioner.data.captioned import read_captioned
    from captioner.output.dataset_page import write_dataset_page

    pictures, _ = read_captioned(opt.input_json, opt.images_root, opt.tokenizer)
    title = ", ".join(Path(name).resolve().name for name in opt.input_json)
    return write_dataset_page(Path(opt.view), pictures, report, _dataset_options(opt), title, opt.overwrite)


if __name__ == "__main__":
    raise SystemExit(main())
