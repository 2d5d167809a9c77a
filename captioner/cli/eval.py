"""caption-eval: caption a folder of photos or a split of a dataset (original: eval.lua)."""

import argparse
import contextlib
import hashlib
import json
import logging
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from captioner.cli.eval_options import check_options, dumps_page, take_pictures_from_models
from captioner.cli.eval_shards import add_shard_options, caption_shards
from captioner.cli.options import (
    OneOrSeveral,
    Parser,
    Range,
    add_precision,
    all_or_some,
    flag,
    gpu_number,
    images_at_once,
    part_of_a_name,
    run,
    seed_number,
    share,
    workers,
)
from captioner.cli.search_options import add_search_options, search_keywords
from captioner.errors import InputError
from captioner.runtime.files import identity_of

if TYPE_CHECKING:  # torch is imported late, so that --help and argument errors are instant
    from captioner.inference.model import Model
    from captioner.inference.sources import Source
    from captioner.metrics.pairing import Reference
    from captioner.model.checkpoint import Checkpoint
    from captioner.output.writer import CaptionWriter, PhotoCaptions
    from captioner.search import SearchOptions

log = logging.getLogger(__name__)

NUM_IMAGES_OF_A_SPLIT = 100  # the original's default


def build_parser() -> Parser:
    """The command's options: the original's under their own names and defaults, then ours."""
    p = Parser(prog="caption-eval", description="Caption photos, or a split of a dataset.")
    p.add_argument(
        "pictures",
        nargs="*",
        default=[],
        metavar="PICTURE",
        help='photos, folders, patterns ("*.png"), http(s) addresses; - takes a list of them from stdin',
    )
    p.add_argument(
        "--model", nargs="+", default=[], help="checkpoints; several are averaged (default: the bundled one)"
    )
    p.add_argument(
        "--batch_size",
        type=Range(int, 0, images_at_once.most),
        default=1,
        help="images at once; 1: what is fast here, 0: as in training",
    )
    p.add_argument("--num_images", type=all_or_some, help="-1 all; default: all of a folder, 100 of a split")
    source = p.add_argument_group("pictures (named as above, or --image_folder, or --input_h5 with --input_json)")
    source.add_argument("--image_folder", default="", help="folder of photos")
    source.add_argument("--recursive", type=flag, default="0", help="folders' subfolders too")
    source.add_argument(
        "--watch", type=flag, default="0", help="stay, and caption pictures as they come into the folder"
    )
    source.add_argument("--coco_json", default="", help="COCO image list: take its files and ids from --image_folder")
    source.add_argument("--image_root", default="", help="folder to which a dataset's file paths are relative")
    for name in ("--input_h5", "--input_json"):
        text = "dataset, of one file or several; default: the one the model was trained on"
        source.add_argument(name, nargs="+", action=OneOrSeveral, default="", metavar="FILE", help=text)
    source.add_argument("--split", default="test", help="which split of the dataset: train, val or test")
    add_search_options(p)
    out = p.add_argument_group("results")
    out.add_argument("--vis_dir", default="vis", help="folder for the page, vis.json and imgs/")
    out.add_argument("--share", metavar="ALBUM.html", help="also write the page as one file to send, pictures inside")
    out.add_argument("--explain", type=flag, default="0", help="with a map per word of where the model looked")
    out.add_argument("--dump_images", type=flag, default="1", help="copy pictures into the page's folder")
    out.add_argument("--dump_json", type=flag, default="1", help="write vis.json and the page")
    out.add_argument("--dump_path", type=flag, default="0", help="accepted; file names are always written")
    out.add_argument("--output", help="also write the results to F.json, F.jsonl or F.csv; -: JSON lines on stdout")
    out.add_argument("--write_txt", type=flag, default="0", help="write photo.txt beside each photo.jpg")
    out.add_argument("--txt_extension", default=".txt", help="ending of these text files")
    out.add_argument("--prefix", default="", help="text before each caption in them")
    out.add_argument("--suffix", default="", help="text after each caption in them")
    out.add_argument(
        "--existing",
        choices=("keep", "append", "prepend"),
        default="keep",
        help="text files that are there: keep them, or let the caption be their last or first line",
    )
    out.add_argument(
        "--write_metadata",
        choices=("xmp", "embed"),
        help="write captions as XMP descriptions: xmp beside the photos, as photo.jpg.xmp; embed inside JPEG, PNG and "
        "WebP files themselves",
    )
    out.add_argument("--only_missing", type=flag, default="0", help="only photos without such a text or description")
    out.add_argument("--overwrite", type=flag, default="0", help="replace files that are not of this program")
    out.add_argument("--min_confidence", type=share, default=0.0, help="below this give no caption (0 to 1)")
    out.add_argument("--resume", type=flag, default="0", help="go on with an interrupted run of the same command")
    out.add_argument("--language_eval", type=flag, default="0", help="score against the known captions")
    out.add_argument("--references", default="", help="captions to score a folder against (see caption-score)")
    out.add_argument(
        "--id", type=part_of_a_name, default="evalscript", help="name of this evaluation: scores go to scores_ID.json"
    )
    add_shard_options(p)
    machine = p.add_argument_group("machine")
    machine.add_argument("--backend", choices=("cudnn", "nn"), default="cudnn", help="accepted; without effect here")
    machine.add_argument("--seed", type=seed_number, default=123, help="random number seed, for sampling")
    machine.add_argument("--gpuid", type=gpu_number, default=0, help="GPU to use; -1 is the CPU")
    add_precision(machine)
    machine.add_argument("--num_workers", type=workers, default=2, help="threads that read and decode pictures")
    return p


def main(argv: Sequence[str] | None = None) -> int:
    opt = build_parser().parse_args(argv)
    take_pictures_from_models(opt)
    return run("caption-eval", lambda: caption(opt))


def caption(opt: argparse.Namespace) -> None:
    """Caption everything asked for; results go to stdout, the page and files as they come."""
    if opt.output_dir or opt.engine == "ray":
        caption_shards(opt)
        return
    check_options(opt)
    with_photos(opt)  # refuses endings that are none, and a missing library

    from tqdm import tqdm
    from tqdm.contrib.logging import logging_redirect_tqdm

    from captioner.data.batches import shares
    from captioner.inference.load import load_models
    from captioner.inference.model import Model
    from captioner.inference.run import Totals
    from captioner.runtime.device import choose_device
    from captioner.runtime.memory import keep_freed_memory
    from captioner.runtime.processes import process_group

    keep_freed_memory()
    device = choose_device(opt.gpuid)
    with process_group(device) as processes:
        checkpoints = load_models(opt.model)
        source = None if opt.watch else open_source(opt, checkpoints[0])
        references = known_captions(opt, source) if opt.language_eval and source is not None else None
        processes.wait()  # all have looked at the files before one of them writes some
        if source is not None and not len(source):
            log.info("every photo has its caption: nothing to do")
            return
        model = Model(checkpoints, device, opt.precision, calibration=source)
        options = model.search_options(**search_keywords(opt))
        # By the least of all memories: unequal batches would be unequal shares of each round.
        batch_size = processes.smallest(batch_size_of(opt, checkpoints[0], model))
        if opt.watch:
            if processes.size > 1:
                raise InputError("--watch 1 runs in one process", remedy="start it without torchrun")
            watch(opt, model, options, batch_size)
            return
        assert source is not None
        with contextlib.ExitStack() as opened:
            writer = opened.enter_context(make_writer(opt, source, model, references)) if processes.is_main else None
            totals = Totals.restored(writer.totals if writer else {})
            first = processes.largest(writer.num_done if writer else 0)
            opened.enter_context(logging_redirect_tqdm())  # a line goes above the bar
            hidden = None if processes.is_main and log.isEnabledFor(logging.INFO) else True  # None: on a terminal
            bar = opened.enter_context(tqdm(total=len(source), initial=first, unit=" images", disable=hidden))
            groups = shares(len(source), batch_size, processes.rank, processes.size, first)
            for evaluated in model.run(
                source, groups, options, seed=opt.seed, num_workers=opt.num_workers, explain=opt.explain
            ):
                for part in processes.gather(evaluated):
                    totals.add(part)
                    bar.update(len(part.positions) + len(part.skipped))
                    if writer:
                        captions = model.captions_of(part, opt.min_confidence)
                        writer.add(part.positions, captions, part.skipped, totals=vars(totals))
            bar.close()
            if writer:
                writer.finish(totals)


def watch(opt: argparse.Namespace, model: "Model", options: "SearchOptions", batch_size: int) -> None:
    """Caption pictures as they come into a folder, until SIGTERM or Ctrl-C; what has come is written every so often."""
    from captioner.inference.watch import WatchedFolder
    from captioner.runtime.signals import StopRequest

    ours = [Path(path) for path in (opt.vis_dir, opt.output) if path]
    folder = WatchedFolder(opt.image_folder, opt.recursive, ignored=ours)
    with StopRequest() as stop, make_writer(opt, folder, model) as writer:
        assert writer.journal  # check_options
        folder.skip(writer.journal.rows())
        unwritten, next_time = True, 0.0
        for positions in folder.arrivals(lambda: bool(stop.signal), batch_size):
            if positions:
                (found,) = model.run(
                    folder, [positions], options, seed=opt.seed, num_workers=opt.num_workers, explain=opt.explain
                )
                skipped = [one for one in found.skipped if folder.unreadable(one[0])]
                modified = [folder.modified(position) for position in found.positions]
                writer.add(found.positions, model.captions_of(found, opt.min_confidence), skipped, modified)
                folder.written_by_us(found.positions)
                folder.forget(positions)
                unwritten = unwritten or bool(found.positions)
            began = time.monotonic()
            if unwritten and began >= next_time:
                writer.publish()
                # A large page takes long to write: a twentieth of the time at most.
                unwritten, next_time = False, began + max(2.0, 20 * (time.monotonic() - began))
        if unwritten:
            writer.publish()


def title_of(opt: argparse.Namespace) -> str:
    """What the page is called: the folder's name, or the split's."""
    if opt.image_folder:
        return Path(opt.image_folder).resolve().name
    if opt.pictures:
        return Path(opt.pictures[0]).resolve().name if len(opt.pictures) == 1 else "Photos"
    described = [opt.input_json] if isinstance(opt.input_json, str) else opt.input_json
    names = ", ".join(Path(path).stem for path in described if path)
    return f"{opt.split} split" + (f" of {names}" if names else "")


def open_source(opt: argparse.Namespace, model: "Checkpoint") -> "Source":
    """The pictures the options ask for."""
    from captioner.data.dataset import Dataset
    from captioner.inference.inputs import open_inputs
    from captioner.inference.load import require_same_vocabulary
    from captioner.inference.sources import open_coco_list, open_folder, open_split

    if opt.pictures or opt.image_folder:
        limit = -1 if opt.num_images is None or opt.only_missing else opt.num_images
        if opt.pictures:
            source = open_inputs(opt.pictures, opt.recursive, limit, sys.stdin.buffer)
        elif opt.coco_json:
            source = open_coco_list(opt.coco_json, opt.image_folder, limit)
        else:
            source = open_folder(opt.image_folder, opt.recursive, limit)
        if opt.only_missing:
            places = with_photos(opt)
            source = source.without(
                lambda photo: all(place.is_captioned(photo) for place in places),
                -1 if opt.num_images is None else opt.num_images,
            )
        return source
    h5, described = (
        opt.input_h5 or model.history.opt.get("input_h5"),
        opt.input_json or model.history.opt.get("input_json"),
    )
    if not (h5 and described) or not opt.model:
        raise InputError(
            "no pictures to caption",
            remedy="name photos or a folder (or give --image_folder FOLDER, or --input_h5 FILE with --input_json FILE)",
        )
    dataset = Dataset.open(h5, described)
    if model.vocab.covers(dataset.words_to_know(model.vocab)):
        # One of several that the model was trained on, or one whose words it has beside its own.
        dataset = dataset.with_words_of(model.vocab)
    require_same_vocabulary([(opt.model[0], model.vocab), (dataset.json_name, dataset.vocab)])
    limit = NUM_IMAGES_OF_A_SPLIT if opt.num_images is None else opt.num_images
    return open_split(dataset, opt.split, opt.image_root, limit)


def batch_size_of(opt: argparse.Namespace, checkpoint: "Checkpoint", model: "Model") -> int:
    """What the user says (0: as in training); 1, the original's default, stands for what is fast here."""
    if opt.batch_size == 0:
        return int(checkpoint.history.opt.get("batch_size", 16))
    return opt.batch_size if opt.batch_size > 1 else model.fast_batch_size()


def known_captions(opt: argparse.Namespace, source: "Source") -> "list[Reference]":
    """What --language_eval scores against: read, and found to belong to the pictures, before the first is decoded."""
    from captioner.metrics.pairing import read_references, require_references

    references = read_references(opt.references) if opt.references else source.references()
    require_references(source.info(), references)
    return references


def make_writer(
    opt: argparse.Namespace, source: "Source", model: "Model", references: "list[Reference] | None" = None
) -> "CaptionWriter":
    """What is to happen to the captions."""
    from captioner.model.checkpoint import BUNDLED_MODEL
    from captioner.output.writer import CaptionWriter, Destinations

    destinations = Destinations(
        output=Path(opt.output) if opt.output not in (None, "", "-") else None,
        rows_to_stdout=opt.output == "-",
        page=Path(opt.vis_dir) if dumps_page(opt) else None,
        copy_pictures=opt.dump_images,
        album=Path(opt.share) if opt.share else None,
        about={
            "title": title_of(opt),
            "model": " + ".join(Path(path).stem for path in opt.model or [BUNDLED_MODEL]),
            "image_mode": model.image_mode,
        },
        with_photos=with_photos(opt),
        overwrite=opt.overwrite,
    )
    run = run_name(opt, source)
    return CaptionWriter(
        source,
        destinations,
        run=run,
        resume=opt.resume or opt.watch,
        references=references,
        name=opt.id,
    )


def with_photos(opt: argparse.Namespace) -> "list[PhotoCaptions]":
    """What is to be written beside the photos, or into them."""
    from captioner.output.photo_metadata import PhotoMetadata
    from captioner.output.sidecars import Sidecars

    places: list[PhotoCaptions] = []
    if opt.write_txt:
        places.append(Sidecars(opt.txt_extension, opt.prefix, opt.suffix, "replace" if opt.overwrite else opt.existing))
    if opt.write_metadata:
        places.append(PhotoMetadata(opt.write_metadata, "replace" if opt.overwrite else "keep"))
    return places


def run_name(opt: argparse.Namespace, source: "Source") -> str:
    """The same for the same run: for the same options, but those that change no caption, and the same images and
    models, whatever they are called."""
    from captioner.model.checkpoint import bundled_model_path

    ignored = {"resume", "num_workers", "batch_size", "gpuid", "backend", "vis_dir", "output", "share", "overwrite"}
    ignored |= {"references", "language_eval", "id", "dump_path", "model", "image_folder"}
    options = {name: value for name, value in vars(opt).items() if name not in ignored}
    images = source.identity(sizes=opt.write_metadata != "embed")  # photos grow by what is written into them
    text = json.dumps(
        [options, [identity_of(path) for path in opt.model or [bundled_model_path()]], images], sort_keys=True
    )
    return hashlib.blake2b(text.encode(), digest_size=10).hexdigest()


if __name__ == "__main__":
    raise SystemExit(main())
