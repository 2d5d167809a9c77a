"""What caption-train builds from its options before the first iteration."""

import argparse
import dataclasses
import math
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from captioner.errors import InputError
from captioner.training import presets

if TYPE_CHECKING:  # torch is imported late, so that --help and argument errors are instant
    import numpy as np
    import torch

    from captioner.data.dataset import Dataset
    from captioner.model.caption_model import CaptionModel
    from captioner.model.checkpoint import Checkpoint
    from captioner.runtime.processes import Processes
    from captioner.training.run_files import RunFiles
    from captioner.training.trainer import Trainer


def files_of(opt: argparse.Namespace, stage: int | None = None) -> "RunFiles":
    """The files of a run; those of a stage of it, by default its own, carry the stage's number in their names."""
    from captioner.training.run_files import RunFiles

    stage = stage or opt.stage
    return RunFiles(Path(opt.checkpoint_path or "."), opt.id + (f"_stage{stage}" if stage else ""))


def last_iteration(opt: argparse.Namespace, num_images: int) -> int | None:
    """Where --max_iters or --epochs ends a run over so many training images; None: nowhere."""
    if opt.epochs > 0:
        return math.ceil(opt.epochs * num_images / opt.batch_size)
    return opt.max_iters if opt.max_iters >= 0 else None


def validation_images(opt: argparse.Namespace, dataset: "Dataset") -> "np.ndarray":
    """The images that say which model is best: int64 rows of the data set."""
    indices = dataset.captioned_indices("val")
    return indices if opt.val_images_use < 0 else indices[: opt.val_images_use]


def fresh_checkpoint(opt: argparse.Namespace, dataset: "Dataset") -> "Checkpoint":
    """A new run: weights from --start_from, or VGG16's for the CNN and random ones for the rest."""
    import torch

    from captioner.convert.torchvision import read_cnn_weights
    from captioner.model.caption_model import CaptionModel
    from captioner.model.checkpoint import Checkpoint, bundled_model_path, load_checkpoint
    from captioner.model.config import ModelConfig
    from captioner.model.grow_vocab import grow_vocab

    decoding = {"suppress_unk": 1}
    if opt.start_from:
        if opt.stage == 2 and not Path(opt.start_from).exists():
            raise InputError(
                f"{opt.start_from}: no such file, and stage 2 starts from the best model of stage 1",
                remedy="run --stages 1,2, or name a model with --start_from",
            )
        start = load_checkpoint(bundled_model_path() if opt.start_from == "bundled" else opt.start_from)
        if opt.grow_vocab:
            start = grow_vocab(start, dataset.vocab, dataset.max_length, opt.seed)
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
    move = ", or move it to this data with --start_from and --grow_vocab 1"
    if record.vocab != dataset.vocab:
        raise InputError(
            f"{opt.input_json}: its {dataset.vocab.size} words are not the model's {record.vocab.size} words",
            remedy="prepare the data with the model's vocabulary" + move,
        )
    if record.config.max_length != dataset.max_length:
        raise InputError(
            f"{opt.input_h5}: labels have {dataset.max_length} words, the model {record.config.max_length}",
            remedy="prepare the data with the model's --max_length" + move,
        )


def make_trainer(
    opt: argparse.Namespace, model: "CaptionModel", dtype: "torch.dtype", processes: "Processes"
) -> "Trainer":
    """The update rules as the options name them."""
    from captioner.training.trainer import Rule, Trainer

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
    from captioner.runtime.precision import inference_dtype
    from captioner.training.feature_cache import cached_features

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


def plan(stages: list[argparse.Namespace], device: "torch.device", processes: "Processes") -> Iterator[str]:
    """What --plan 1 prints, line by line; nothing is written or fetched, and no state is looked for."""
    from captioner.data.dataset import Dataset

    record = None  # stage 2 goes on with the model of stage 1, which needs no training to be measured
    for opt in stages:
        dataset = Dataset.open(opt.input_h5, opt.input_json)
        if record is None:
            # torchvision's weights have the shapes of random ones, and need not be downloaded for a plan.
            weights = {"cnn_model": "random"} if opt.cnn_model == "imagenet" else {}
            record = fresh_checkpoint(argparse.Namespace(**{**vars(opt), **weights}), dataset)
            require_matching(record, dataset, opt)
        if opt.preset:
            yield presets.describe(opt.preset, opt.stage, vars(opt))
        yield from plan_stage(opt, record, dataset, device, processes)


def plan_stage(
    opt: argparse.Namespace, record: "Checkpoint", dataset: "Dataset", device: "torch.device", processes: "Processes"
) -> Iterator[str]:
    """The plan of one stage: measure a few iterations of this process's share, with the CNN frozen and fine-tuned."""
    from captioner.data.batches import VALIDATION_BATCH
    from captioner.model.caption_model import build_model
    from captioner.runtime.precision import inference_dtype, training_dtype
    from captioner.runtime.processes import Processes
    from captioner.training.plan import Plan, measure, seconds_per_image, stand_in_features, validation_bytes

    indices = dataset.captioned_indices("train")
    val_indices = validation_images(opt, dataset)
    model = build_model(record).to(device)
    yield (
        f"data         {len(indices):,} training and {len(val_indices):,} validation images,"
        f" {dataset.vocab.size:,} words"
    )
    used = [
        name
        for name, part in (("frozen", opt.finetune_cnn_after != 0), ("fine-tuning", opt.finetune_cnn_after >= 0))
        if part
    ]
    features = None
    if opt.cache_features:
        features = stand_in_features(len(dataset.info), opt.cache_features, model.encoder.feature_size)
    share = len(processes.share(opt.batch_size))
    kinds = {}
    for name in ("frozen", "fine-tuning"):
        finetune = name == "fine-tuning"
        kind_opt = argparse.Namespace(**{**vars(opt), "finetune_cnn_after": 0 if finetune else -1})
        kinds[name] = measure(
            make_trainer(kind_opt, model, training_dtype(opt.precision, device), Processes()),
            dataset,
            indices,
            finetune=finetune,
            features=None if finetune else features,
            batch_size=share,
            seq_per_img=opt.seq_per_img,
            timed=name in used,
        )
    yield from Plan(
        model,
        kinds,
        used,
        batch_size=share,
        iterations_per_epoch=len(indices) / opt.batch_size,
        iterations=last_iteration(opt, len(indices)),
        feature_cache=0 if features is None else features.nbytes,
        validation_images=0 if opt.cache_features else len(val_indices),
        validation_every=opt.save_checkpoint_every,
        image_seconds=seconds_per_image(model, device, inference_dtype(opt.precision, device)),
        validation_bytes=0 if opt.cache_features else validation_bytes(model, device, VALIDATION_BATCH),
        device=device,
        folder=Path(opt.checkpoint_path or "."),
    ).lines()
