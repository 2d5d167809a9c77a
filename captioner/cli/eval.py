"""caption-eval: caption a folder of photos or a split of a dataset (original: eval.lua)."""

import argparse
import contextlib
import hashlib
import json
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from captioner.cli.options import (
    Parser,
    Range,
    add_precision,
    all_or_some,
    exponent,
    factor,
    flag,
    gpu_number,
    images_at_once,
    non_negative,
    positive_share,
    run,
    seed_number,
    share,
    small_size,
    temperature,
    workers,
)
from captioner.errors import InputError
from captioner.runtime.files import atomic_write, require_writable_folder

if TYPE_CHECKING:  # torch is imported late, so that --help and argument errors are instant
    import torch

    from captioner.data.batches import Batch
    from captioner.inference.captioner import Captioner, Evaluated, Totals
    from captioner.inference.sources import Source
    from captioner.model.checkpoint import Checkpoint
    from captioner.search import SearchOptions

log = logging.getLogger(__name__)

NUM_IMAGES_OF_A_SPLIT = 100  # the original's default
BYTES_PER_IMAGE = 40 * 2**20  # activations of VGG16 on a GPU, generously


def add_search_options(p: Parser) -> None:
    """Options that say how captions are found."""
    g = p.add_argument_group("search")
    g.add_argument("--sample_max", type=flag, default="1", help="1: beam search; 0: draw words at random")
    g.add_argument("--beam_size", type=small_size, default=2, help="beams per image; 1 is greedy")
    g.add_argument("--temperature", type=temperature, default=1.0, help="sampling: below 1 safer, above 1 wilder")
    g.add_argument("--top_k", type=non_negative, default=0, help="sampling: among the k likeliest words; 0 all")
    g.add_argument(
        "--top_p", type=positive_share, default=1.0, help="sampling: among the likeliest words of this probability"
    )
    g.add_argument("--n_best", type=small_size, default=1, help="captions per image, best first")
    g.add_argument(
        "--length_penalty", type=exponent, default=0.0, help="rank by logprob / length^this; 0 by probability alone"
    )
    g.add_argument("--min_length", type=non_negative, default=0, help="least number of words")
    g.add_argument("--no_repeat_ngram", type=non_negative, default=0, help="no n words occur twice in a caption; 0 off")
    g.add_argument("--suppress_unk", type=flag, help="never say UNK (default: as the model file says)")
    g.add_argument("--diverse_groups", type=small_size, default=1, help="groups of beams that avoid each other's words")
    g.add_argument("--diversity", type=factor, default=0.5, help="how much they avoid them, in log-probability")


def build_parser() -> Parser:
    """The command's options: the original's under their own names and defaults, then ours."""
    p = Parser(prog="caption-eval", description="Caption a folder of photos or a split of a dataset.")
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
    source = p.add_argument_group("pictures (--image_folder, or --input_h5 with --input_json)")
    source.add_argument("--image_folder", default="", help="folder of photos")
    source.add_argument("--recursive", type=flag, default="0", help="the folder's subfolders too")
    source.add_argument("--coco_json", default="", help="COCO image list: take its files and ids from --image_folder")
    source.add_argument("--image_root", default="", help="folder to which a dataset's file paths are relative")
    source.add_argument("--input_h5", default="", help="dataset; default: the one the model was trained on")
    source.add_argument("--input_json", default="", help="dataset; default: the one the model was trained on")
    source.add_argument("--split", default="test", help="which split of the dataset: train, val or test")
    add_search_options(p)
    out = p.add_argument_group("results")
    out.add_argument("--vis_dir", default="vis", help="folder for the page, vis.json and imgs/")
    out.add_argument("--dump_images", type=flag, default="1", help="copy pictures into the page's folder")
    out.add_argument("--dump_json", type=flag, default="1", help="write vis.json and the page")
    out.add_argument("--dump_path", type=flag, default="0", help="accepted; file names are always written")
    out.add_argument("--output", help="also write the results to F.json, F.jsonl or F.csv")
    out.add_argument("--write_txt", type=flag, default="0", help="write photo.txt beside each photo.jpg")
    out.add_argument("--overwrite", type=flag, default="0", help="let --write_txt replace existing files")
    out.add_argument("--min_confidence", type=share, default=0.0, help="below this give no caption (0 to 1)")
    out.add_argument("--resume", type=flag, default="0", help="go on with an interrupted run of the same command")
    out.add_argument("--language_eval", type=flag, default="0", help="score against the known captions")
    out.add_argument("--references", default="", help="captions to score a folder against (see caption-score)")
    out.add_argument("--id", default="evalscript", help="name of this evaluation, in the scores' file name")
    machine = p.add_argument_group("machine")
    machine.add_argument("--backend", choices=("cudnn", "nn"), default="cudnn", help="accepted; without effect here")
    machine.add_argument("--seed", type=seed_number, default=123, help="random number seed, for sampling")
    machine.add_argument("--gpuid", type=gpu_number, default=0, help="GPU to use; -1 is the CPU")
    add_precision(machine)
    machine.add_argument("--num_workers", type=workers, default=2, help="threads that read and decode pictures")
    return p


def main(argv: Sequence[str] | None = None) -> int:
    opt = build_parser().parse_args(argv)
    return run("caption-eval", lambda: caption(opt))


def caption(opt: argparse.Namespace) -> None:
    """Caption everything asked for; results go to stdout, the page and files as they come."""
    check_options(opt)

    from captioner.data.batches import shares
    from captioner.inference.captioner import Totals, evaluate
    from captioner.inference.load import load_models, make_captioner
    from captioner.runtime.device import choose_device
    from captioner.runtime.memory import keep_freed_memory
    from captioner.runtime.processes import process_group

    keep_freed_memory()
    device = choose_device(opt.gpuid)
    with process_group(device) as processes:
        models = load_models(opt.model)
        source = open_source(opt, models[0])
        options = search_options(opt, models[0])
        batch_size = choose_batch_size(opt, models[0], device)

        def first_photos(count: int) -> "Iterator[Batch]":
            return source.batches(shares(min(count, len(source)), batch_size, 0, 1), opt.num_workers)

        captioner = make_captioner(models, device, opt.precision, first_photos)
        totals = Totals()
        with Outputs(opt, source, captioner) if processes.is_main else contextlib.nullcontext() as outputs:
            first = processes.largest(outputs.num_done if outputs else 0)
            positions = shares(len(source), batch_size, processes.rank, processes.size, first)
            batches = source.batches(positions, opt.num_workers)
            for evaluated in evaluate(captioner, batches, options, opt.seed):
                for part in processes.gather(evaluated):
                    totals.add(part)
                    if outputs:
                        outputs.add(part)
            if outputs:
                outputs.finish(totals)


def check_options(opt: argparse.Namespace) -> None:
    """Refuse contradictions before anything is read.

    Raises:
        InputError: two options exclude each other.
    """
    if opt.image_folder and (opt.input_h5 or opt.input_json):
        raise InputError("--image_folder and --input_h5/--input_json exclude each other", expected="one of them")
    if bool(opt.input_h5) != bool(opt.input_json):
        raise InputError("--input_h5 and --input_json belong together", expected="both, or neither")
    if opt.coco_json and not opt.image_folder:
        raise InputError("--coco_json lists files by name only", remedy="say where they are with --image_folder")
    if opt.write_txt and not opt.image_folder:
        raise InputError("--write_txt writes beside photos", remedy="name their folder with --image_folder")
    if opt.language_eval and opt.image_folder and not opt.references:
        raise InputError("--language_eval needs known captions", remedy="name a file of them with --references")
    if opt.references and not opt.language_eval:
        raise InputError("--references are for scoring", remedy="add --language_eval 1")
    if opt.resume and not (opt.output or dumps_page(opt)):
        raise InputError("--resume has nothing to go on from", remedy="keep results with --output or --vis_dir")


def dumps_page(opt: argparse.Namespace) -> bool:
    """Whether the page is wanted."""
    return bool(opt.vis_dir) and opt.dump_json


def open_source(opt: argparse.Namespace, model: "Checkpoint") -> "Source":
    """The pictures the options ask for."""
    from captioner.data.dataset import Dataset
    from captioner.inference.load import require_same_vocabulary
    from captioner.inference.sources import open_coco_list, open_folder, open_split

    if opt.image_folder:
        limit = -1 if opt.num_images is None else opt.num_images
        if opt.coco_json:
            return open_coco_list(opt.coco_json, opt.image_folder, limit)
        return open_folder(opt.image_folder, opt.recursive, limit)
    h5, described = opt.input_h5 or model.opt.get("input_h5"), opt.input_json or model.opt.get("input_json")
    if not (h5 and described) or not opt.model:
        raise InputError(
            "no pictures to caption", remedy="give --image_folder FOLDER, or --input_h5 FILE with --input_json FILE"
        )
    dataset = Dataset.open(h5, described)
    require_same_vocabulary([(opt.model[0], model.vocab), (described, dataset.vocab)])
    limit = NUM_IMAGES_OF_A_SPLIT if opt.num_images is None else opt.num_images
    return open_split(dataset, opt.split, opt.image_root, limit)


def search_options(opt: argparse.Namespace, model: "Checkpoint") -> "SearchOptions":
    """How to search: what the user says, else what suits the model."""
    from captioner.search import SearchOptions

    suppress_unk = model.decoding.get("suppress_unk", 0) if opt.suppress_unk is None else opt.suppress_unk
    unk = model.vocab.unk_id
    return SearchOptions(
        beam_size=max(opt.beam_size, opt.n_best),
        sample=not opt.sample_max,
        temperature=opt.temperature,
        top_k=opt.top_k,
        top_p=opt.top_p,
        length_penalty=opt.length_penalty,
        min_length=opt.min_length,
        no_repeat_ngram=opt.no_repeat_ngram,
        suppress=(unk,) if suppress_unk and unk else (),
        n_best=opt.n_best,
        groups=opt.diverse_groups,
        group_penalty=opt.diversity,
    )


def choose_batch_size(opt: argparse.Namespace, model: "Checkpoint", device: "torch.device") -> int:
    """What the user says (0: as in training); 1, the original's default, stands for what is fast here."""
    import torch

    if opt.batch_size == 0:
        return int(model.opt.get("batch_size", 16))
    if opt.batch_size > 1:
        return opt.batch_size
    if device.type != "cuda":
        return 8  # caches are warm, and the first caption does not wait for a large batch
    free, _ = torch.cuda.mem_get_info(device)
    return max(1, min(256, free // BYTES_PER_IMAGE))


class Outputs:
    """Everything that happens to captions: stdout, journal, page, text files, result file, scores.

    Args:
        source: where the pictures are, for the page and for text files.
    """

    def __init__(self, opt: argparse.Namespace, source: "Source", captioner: "Captioner") -> None:
        from captioner.output.page import VisWriter
        from captioner.output.results import Journal, require_known_suffix

        self.opt, self.source, self.vocab = opt, source, captioner.vocab
        self.output = Path(opt.output) if opt.output else None
        journal_path = None
        if dumps_page(opt):
            journal_path = require_writable_folder(opt.vis_dir, "the page") / "vis.journal"
        if self.output:
            require_known_suffix(self.output)
            require_writable_folder(self.output.parent, "results")
            journal_path = self.output.with_name(self.output.name + ".journal")
        self.vis = VisWriter(opt.vis_dir) if dumps_page(opt) else None
        self.journal = Journal(journal_path, self._fingerprint(), opt.resume) if journal_path else None
        self.num_done = self.journal.num_done if self.journal else 0
        if self.num_done:
            log.info("going on after %d of %d images", self.num_done, len(source))
        self.to_score: list[dict] = list(self.journal.rows()) if self.journal and opt.language_eval else []

    def __enter__(self) -> "Outputs":
        return self

    def __exit__(self, *_: object) -> None:
        if self.journal:
            self.journal.close()

    def _fingerprint(self) -> str:
        ignored = {"resume", "num_workers", "batch_size", "gpuid", "backend", "vis_dir", "output"}
        options = {name: value for name, value in vars(self.opt).items() if name not in ignored}
        text = json.dumps([options, self.source.fingerprint()], sort_keys=True)
        return hashlib.blake2b(text.encode(), digest_size=10).hexdigest()

    def add(self, evaluated: "Evaluated") -> None:
        """Take the captions of a batch; batches come in order."""
        from captioner.inference.captioner import result_rows

        for name, reason in evaluated.skipped:
            log.warning("skipped %s", reason if name in reason else f"{name}: {reason}")
        rows = result_rows(evaluated, self.vocab, self.opt.min_confidence)
        if self.vis and self.opt.dump_images:
            pictures = [self.source.picture(position) for position in evaluated.positions]
            names = self.vis.add_pictures(list(zip((row["image_id"] for row in rows), pictures, strict=True)))
            for row, name in zip(rows, names, strict=True):
                row["image"] = name
        for position, row in zip(evaluated.positions, rows, strict=True):
            if self.opt.write_txt:
                self._write_txt(position, row["caption"])
            print(f"image {row['image_id']}: {row['caption']}  ({row['file_name']})", flush=True)
        self.num_done += len(evaluated.positions) + len(evaluated.skipped)
        if self.opt.language_eval:
            self.to_score += rows
        if self.journal:
            self.journal.append(rows, self.num_done)

    def _write_txt(self, position: int, caption: str) -> None:
        photo = self.source.picture(position)
        assert isinstance(photo, Path)
        path = photo.with_suffix(".txt")
        if path.exists() and not self.opt.overwrite:
            log.warning("kept %s, which exists (--overwrite 1 replaces it)", path)
            return
        with atomic_write(path, "w", encoding="utf-8") as stream:
            stream.write(caption + "\n")

    def finish(self, totals: "Totals") -> None:
        """Write the result file and the page, and report loss and scores.

        Raises:
            InputError: not a single picture could be read.
        """
        from captioner.output.results import write_results

        if self.num_done and not totals.num_captioned and totals.num_skipped == self.num_done:
            if self.journal:
                self.journal.remove()  # there is nothing to go on from
            raise InputError(f"none of the {self.num_done} pictures could be read", remedy="see the lines above")
        scores = self._score() if self.opt.language_eval else {}
        if self.journal:
            if self.output:
                write_results(self.output, self.journal.rows())
                log.info("results: %s", self.output)
            if self.vis:
                page = self.vis.finish(self.journal.rows(), scores)
                log.info("page: %s (to look at it: python -m http.server --directory %s)", page, page.parent)
            self.journal.remove()
        skipped = f", {totals.num_skipped} skipped" if totals.num_skipped else ""
        log.info("%d images captioned%s", totals.num_captioned, skipped)
        if totals.loss is not None:
            log.info("loss: %.6f", totals.loss)
        if scores:
            log.info("%s", "  ".join(f"{name} {value:.4f}" for name, value in scores.items()))

    def _score(self) -> dict[str, float]:
        """coco-caption's scores of what was captioned; images without known captions are left out."""
        from captioner.metrics import score
        from captioner.metrics.pairing import Prediction, join, read_references

        predictions = [Prediction(row["image_id"], row["file_name"], row["caption"], "") for row in self.to_score]
        references = read_references(self.opt.references) if self.opt.references else self.source.references()
        joined = join(predictions, references)
        if joined.unmatched_predictions:
            log.info("%d images have no known captions and are not scored", len(joined.unmatched_predictions))
        scores = score([one.caption for one, _ in joined.pairs], [known.captions for _, known in joined.pairs])
        for name, reason in scores.skipped.items():
            log.warning("%s skipped because %s", name, reason)
        return scores.corpus


if __name__ == "__main__":
    raise SystemExit(main())
