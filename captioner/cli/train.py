"""caption-train: train a captioning model (original: train.lua)."""

import argparse
import dataclasses
import itertools
import logging
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from captioner.cli.options import Parser, flag, non_negative, positive, run
from captioner.errors import InputError
from captioner.files import require_writable_folder

if TYPE_CHECKING:  # torch is imported late, so that --help and argument errors are instant
    import numpy as np
    import torch

    from captioner.checkpoint import Checkpoint, ResumeState
    from captioner.dataset import Dataset
    from captioner.device import Processes
    from captioner.model import CaptionModel
    from captioner.training import Trainer

log = logging.getLogger(__name__)

AGREE_EVERY = 10  # iterations between two rounds in which several processes ask each other whether to stop
VALIDATION_BATCH = 32  # results do not depend on it
# Options that may differ between a run and its continuation without a word.
UNRELATED_TO_THE_RESULT = {"resume", "num_workers", "gpuid", "backend", "max_iters", "epochs", "losses_log_every"}


def build_parser() -> Parser:
    """The command's options: the original's under their own names and defaults, then ours."""
    p = Parser(prog="caption-train", description="Train a captioning model on a dataset made by caption-prepro.")
    data = p.add_argument_group("data")
    data.add_argument("--input_h5", default="coco/data.h5", help="dataset: images and labels")
    data.add_argument("--input_json", default="coco/data.json", help="dataset: vocabulary, splits, ids")
    data.add_argument("--cnn_proto", default="", help="accepted; the layers of VGG16 are known")
    data.add_argument(
        "--cnn_model",
        default="imagenet",
        help="VGG16 weights: a torchvision .pth (whole or convolutions only), a .caffemodel, "
        "imagenet (torchvision's download) or random",
    )
    data.add_argument("--start_from", default="", help="checkpoint whose weights to start from")
    data.add_argument(
        "--resume",
        default="",
        help="auto: go on exactly from the state in checkpoint_path, or start afresh if there is none; "
        "or the path of a …_resume.pt",
    )
    model = p.add_argument_group("model")
    model.add_argument("--rnn_size", type=positive, default=512, help="hidden units of the LSTM, per layer")
    model.add_argument("--num_layers", type=positive, default=1, help="layers of the LSTM")
    model.add_argument("--input_encoding_size", type=positive, default=512, help="size of word and image encodings")
    model.add_argument("--drop_prob_lm", type=float, default=0.5, help="dropout in the language model")
    model.add_argument(
        "--cnn_layer",
        choices=("fc7", "pool5"),
        default="fc7",
        help="image feature: fc7, or mean of the last convolution",
    )
    model.add_argument(
        "--cnn_pixels",
        choices=("caffe", "torchvision"),
        help="pixel convention of the weights; by default what the kind of file implies",
    )
    optim = p.add_argument_group("optimisation")
    optim.add_argument("--max_iters", type=int, default=-1, help="iterations to run; -1 is forever")
    optim.add_argument("--epochs", type=float, default=0, help="passes over the training images instead of --max_iters")
    optim.add_argument("--batch_size", type=positive, default=16, help="images per iteration, over all processes")
    optim.add_argument("--accumulate", type=positive, default=1, help="parts each batch is cut into to save memory")
    optim.add_argument("--grad_clip", type=float, default=0.1, help="clamp gradient elements to ± this")
    optim.add_argument(
        "--finetune_cnn_after", type=int, default=-1, help="iteration to start training the CNN; -1 never"
    )
    optim.add_argument(
        "--finetune_cnn_layers", type=int, choices=range(1, 6), default=1, help="first convolution block to fine-tune"
    )
    optim.add_argument("--seq_per_img", type=positive, default=5, help="captions per image and iteration")
    rules = ("rmsprop", "sgd", "sgdm", "sgdmom", "adagrad", "adam")
    optim.add_argument("--optim", choices=rules, default="adam", help="update rule of the language model")
    optim.add_argument("--learning_rate", type=float, default=4e-4, help="learning rate of the language model")
    optim.add_argument(
        "--learning_rate_decay_start", type=int, default=-1, help="iteration to start decaying; -1 never"
    )
    optim.add_argument("--learning_rate_decay_every", type=positive, default=50000, help="iterations to halve the rate")
    optim.add_argument("--optim_alpha", type=float, default=0.8, help="alpha: adagrad, rmsprop, momentum, adam")
    optim.add_argument("--optim_beta", type=float, default=0.999, help="beta: adam")
    optim.add_argument("--optim_epsilon", type=float, default=1e-8, help="epsilon in denominators")
    optim.add_argument("--cnn_optim", choices=("sgd", "sgdm", "adam"), default="adam", help="update rule of the CNN")
    optim.add_argument("--cnn_optim_alpha", type=float, default=0.8, help="alpha: momentum of the CNN's rule")
    optim.add_argument("--cnn_optim_beta", type=float, default=0.999, help="beta: adam of the CNN")
    optim.add_argument("--cnn_learning_rate", type=float, default=1e-5, help="learning rate of the CNN")
    optim.add_argument("--cnn_weight_decay", type=float, default=0, help="L2 weight decay of the CNN")
    optim.add_argument("--shuffle", type=flag, default="1", help="new order each epoch; 0: the original's fixed order")
    evaluation = p.add_argument_group("evaluation and checkpoints")
    evaluation.add_argument("--val_images_use", type=int, default=3200, help="validation images; -1 all")
    evaluation.add_argument(
        "--save_checkpoint_every", type=positive, default=2500, help="iterations between evaluations"
    )
    evaluation.add_argument("--checkpoint_path", default="", help="folder for checkpoints; empty is the current one")
    evaluation.add_argument("--language_eval", type=flag, default="0", help="choose the best checkpoint by CIDEr")
    evaluation.add_argument("--losses_log_every", type=positive, default=25, help="iterations between logged losses")
    evaluation.add_argument("--id", default="", help="name of this run, part of its file names")
    machine = p.add_argument_group("machine")
    machine.add_argument("--backend", choices=("cudnn", "nn"), default="cudnn", help="accepted; without effect here")
    machine.add_argument("--seed", type=non_negative, default=123, help="random number seed")
    machine.add_argument("--gpuid", type=int, default=0, help="GPU to use; -1 is the CPU")
    machine.add_argument("--precision", choices=("auto", "fp32", "bf16"), default="auto", help="auto: bf16 on GPUs")
    machine.add_argument("--num_workers", type=non_negative, default=2, help="threads that read batches ahead")
    machine.add_argument(
        "--cache_features",
        type=non_negative,
        default=0,
        metavar="CROPS",
        help="frozen CNN only: compute the features of the centre crop (1) or of so many crops once, beside the h5",
    )
    return p


def main(argv: Sequence[str] | None = None) -> int:
    opt = build_parser().parse_args(argv)
    return run("caption-train", lambda: train(opt))


def train(opt: argparse.Namespace) -> int:
    """Train until max_iters (or forever), resumable at any time; returns the exit code."""
    check_options(opt)

    from captioner.checkpoint import build_model
    from captioner.dataset import Dataset
    from captioner.device import choose_device, keep_freed_memory, process_group, training_dtype
    from captioner.loader import TrainingBatches, prefetch
    from captioner.optim import learning_rate
    from captioner.runs import Progress, RunFiles, StopRequest
    from captioner.training import LossMonitor

    keep_freed_memory()
    device = choose_device(opt.gpuid)
    dtype = training_dtype(opt.precision, device)
    with process_group(device) as processes, StopRequest() as stop:
        files = RunFiles(require_writable_folder(opt.checkpoint_path or ".", "checkpoints"), opt.id)
        dataset = Dataset.open(opt.input_h5, opt.input_json)
        train_indices = images_with_captions(dataset, "train", opt)
        resumed = find_resume_state(opt, files.resume)
        record = resumed.checkpoint if resumed else fresh_checkpoint(opt, dataset)
        require_matching(record, dataset, opt)
        model = build_model(record).to(device)
        trainer = make_trainer(opt, model, dtype, processes)
        processes.wait()  # everyone has looked for a state before the main process moves anything
        if resumed:
            trainer.restore_optimizers(resumed.optimizers, str(files.resume))
            log.info("resumed at iteration %d", record.iteration)
        elif processes.is_main:
            files.keep_previous()
        features = load_features(opt, trainer, dataset)
        batches = TrainingBatches(
            dataset,
            train_indices,
            batch_size=opt.batch_size,
            seq_per_img=opt.seq_per_img,
            seed=opt.seed,
            shuffle=opt.shuffle,
            features=features,
            share=processes.share,
        )
        jobs = (
            (lambda k=k: batches(k).pin() if device.type == "cuda" else batches(k))
            for k in itertools.count(record.iteration)
        )
        stream = prefetch(jobs, opt.num_workers, ahead=2 * opt.num_workers)
        validate = make_validation(opt, trainer, dataset, features)
        first_loss = resumed.first_loss if resumed else None
        monitor = LossMonitor(record.loss_history, first_loss, opt.losses_log_every, batches.describe)
        progress = Progress(len(train_indices), opt.batch_size)
        last_iteration = opt.max_iters
        if opt.epochs > 0:
            last_iteration = math.ceil(opt.epochs * len(train_indices) / opt.batch_size)
        log.info("%s", summary(model, dataset, len(train_indices), device, processes))

        for iteration in itertools.count(record.iteration):
            finished = iteration == last_iteration
            if (iteration % opt.save_checkpoint_every == 0 or finished) and iteration not in record.val_loss_history:
                monitor.flush()
                better = validate(record)
                files.save_checkpoints(record, trainer, better)
                files.save_state(record, trainer, monitor)
            if processes.size == 1 or iteration % AGREE_EVERY == 0:
                stopping = processes.largest(stop.signal)
            if finished or stopping or files.state_is_old():
                files.save_state(record, trainer, monitor)
            if finished or stopping:
                break

            batch = progress.next(stream)
            decay = learning_rate(
                iteration,
                base=1.0,
                decay_start=opt.learning_rate_decay_start,
                decay_every=opt.learning_rate_decay_every,
            )
            finetune = 0 <= opt.finetune_cnn_after <= iteration
            loss = trainer.step(batch, iteration, rate_factor=decay, finetune=finetune)
            record.iteration = iteration + 1

            monitor.note(iteration, loss)
            if iteration % opt.losses_log_every == 0:
                monitor.flush()
                progress.report(iteration, record.loss_history[iteration])

    if stopping:
        log.info("stopped at iteration %d; repeat the command with --resume auto to go on", record.iteration)
        return 128 + stopping
    log.info("done: %d iterations; best model: %s", record.iteration, files.best)
    return 0


def check_options(opt: argparse.Namespace) -> None:
    """Refuse contradictions before anything is read.

    Raises:
        InputError: two options exclude each other, or a value is out of range.
    """
    if opt.start_from and opt.resume not in ("", "auto"):
        raise InputError("--start_from and --resume FILE exclude each other", expected="one of them")
    if opt.max_iters >= 0 and opt.epochs > 0:
        raise InputError("--max_iters and --epochs exclude each other", expected="one of them")
    if opt.cache_features and opt.finetune_cnn_after >= 0:
        raise InputError(
            "--cache_features needs a frozen CNN, but --finetune_cnn_after trains it",
            remedy="train with cached features first, then fine-tune with --start_from",
        )
    if not 0 <= opt.drop_prob_lm < 1:
        raise InputError(f"--drop_prob_lm is {opt.drop_prob_lm}", expected="at least 0 and below 1")
    for name in ("grad_clip", "learning_rate", "cnn_learning_rate"):
        if not getattr(opt, name) > 0:
            raise InputError(f"--{name} is {getattr(opt, name)}", expected="a number above 0")
    if opt.cnn_proto:
        log.info("--cnn_proto is not needed: the layers of VGG16 are known")


def images_with_captions(dataset: "Dataset", split: str, opt: argparse.Namespace) -> "np.ndarray":
    """The images of a split that have at least one caption: int64."""
    indices = dataset.split_indices(split)
    indices = indices[dataset.label_end_ix[indices] >= dataset.label_start_ix[indices]]
    if not len(indices):
        raise InputError(f"{opt.input_json}: no image of split {split!r} has captions", remedy="prepare the data anew")
    return indices


def find_resume_state(opt: argparse.Namespace, own: Path) -> "ResumeState | None":
    """The state to go on from, as --resume asks; None starts afresh."""
    from captioner.checkpoint import load_resume_state

    if not opt.resume or (opt.resume == "auto" and not own.exists()):
        return None
    state = load_resume_state(own if opt.resume == "auto" else opt.resume)
    before = state.checkpoint.opt
    changed = [k for k, v in vars(opt).items() if k in before and before[k] != v and k not in UNRELATED_TO_THE_RESULT]
    if changed:
        log.info(
            "resuming with changed options: %s", ", ".join(f"{k} {before[k]} → {getattr(opt, k)}" for k in changed)
        )
    state.checkpoint.opt = vars(opt).copy()
    return state


def fresh_checkpoint(opt: argparse.Namespace, dataset: "Dataset") -> "Checkpoint":
    """A new run: weights from --start_from, or VGG16's for the CNN and random ones for the rest."""
    import torch

    from captioner.checkpoint import Checkpoint, load_checkpoint
    from captioner.convert.torchvision import read_cnn_weights
    from captioner.model import CaptionModel, ModelConfig

    decoding = {"suppress_unk": 1}
    if opt.start_from:
        start = load_checkpoint(opt.start_from)
        config = dataclasses.replace(start.config, drop_prob_lm=opt.drop_prob_lm)
        return Checkpoint(config, start.vocab, start.state_dict, opt=vars(opt).copy(), decoding=decoding)
    weights = read_cnn_weights(opt.cnn_model, opt.cnn_layer, opt.cnn_pixels)
    config = ModelConfig(
        vocab_size=dataset.vocab.size,
        max_length=dataset.max_length,
        encoding_size=opt.input_encoding_size,
        rnn_size=opt.rnn_size,
        num_layers=opt.num_layers,
        drop_prob_lm=opt.drop_prob_lm,
        cnn_layer=opt.cnn_layer,
        cnn_pixels=weights.pixels,
        conv_widths=weights.conv_widths,
        **({"fc_width": weights.fc_width} if weights.fc_width else {}),
    )
    torch.manual_seed(opt.seed)
    model = CaptionModel(config)
    model.encoder.load_state_dict(weights.state, strict=False)
    return Checkpoint(config, dataset.vocab, model.state_dict(), opt=vars(opt).copy(), decoding=decoding)


def require_matching(record: "Checkpoint", dataset: "Dataset", opt: argparse.Namespace) -> None:
    """The model's words must be the data set's, and its captions no longer than the labels."""
    if record.vocab != dataset.vocab:
        raise InputError(
            f"{opt.input_json}: its {dataset.vocab.size} words are not the model's {record.vocab.size} words",
            remedy="prepare the data with the model's vocabulary, or train a new model",
        )
    if record.config.max_length != dataset.max_length:
        raise InputError(
            f"{opt.input_h5}: labels have {dataset.max_length} words, the model {record.config.max_length}",
            remedy="prepare the data with the model's --max_length",
        )


def make_trainer(
    opt: argparse.Namespace, model: "CaptionModel", dtype: "torch.dtype", processes: "Processes"
) -> "Trainer":
    """The update rules as the options name them."""
    from captioner.training import Rule, Trainer

    epsilon = opt.optim_epsilon
    cnn_rule = Rule(opt.cnn_optim, opt.cnn_learning_rate, opt.cnn_optim_alpha, opt.cnn_optim_beta, epsilon)
    return Trainer(
        model,
        lm_rule=Rule(opt.optim, opt.learning_rate, opt.optim_alpha, opt.optim_beta, epsilon),
        cnn_rule=cnn_rule if opt.finetune_cnn_after >= 0 else None,
        finetune_from_block=opt.finetune_cnn_layers,
        grad_clip=opt.grad_clip,
        cnn_weight_decay=opt.cnn_weight_decay,
        accumulate=opt.accumulate,
        dtype=dtype,
        seed=opt.seed,
        processes=processes,
    )


def load_features(opt: argparse.Namespace, trainer: "Trainer", dataset: "Dataset") -> "np.ndarray | None":
    """The cached CNN features, computed by the main process if need be; None without --cache_features."""
    from captioner.device import inference_dtype
    from captioner.features import cached_features

    if not opt.cache_features:
        return None
    folder = Path(opt.input_h5).resolve().parent

    def load() -> "np.ndarray":
        return cached_features(
            trainer.model,
            dataset,
            folder,
            crops=opt.cache_features,
            device=trainer.device,
            dtype=inference_dtype(opt.precision, trainer.device),
            num_workers=opt.num_workers,
        )

    features = load() if trainer.processes.is_main else None
    trainer.processes.wait()
    return load() if features is None else features


def make_validation(
    opt: argparse.Namespace, trainer: "Trainer", dataset: "Dataset", features: "np.ndarray | None"
) -> "Callable[[Checkpoint], bool]":
    """A function that evaluates the model on the validation split.

    It enters loss, scores and captions into the record, and returns whether this is the best score so far: CIDEr with
    --language_eval, else the negated loss.
    """
    import torch

    from captioner.evaluate import Captioner, Totals, evaluate, result_rows
    from captioner.loader import dataset_batches, shares
    from captioner.search import SearchOptions

    search_options = SearchOptions(beam_size=1, suppress=(dataset.vocab.unk_id,) if dataset.vocab.unk_id else ())
    indices = images_with_captions(dataset, "val", opt)
    if opt.val_images_use >= 0:
        indices = indices[: opt.val_images_use]
    processes, device = trainer.processes, trainer.device

    def validate(record: "Checkpoint") -> bool:
        captioner = Captioner([trainer.model], dataset.vocab, device, torch.float32)
        totals = Totals()
        rows: list[tuple[int, dict]] = []
        positions = shares(len(indices), VALIDATION_BATCH, processes.rank, processes.size)
        batches = dataset_batches(dataset, indices, positions, opt.num_workers, features)
        with torch.autocast(device.type, dtype=trainer.dtype, enabled=trainer.dtype != torch.float32):
            for evaluated in evaluate(captioner, batches, search_options):
                totals.add(evaluated)
                rows += zip(evaluated.positions, result_rows(evaluated, dataset.vocab), strict=True)
        gathered = processes.gather((totals.loss_sum, totals.num_targets, rows))
        loss = sum(part[0] for part in gathered) / sum(part[1] for part in gathered)
        merged = [row for _, row in sorted((pair for part in gathered for pair in part[2]), key=lambda pair: pair[0])]
        record.val_loss_history[record.iteration] = loss
        record.val_predictions = [{"image_id": row["image_id"], "caption": row["caption"]} for row in merged]
        score, scored = -loss, ""
        if opt.language_eval:
            scores = language_scores([row["caption"] for row in merged], dataset, indices)
            record.val_lang_stats_history[record.iteration] = scores
            score, scored = scores["CIDEr"], f", CIDEr {scores['CIDEr']:.3f}"
        better = record.best_score is None or score > record.best_score
        record.best_score = score if better else record.best_score
        distinct = len({row["caption"] for row in merged})
        log.info(
            "validation at iteration %d: loss %.4f%s, %d distinct captions of %d%s",
            record.iteration,
            loss,
            scored,
            distinct,
            len(merged),
            " (best so far)" if better else "",
        )
        if record.iteration and distinct <= len(merged) / 10 and len(merged) >= 10:
            log.warning("warning: %d validation captions, %d distinct: the image may be ignored", len(merged), distinct)
        return better

    return validate


def language_scores(captions: list[str], dataset: "Dataset", indices: "np.ndarray") -> dict[str, float]:
    """coco-caption's scores that need no Java, by name."""
    from captioner.metrics import score

    return score(captions, [dataset.references_of(int(i)) for i in indices]).corpus


def summary(
    model: "CaptionModel", dataset: "Dataset", num_images: int, device: "torch.device", processes: "Processes"
) -> str:
    """One line on what is about to happen."""
    millions = sum(parameter.numel() for parameter in model.parameters()) / 1e6
    where = f"{device} × {processes.size} processes" if processes.size > 1 else str(device)
    return f"{num_images} training images, {dataset.vocab.size} words, {millions:.1f} M parameters, on {where}"


if __name__ == "__main__":
    raise SystemExit(main())
