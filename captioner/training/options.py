"""What a training run is asked for: every option of caption-train with its default, and the stages of a preset."""

import dataclasses
import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from captioner.errors import InputError
from captioner.model.choices import CnnLayer, DecoderKind, Pixels
from captioner.training.presets import OF_A_STAGE, PRESETS, STAGE_LISTS

log = logging.getLogger(__name__)

# The original's update rules, and adamw; those it has for the CNN.
RULES = ("rmsprop", "sgd", "sgdm", "sgdmom", "adagrad", "adam", "adamw")
CNN_RULES = ("sgd", "sgdm", "adam")
Schedule = Literal["decay", "cosine", "plateau"]
LARGEST_WEIGHT = 1000  # of a source
# What cached features of a mirrored photo are: the CNN's of that photo, or the photo's own grid, mirrored.
FlipFeatures = Literal["photo", "grid"]
# Number formats of cached features; auto: float32 for vectors, float16 for grids.
CacheType = Literal["auto", "float32", "float16", "uint8"]


@dataclass(frozen=True)
class TrainingOptions:
    """The options of one run, or of one stage of it; `caption-train --help` says what each of them means.

    Names and defaults are the original's where it has the option. The checkpoint and the report keep them.
    """

    # recipe
    preset: str | None = None
    stages: str | None = None
    stage: int | None = None  # the stage of the preset that these options belong to
    # data
    input_h5: str | list[str] = "coco/data.h5"  # several, each with its json, become one data set
    input_json: str | list[str] = "coco/data.json"
    cnn_proto: str = ""
    cnn_model: str = "imagenet"
    start_from: str = ""
    grow_vocab: bool = False
    resume: str = ""
    # model
    rnn_size: int = 512
    num_layers: int = 1
    input_encoding_size: int = 512
    drop_prob_lm: float = 0.5
    decoder: DecoderKind = "lstm"
    attention_heads: int = 8
    drop_prob_words: float = 0.3
    drop_prob_features: float = 0.2
    cnn_layer: CnnLayer = "fc7"
    cnn_pixels: Pixels | None = None
    # optimisation
    max_iters: int = -1
    epochs: float = 0
    batch_size: int = 16
    accumulate: int = 1
    grad_clip: float = 0.1
    finetune_cnn_after: int = -1
    finetune_cnn_layers: int = 1
    seq_per_img: int = 5
    self_critical_after: int = -1
    self_critical_samples: int = 5
    self_critical_temperature: float = 0.5
    self_critical_bleu: float = 0
    optim: str = "adam"
    learning_rate: float = 4e-4
    learning_rate_decay_start: int = -1
    learning_rate_decay_every: int = 50000
    optim_alpha: float = 0.8
    optim_beta: float = 0.999
    optim_epsilon: float = 1e-8
    weight_decay: float = 0
    grad_norm: float = 0
    lr_schedule: Schedule = "decay"
    warmup: int = 0
    ema: float = 0
    label_smoothing: float = 0
    patience: int = 0
    cnn_optim: str = "adam"
    cnn_optim_alpha: float = 0.8
    cnn_optim_beta: float = 0.999
    cnn_learning_rate: float = 1e-5
    cnn_weight_decay: float = 0
    shuffle: bool = True
    source_weights: str = ""
    # augmentation
    augment_flip: float = 0
    augment_rotation: float = 0
    augment_colour: float = 0
    flip_features: FlipFeatures = "photo"
    # evaluation and checkpoints
    val_images_use: int = 3200
    save_checkpoint_every: int = 2500
    checkpoint_path: str = ""
    language_eval: bool = False
    losses_log_every: int = 25
    tensorboard: bool = False
    id: str = ""
    # machine
    backend: str = "cudnn"
    seed: int = 123
    gpuid: int = 0
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    num_workers: int = 2
    cache_features: int = 0
    cache_type: CacheType = "auto"

    @classmethod
    def of(cls, given: Mapping[str, Any]) -> "TrainingOptions":
        """The options with the given values, and the defaults for the rest.

        Raises:
            InputError: there is no such option.
        """
        known = {field.name for field in dataclasses.fields(cls)}
        unknown = sorted(given.keys() - known)
        if unknown:
            raise InputError(f"training has no option {unknown[0]!r}", remedy="caption-train --help lists them")
        values = {name: _plain(value) for name, value in given.items()}
        if values.get("decoder") == "attention":
            values.setdefault("cnn_layer", "pool5")  # whose grid it looks at
        return cls(**values)

    def check(self) -> None:
        """Refuse contradictions before anything is read.

        Raises:
            InputError: two options exclude each other, or a value is out of range.
        """
        if self.start_from and self.resume not in ("", "auto"):
            raise InputError("--start_from and --resume FILE exclude each other", expected="one of them")
        if self.grow_vocab and not self.start_from:
            raise InputError("--grow_vocab needs a model to start from", remedy="name it with --start_from")
        if self.max_iters >= 0 and self.epochs > 0:
            raise InputError("--max_iters and --epochs exclude each other", expected="one of them")
        if self.cache_features and self.finetune_cnn_after >= 0 and self.finetune_cnn_layers != 5:
            raise InputError(
                f"--cache_features with --finetune_cnn_after: what is cached would change from block "
                f"{self.finetune_cnn_layers} on",
                expected="--finetune_cnn_layers 5, which trains the last block from its cached inputs",
                remedy="or leave --cache_features out",
            )
        if self.cache_features and (self.augment_rotation or self.augment_colour):
            raise InputError(
                "--augment_rotation and --augment_colour change pixels, which --cache_features does not look at again",
                remedy="leave one of them out; --augment_flip goes with cached features",
            )
        self.weights_of_sources()
        if self.lr_schedule == "cosine" and self.max_iters < 0 and not self.epochs:
            raise InputError("--lr_schedule cosine needs an end", remedy="give --max_iters or --epochs")
        if self.lr_schedule == "plateau" and not self.patience:
            raise InputError("--lr_schedule plateau needs --patience", remedy="give the number of validations to wait")
        if self.weight_decay and self.optim != "adamw":
            raise InputError("--weight_decay belongs to --optim adamw", remedy="for the CNN: --cnn_weight_decay")
        if self.self_critical_after >= 0 and self.self_critical_samples < 2:
            raise InputError(
                "--self_critical_samples 1: a sample is judged by the others of its photo", expected="at least 2"
            )
        for name in ("ema", "label_smoothing"):
            if not 0 <= getattr(self, name) < 1:
                raise InputError(f"--{name} is {getattr(self, name)}", expected="at least 0 and below 1")
        for name in ("grad_clip", "learning_rate", "cnn_learning_rate"):
            if not getattr(self, name) > 0:
                raise InputError(f"--{name} is {getattr(self, name)}", expected="a number above 0")
        if {"/", "\\", "\0"} & set(self.id):
            raise InputError(f"--id {self.id!r} cannot be part of a file's name", remedy="leave out / and \\")
        if self.cnn_proto:
            log.info("--cnn_proto is not needed: the layers of VGG16 are known")

    def weights_of_sources(self) -> dict[str, float]:
        """What --source_weights says, by source.

        Raises:
            InputError: it is not NAME=WEIGHT, or several with commas between them.
        """
        found = {}
        for part in filter(None, self.source_weights.split(",")):
            name, _, weight = part.rpartition("=")
            try:
                found[name] = float(weight)
            except ValueError:
                found[name] = math.nan
            if not name or not 0 <= found[name] <= LARGEST_WEIGHT:
                raise InputError(
                    f"--source_weights {self.source_weights}: {part!r} is no weight",
                    expected=f"NAME=WEIGHT with a weight from 0 to {LARGEST_WEIGHT}, several with commas between them",
                )
        return found


def _plain(value: Any) -> Any:
    """Paths as text; one in a list is itself."""
    if isinstance(value, list | tuple):
        return _plain(value[0]) if len(value) == 1 else [_plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value


def stages_of(given: Mapping[str, Any]) -> list[TrainingOptions]:
    """The options of each stage to run; without a preset there is one.

    Args:
        given: options by name, only those that were given: they come before the preset's.

    Raises:
        InputError: an option that is unknown, or that no stage can follow.
    """
    asked = TrainingOptions.of(given)
    if not asked.preset:
        if asked.stages:
            raise InputError(
                "--stages needs a recipe", expected=f"--preset {'|'.join(PRESETS)}", remedy="or leave --stages out"
            )
        return [asked]
    if asked.preset not in PRESETS or asked.stages not in (None, *STAGE_LISTS):
        raise InputError(
            f"there is no preset {asked.preset!r} with stages {asked.stages!r}",
            expected=f"one of {', '.join(PRESETS)} with stages {' or '.join(STAGE_LISTS)}",
        )
    numbers = stage_numbers(asked)
    if missing := set(numbers) - set(PRESETS[asked.preset]):
        raise InputError(
            f"preset {asked.preset} has no stage {min(missing)}",
            expected=" or ".join(map(str, PRESETS[asked.preset])),
        )
    if len(numbers) > 1 and asked.resume not in ("", "auto"):
        raise InputError("--resume FILE is the state of one stage", remedy="add --stages with its number")
    stages = []
    for number in numbers:
        values = dict(PRESETS[asked.preset][number])
        if asked.max_iters >= 0:
            del values["epochs"]
        if asked.resume not in ("", "auto"):  # its weights come from there
            values.pop("start_from", None)
            values.pop("grow_vocab", None)
        own = given
        if len(numbers) > 1:  # each stage takes what is meant for it
            kept = OF_A_STAGE if number == numbers[0] else (*OF_A_STAGE, "start_from", "grow_vocab")
            own = {name: value for name, value in given.items() if name not in kept}
            if values["cache_features"] == 0:
                own["cache_features"] = 0
        stages.append(TrainingOptions.of({**values, **own, "stage": number}))
    return stages


def stage_numbers(options: TrainingOptions) -> list[int]:
    """The stages of the preset that are asked for, in order."""
    if options.stages:
        return [int(number) for number in options.stages.split(",")]
    return sorted(PRESETS[options.preset or ""])
