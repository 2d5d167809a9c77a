"""The options of caption-train: the original's under their own names and defaults, then ours."""

import argparse
import dataclasses
from collections.abc import Sequence
from typing import Any, get_args

from captioner.cli.options import (
    OneOrSeveral,
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
    part_of_a_name,
    positive,
    positive_factor,
    proper_share,
    seed_number,
    share,
    small_size,
    temperature,
    width,
    workers,
)
from captioner.model.choices import CNN_LAYERS, DECODERS, PIXELS
from captioner.training.options import CNN_RULES, RULES, CacheType, FlipFeatures, Schedule, TrainingOptions
from captioner.training.presets import PRESETS, STAGE_LISTS


def build_parser() -> Parser:
    """All options, in groups."""
    p = Parser(prog="caption-train", description="Train a captioning model on a dataset made by caption-prepro.")
    recipe = p.add_argument_group("recipe")
    recipe.add_argument(
        "--preset",
        choices=tuple(PRESETS),
        help="values that work for COCO, for Flickr8k, or for a few hundred photos of your own; options given "
        "besides come before them",
    )
    recipe.add_argument(
        "--stages",
        choices=STAGE_LISTS,
        metavar="STAGE[,STAGE]",
        help="stages of the preset to run: 1 with a frozen CNN, 2 fine-tunes it from there, 3 rewards captions; by "
        "default all",
    )
    data = p.add_argument_group("data")
    data.add_argument(
        "--input_h5",
        nargs="+",
        action=OneOrSeveral,
        metavar="FILE",
        help="dataset: images and labels; several become one dataset, with the words of all",
    )
    data.add_argument(
        "--input_json",
        nargs="+",
        action=OneOrSeveral,
        metavar="FILE",
        help="dataset: vocabulary, splits, ids; one for each --input_h5",
    )
    data.add_argument("--cnn_proto", help="accepted; the layers of VGG16 are known")
    data.add_argument(
        "--cnn_model",
        help="VGG16 weights: a torchvision .pth (whole or convolutions only), a .caffemodel, "
        "imagenet (torchvision's download) or random",
    )
    data.add_argument(
        "--start_from", help="checkpoint whose weights to start from; bundled is the model of caption-eval"
    )
    data.add_argument(
        "--grow_vocab",
        type=flag,
        help="with --start_from: give the model the words of the data that it does not know, too",
    )
    data.add_argument(
        "--resume",
        help="auto: go on exactly from the state in checkpoint_path, or start afresh if there is none; "
        "or the path of a …_resume.pt",
    )
    model = p.add_argument_group("model")
    model.add_argument("--rnn_size", type=width, help="hidden units of the LSTM, per layer")
    model.add_argument("--num_layers", type=layers, help="layers of the LSTM")
    model.add_argument("--input_encoding_size", type=width, help="size of word and image encodings")
    model.add_argument("--drop_prob_lm", type=proper_share, help="dropout in the language model")
    model.add_argument(
        "--decoder",
        choices=DECODERS,
        help="lstm: the original's, which sees the image once; attention: looks at a grid of the photo for every word",
    )
    model.add_argument(
        "--attention_heads", type=Range(int, 1, 64), help="places looked at at a time; they divide --rnn_size"
    )
    model.add_argument("--drop_prob_words", type=proper_share, help="attention: dropout of the embedded words")
    model.add_argument("--drop_prob_features", type=proper_share, help="attention: dropout of the grid")
    model.add_argument(
        "--cnn_layer",
        choices=CNN_LAYERS,
        help="image feature: fc7; the last convolution, averaged, or with --decoder attention its 7x7 grid (pool5) or "
        "its 14x14 grid before the last pooling (conv5_3)",
    )
    model.add_argument(
        "--cnn_pixels",
        choices=PIXELS,
        help="pixel convention of the weights; by default what the kind of file implies; data: mean and standard "
        "deviation of the training pictures, for a CNN that no others have trained (--cnn_model random)",
    )
    optim = p.add_argument_group("optimisation")
    optim.add_argument("--max_iters", type=never_or_from, help="iterations to run; -1 is forever")
    optim.add_argument("--epochs", type=factor, help="passes over the training images instead of --max_iters")
    optim.add_argument("--batch_size", type=images_at_once, help="images per iteration, over all processes")
    optim.add_argument("--accumulate", type=images_at_once, help="parts each batch is cut into to save memory")
    optim.add_argument("--grad_clip", type=positive_factor, help="clamp gradient elements to ± this")
    optim.add_argument("--finetune_cnn_after", type=never_or_from, help="iteration to start training the CNN; -1 never")
    optim.add_argument("--finetune_cnn_layers", type=Range(int, 1, 5), help="first convolution block to fine-tune")
    optim.add_argument("--seq_per_img", type=small_size, help="captions per image and iteration")
    optim.add_argument(
        "--self_critical_after",
        type=never_or_from,
        help="iteration from which captions are sampled and rewarded by CIDEr-D (Rennie et al. 2017); -1 never. Best "
        "in a run of its own: 0, with --start_from and a lower --learning_rate",
    )
    optim.add_argument("--self_critical_samples", type=small_size, help="captions sampled per image")
    optim.add_argument("--self_critical_temperature", type=temperature, help="of the softmax they are drawn from")
    optim.add_argument("--self_critical_bleu", type=factor, help="weight of BLEU-4 in the reward, beside CIDEr-D")
    optim.add_argument("--optim", choices=RULES, help="update rule of the language model")
    optim.add_argument("--learning_rate", type=positive_factor, help="learning rate of the language model")
    optim.add_argument("--learning_rate_decay_start", type=never_or_from, help="iteration to start decaying; -1 never")
    optim.add_argument("--learning_rate_decay_every", type=positive, help="iterations to halve the rate")
    optim.add_argument("--optim_alpha", type=proper_share, help="alpha: adagrad, rmsprop, momentum, adam")
    optim.add_argument("--optim_beta", type=proper_share, help="beta: adam")
    optim.add_argument("--optim_epsilon", type=positive_factor, help="epsilon in denominators")
    optim.add_argument("--cnn_optim", choices=CNN_RULES, help="update rule of the CNN")
    optim.add_argument("--cnn_optim_alpha", type=proper_share, help="alpha: momentum of the CNN's rule")
    optim.add_argument("--cnn_optim_beta", type=proper_share, help="beta: adam of the CNN")
    optim.add_argument("--cnn_learning_rate", type=positive_factor, help="learning rate of the CNN")
    optim.add_argument("--cnn_weight_decay", type=factor, help="L2 weight decay of the CNN")
    optim.add_argument("--shuffle", type=flag, help="new order each epoch; 0: the original's fixed order")
    optim.add_argument(
        "--source_weights",
        metavar="NAME=WEIGHT,..",
        help="of a dataset of several inputs: how often an epoch has the images of each (the json's `source`); 1 for "
        "those not named",
    )
    optim.add_argument("--weight_decay", type=factor, help="of the language model's weights, with --optim adamw")
    optim.add_argument(
        "--grad_norm", type=factor, help="scale the gradients down to this norm, instead of --grad_clip; 0: do not"
    )
    optim.add_argument(
        "--lr_schedule",
        choices=get_args(Schedule),
        help="decay: the original's, as the two options above say; cosine: down to 0 at the end of the run; plateau: "
        "half after every --patience validations without a better model",
    )
    optim.add_argument("--warmup", type=non_negative, help="iterations in which the learning rates rise from 0")
    optim.add_argument(
        "--ema",
        type=proper_share,
        metavar="DECAY",
        help="validate and save the running average of the weights, of which each update keeps this part (0.999, say)",
    )
    optim.add_argument(
        "--label_smoothing",
        type=proper_share,
        help="part of each target's probability that is spread over all words; the training loss shows it",
    )
    augmentation = p.add_argument_group("augmentation")
    augmentation.add_argument(
        "--augment_flip",
        type=share,
        help="part of the training images that are mirrored, with left and right exchanged in their (English) captions",
    )
    augmentation.add_argument(
        "--augment_rotation", type=Range(float, 0, 45), help="degrees up to which training images are turned"
    )
    augmentation.add_argument(
        "--augment_colour",
        type=proper_share,
        help="part by which brightness, contrast and saturation of training images change at most",
    )
    augmentation.add_argument(
        "--flip_features",
        choices=get_args(FlipFeatures),
        help="with --cache_features: photo computes mirrored images' features too (twice the time and disk); grid "
        "mirrors the cached grid, which is nearly the same and costs nothing",
    )
    evaluation = p.add_argument_group("evaluation and checkpoints")
    evaluation.add_argument("--val_images_use", type=all_or_some, help="validation images; -1 all")
    evaluation.add_argument("--save_checkpoint_every", type=positive, help="iterations between evaluations")
    evaluation.add_argument("--checkpoint_path", help="folder for checkpoints; empty is the current one")
    evaluation.add_argument("--language_eval", type=flag, help="choose the best checkpoint by CIDEr")
    evaluation.add_argument(
        "--patience",
        type=non_negative,
        help="end the run after so many validations without a better model (see --lr_schedule plateau, too); 0: never",
    )
    evaluation.add_argument("--losses_log_every", type=non_negative, help="iterations between logged losses; 0: none")
    evaluation.add_argument(
        "--tensorboard", type=flag, help="also write curves for TensorBoard, beside the checkpoints"
    )
    evaluation.add_argument("--id", type=part_of_a_name, help="name of this run, part of its file names")
    machine = p.add_argument_group("machine")
    machine.add_argument(
        "--plan",
        type=flag,
        help="1: only say what the run would take in parameters, memory, disk and time; nothing is written",
    )
    machine.add_argument("--backend", choices=("cudnn", "nn"), help="accepted; without effect here")
    machine.add_argument("--seed", type=seed_number, help="random number seed")
    machine.add_argument("--gpuid", type=gpu_number, help="GPU to use; -1 is the CPU")
    machine.add_argument("--precision", choices=("auto", "fp32", "bf16"), help="auto: bf16 where the hardware has it")
    machine.add_argument("--num_workers", type=workers, help="threads that read batches ahead")
    machine.add_argument(
        "--cache_features",
        type=Range(int, 0, 1000),
        metavar="CROPS",
        help="compute what the CNN makes of the centre crop (1) or of so many crops once, beside the h5; while it "
        "stays as it is, or with --finetune_cnn_layers 5",
    )
    machine.add_argument(
        "--cache_type",
        choices=get_args(CacheType),
        help="number format of cached features; uint8: roots in 256 steps, half of float16's disk; auto: float32 for "
        "vectors, float16 for grids",
    )
    defaults = {option.name: option.default for option in dataclasses.fields(TrainingOptions)}
    del defaults["stage"]  # no option: it follows from --stages
    p.set_defaults(**{k: str(int(v)) if isinstance(v, bool) else v for k, v in defaults.items()}, plan="0")
    return p


def given_options(parser: Parser, argv: Sequence[str] | None) -> dict[str, Any]:
    """The options that are given in `argv`, by name; the defaults of the others stand in TrainingOptions."""
    not_given = object()
    namespace = argparse.Namespace(**dict.fromkeys(vars(parser.parse_args([])), not_given))
    return {name: value for name, value in vars(parser.parse_args(argv, namespace)).items() if value is not not_given}
