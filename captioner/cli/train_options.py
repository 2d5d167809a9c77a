"""The options of caption-train: the original's under their own names and defaults, then ours."""

import argparse
import logging
from collections.abc import Sequence

from captioner.cli.options import (
    Parser,
    Range,
    all_or_some,
    factor,
    flag,
    gpu_number,
    images_at_once,
    layers,
    never_or_from,
    non_negative,
    positive,
    positive_factor,
    proper_share,
    seed_number,
    small_size,
    width,
    workers,
)
from captioner.errors import InputError
from captioner.training.presets import PRESETS

log = logging.getLogger(__name__)


def build_parser() -> Parser:
    """All options, in groups."""
    p = Parser(prog="caption-train", description="Train a captioning model on a dataset made by caption-prepro.")
    p.set_defaults(stage=None)
    recipe = p.add_argument_group("recipe")
    recipe.add_argument(
        "--preset",
        choices=tuple(PRESETS),
        help="values that work for COCO, for Flickr8k, or for a few hundred photos of your own; options given "
        "besides come before them",
    )
    recipe.add_argument(
        "--stages",
        choices=("1", "2", "1,2"),
        help="stages of the preset to run: 1 with a frozen CNN, 2 fine-tunes it from there; by default both",
    )
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
    data.add_argument(
        "--start_from", default="", help="checkpoint whose weights to start from; bundled is the model of caption-eval"
    )
    data.add_argument(
        "--grow_vocab",
        type=flag,
        default="0",
        help="with --start_from: keep the model's words that the data has too, add the data's others, drop the rest",
    )
    data.add_argument(
        "--resume",
        default="",
        help="auto: go on exactly from the state in checkpoint_path, or start afresh if there is none; "
        "or the path of a …_resume.pt",
    )
    model = p.add_argument_group("model")
    model.add_argument("--rnn_size", type=width, default=512, help="hidden units of the LSTM, per layer")
    model.add_argument("--num_layers", type=layers, default=1, help="layers of the LSTM")
    model.add_argument("--input_encoding_size", type=width, default=512, help="size of word and image encodings")
    model.add_argument("--drop_prob_lm", type=proper_share, default=0.5, help="dropout in the language model")
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
    optim.add_argument("--max_iters", type=never_or_from, default=-1, help="iterations to run; -1 is forever")
    optim.add_argument(
        "--epochs", type=factor, default=0, help="passes over the training images instead of --max_iters"
    )
    optim.add_argument("--batch_size", type=images_at_once, default=16, help="images per iteration, over all processes")
    optim.add_argument(
        "--accumulate", type=images_at_once, default=1, help="parts each batch is cut into to save memory"
    )
    optim.add_argument("--grad_clip", type=positive_factor, default=0.1, help="clamp gradient elements to ± this")
    optim.add_argument(
        "--finetune_cnn_after", type=never_or_from, default=-1, help="iteration to start training the CNN; -1 never"
    )
    optim.add_argument(
        "--finetune_cnn_layers", type=Range(int, 1, 5), default=1, help="first convolution block to fine-tune"
    )
    optim.add_argument("--seq_per_img", type=small_size, default=5, help="captions per image and iteration")
    rules = ("rmsprop", "sgd", "sgdm", "sgdmom", "adagrad", "adam")
    optim.add_argument("--optim", choices=rules, default="adam", help="update rule of the language model")
    optim.add_argument(
        "--learning_rate", type=positive_factor, default=4e-4, help="learning rate of the language model"
    )
    optim.add_argument(
        "--learning_rate_decay_start", type=never_or_from, default=-1, help="iteration to start decaying; -1 never"
    )
    optim.add_argument("--learning_rate_decay_every", type=positive, default=50000, help="iterations to halve the rate")
    optim.add_argument("--optim_alpha", type=proper_share, default=0.8, help="alpha: adagrad, rmsprop, momentum, adam")
    optim.add_argument("--optim_beta", type=proper_share, default=0.999, help="beta: adam")
    optim.add_argument("--optim_epsilon", type=positive_factor, default=1e-8, help="epsilon in denominators")
    optim.add_argument("--cnn_optim", choices=("sgd", "sgdm", "adam"), default="adam", help="update rule of the CNN")
    optim.add_argument("--cnn_optim_alpha", type=proper_share, default=0.8, help="alpha: momentum of the CNN's rule")
    optim.add_argument("--cnn_optim_beta", type=proper_share, default=0.999, help="beta: adam of the CNN")
    optim.add_argument("--cnn_learning_rate", type=positive_factor, default=1e-5, help="learning rate of the CNN")
    optim.add_argument("--cnn_weight_decay", type=factor, default=0, help="L2 weight decay of the CNN")
    optim.add_argument("--shuffle", type=flag, default="1", help="new order each epoch; 0: the original's fixed order")
    evaluation = p.add_argument_group("evaluation and checkpoints")
    evaluation.add_argument("--val_images_use", type=all_or_some, default=3200, help="validation images; -1 all")
    evaluation.add_argument(
        "--save_checkpoint_every", type=positive, default=2500, help="iterations between evaluations"
    )
    evaluation.add_argument("--checkpoint_path", default="", help="folder for checkpoints; empty is the current one")
    evaluation.add_argument("--language_eval", type=flag, default="0", help="choose the best checkpoint by CIDEr")
    evaluation.add_argument(
        "--losses_log_every", type=non_negative, default=25, help="iterations between logged losses; 0: none"
    )
    evaluation.add_argument(
        "--tensorboard", type=flag, default="0", help="also write curves for TensorBoard, beside the checkpoints"
    )
    evaluation.add_argument("--id", default="", help="name of this run, part of its file names")
    machine = p.add_argument_group("machine")
    machine.add_argument(
        "--plan",
        type=flag,
        default="0",
        help="1: only say what the run would take in parameters, memory, disk and time; nothing is written",
    )
    machine.add_argument("--backend", choices=("cudnn", "nn"), default="cudnn", help="accepted; without effect here")
    machine.add_argument("--seed", type=seed_number, default=123, help="random number seed")
    machine.add_argument("--gpuid", type=gpu_number, default=0, help="GPU to use; -1 is the CPU")
    machine.add_argument(
        "--precision", choices=("auto", "fp32", "bf16"), default="auto", help="auto: bf16 where the hardware has it"
    )
    machine.add_argument("--num_workers", type=workers, default=2, help="threads that read batches ahead")
    machine.add_argument(
        "--cache_features",
        type=Range(int, 0, 1000),
        default=0,
        metavar="CROPS",
        help="frozen CNN only: compute the features of the centre crop (1) or of so many crops once, beside the h5",
    )
    return p


def stages_of(opt: argparse.Namespace, argv: Sequence[str] | None) -> list[argparse.Namespace]:
    """The options of each stage to run: one, `opt` itself, without --preset.

    Args:
        opt: what `argv` says without regard to the preset.

    Raises:
        InputError: an option that no stage can follow.
    """
    if not opt.preset:
        if opt.stages:
            raise InputError(
                "--stages needs a recipe", expected=f"--preset {'|'.join(PRESETS)}", remedy="or leave --stages out"
            )
        return [opt]
    numbers = [int(number) for number in (opt.stages or "1,2").split(",")]
    if len(numbers) > 1 and opt.resume not in ("", "auto"):
        raise InputError("--resume FILE is the state of one stage", remedy="add --stages 1 or --stages 2")
    stages = []
    for number in numbers:
        values = dict(PRESETS[opt.preset][number])
        if opt.max_iters >= 0:
            del values["epochs"]
        if opt.resume not in ("", "auto"):  # its weights come from there
            values.pop("start_from", None)
            values.pop("grow_vocab", None)
        parser = build_parser()
        parser.set_defaults(**values)
        stage = parser.parse_args(argv)
        stage.stage = number
        stages.append(stage)
    if len(stages) > 1:  # each stage takes what is meant for it
        stages[0].finetune_cnn_after = -1
        stages[1].cache_features = 0
        stages[1].start_from, stages[1].grow_vocab = "", False
    return stages


def check_options(opt: argparse.Namespace) -> None:
    """Refuse contradictions before anything is read.

    Raises:
        InputError: two options exclude each other.
    """
    if opt.start_from and opt.resume not in ("", "auto"):
        raise InputError("--start_from and --resume FILE exclude each other", expected="one of them")
    if opt.grow_vocab and not opt.start_from:
        raise InputError("--grow_vocab needs a model to start from", remedy="name it with --start_from")
    if opt.max_iters >= 0 and opt.epochs > 0:
        raise InputError("--max_iters and --epochs exclude each other", expected="one of them")
    if opt.cache_features and opt.finetune_cnn_after >= 0:
        raise InputError(
            "--cache_features needs a frozen CNN, but --finetune_cnn_after trains it",
            remedy="train with cached features first, then fine-tune with --start_from",
        )
    if opt.cnn_proto:
        log.info("--cnn_proto is not needed: the layers of VGG16 are known")
