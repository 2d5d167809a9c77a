"""caption-eval --output_dir: shards in, shards out, in this process or on a Ray cluster."""

import argparse
import contextlib
import functools
import logging
import os
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from captioner.cli.options import Parser, small_size
from captioner.cli.search_options import search_keywords
from captioner.errors import InputError

if TYPE_CHECKING:  # torch is imported late, so that --help and argument errors are instant
    from captioner.scale.items import Item

log = logging.getLogger(__name__)

# Options of caption-eval that have no meaning for shards, with their defaults.
NOT_FOR_SHARDS = {
    "num_images": None,
    "image_folder": "",
    "watch": False,
    "coco_json": "",
    "input_h5": "",
    "input_json": "",
    "output": None,
    "share": None,
    "explain": False,
    "write_txt": False,
    "write_metadata": None,
    "only_missing": False,
    "language_eval": False,
    "references": "",
}


def add_shard_options(p: Parser) -> None:
    """Options about shards as a whole."""
    g = p.add_argument_group("many shards (.tar, .parquet; here, or at s3://, gs://, hf://, ..)")
    g.add_argument("--output_dir", default="", metavar="FOLDER", help="one file of results for each shard, no page")
    g.add_argument("--output_format", choices=("jsonl", "parquet"), default="jsonl", help="of these files")
    g.add_argument("--engine", choices=("local", "ray"), default="local", help="this process, or a Ray cluster")
    g.add_argument("--address", default="", help="of the cluster; auto: this machine's (default: one of its own)")
    g.add_argument(
        "--actors", type=_actors, metavar="N|LEAST,MOST", help="workers with a model (default: all there is)"
    )


def _actors(text: str) -> tuple[int, int]:
    least, comma, most = text.partition(",")
    found = (int(small_size(least)), int(small_size(most if comma else least)))
    if found[0] > found[1]:
        raise argparse.ArgumentTypeError(f"{text}: the least is above the most")
    return found


def caption_shards(opt: argparse.Namespace) -> None:
    """Caption shards; a repeated command does what is left."""
    check_options(opt)

    import captioner
    from captioner.data.listing import require_pyarrow
    from captioner.inference.load import CALIBRATION_PHOTOS, load_models
    from captioner.model.checkpoint import bundled_model_path
    from captioner.runtime.device import choose_device
    from captioner.runtime.memory import keep_freed_memory
    from captioner.runtime.processes import process_group
    from captioner.scale.captions import (
        CaptionItems,
        LoadCaptionItems,
        digest_of,
        find_shards,
        first_pictures,
        run_here,
    )
    from captioner.scale.items import read_items
    from captioner.scale.ray_engine import run_on_ray
    from captioner.scale.shard_results import ShardResults, Tally, sole_writer

    keep_freed_memory()
    shards = find_shards(opt.pictures)
    if opt.output_format == "parquet":
        require_pyarrow()
    checkpoint = load_models(opt.model)[0]
    captioned_with = {"search": search_keywords(opt), "seed": opt.seed, "min_confidence": opt.min_confidence}
    run = {"models": [digest_of(path) for path in opt.model or [bundled_model_path()]], "precision": opt.precision}
    batch_size = opt.batch_size if opt.batch_size > 1 else None
    read = functools.partial(read_items, image_mode=checkpoint.config.image_mode)
    device = choose_device(-1 if opt.engine == "ray" else opt.gpuid)
    with contextlib.ExitStack() as held:
        processes = held.enter_context(process_group(device))
        for main_turn in (True, False):  # first the main process, which may have to clear the folder
            if processes.is_main == main_turn:
                if main_turn:
                    held.enter_context(sole_writer(opt.output_dir))  # for all processes of this run
                results = ShardResults(shards, opt.output_dir, opt.output_format, run | captioned_with, opt.overwrite)
            processes.wait()  # in the end all have seen the same shards left before one of them does some
        log.info("%d of %d shards are left to caption", len(results.left), len(shards))
        if not results.left:
            return
        left = [results.left[place] for place in processes.share(len(results.left))]
        calibration = first_pictures(shards, CALIBRATION_PHOTOS) if opt.precision == "int8" else []
        items: Iterable[Item] = ()
        if opt.engine == "ray":
            contents = [Path(path).read_bytes() for path in opt.model]
            items = run_on_ray(
                shards,
                left,
                functools.partial(read, num_workers=0),
                LoadCaptionItems(contents, opt.precision, calibration, **captioned_with),
                address=opt.address or None,
                batch_size=batch_size,
                actors=opt.actors,
                gpus=opt.gpuid >= 0,
            )
        elif left:
            model = captioner.load_model(opt.model or None, device, opt.precision, calibration)
            worker = CaptionItems(model, **captioned_with)
            read = functools.partial(read, num_workers=opt.num_workers)
            items = run_here(shards, left, read, worker, batch_size or model.fast_batch_size())
        # A process that ended with an error would take the others with it: all have done their part first.
        tallies = processes.gather(results.gather(items), patient=True)
        if processes.is_main:
            results.finish(Tally.sum_of(tallies))


def check_options(opt: argparse.Namespace) -> None:
    """Refuse contradictions before anything is read.

    Raises:
        InputError: an option that shards exclude, or one that is missing.
    """
    if not opt.output_dir:
        raise InputError("--engine ray writes a file for each shard", remedy="say where with --output_dir")
    if not opt.pictures:
        raise InputError("--output_dir: no shards are named", expected="tar archives or Parquet files of pictures")
    for name, default in NOT_FOR_SHARDS.items():
        if getattr(opt, name) != default:
            raise InputError(f"--{name} and --output_dir exclude each other", remedy="see docs/scale.md")
    if opt.engine == "ray" and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise InputError("--engine ray starts its own workers", remedy="start it without torchrun")
    if opt.batch_size == 0:
        raise InputError("--batch_size 0 is for data sets", expected="at least 1, with --output_dir")
    if opt.engine != "ray" and (opt.address or opt.actors):
        raise InputError("--address and --actors are about a cluster", remedy="add --engine ray")
