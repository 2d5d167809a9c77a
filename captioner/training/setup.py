"""The parts of a training run, made as its options say."""

import dataclasses
import logging
import math
from collections.abc import Callable, Collection
from pathlib import Path

import numpy as np
import torch

from captioner.convert.torchvision import read_cnn_weights
from captioner.data.augmentation import Augmentation
from captioner.data.cached_features import CachedFeatures
from captioner.data.dataset import Dataset
from captioner.data.epoch_order import weights_by_source
from captioner.data.pixel_statistics import PixelStatistics
from captioner.errors import InputError
from captioner.model.caption_model import CaptionModel
from captioner.model.checkpoint import Checkpoint, TrainingHistory, bundled_model_path, load_checkpoint
from captioner.model.config import ModelConfig
from captioner.model.decoding import decoding_for_new_model
from captioner.model.encoder import VGG16_FC_WIDTH, GridEmbedding
from captioner.model.grow_vocab import grow_vocab
from captioner.runtime.precision import inference_dtype
from captioner.runtime.processes import Processes
from captioner.training.feature_cache import CacheForm, cached_features
from captioner.training.options import TrainingOptions, stage_numbers
from captioner.training.run_files import RunFiles
from captioner.training.trainer import Rule, Trainer

log = logging.getLogger(__name__)

OF_THE_SHAPE = {
    "rnn_size", "num_layers", "input_encoding_size", "attention_heads", "cnn_layer", "cnn_pixels"
}  # fmt: skip
PIXEL_PICTURES = 10_000  # tell mean and deviation to a fraction of a grey level
GRID_PHOTOS = 32  # that the scales of a new attending model are fitted to


def files_of(options: TrainingOptions, stage: int | None = None) -> RunFiles:
    """The files of a run; those of a stage of it, by default its own, carry the stage's number in their names."""
    stage = stage or options.stage
    return RunFiles(Path(options.checkpoint_path or "."), options.id + (f"_stage{stage}" if stage else ""))


def best_of_stage_before(options: TrainingOptions) -> Path:
    """The model that a later stage of a preset starts from: of the nearest stage before it that is asked for; if it is
    the first, of the nearest that has a model."""
    assert options.stage
    asked = [number for number in stage_numbers(options) if number < options.stage]
    found = [number for number in range(1, options.stage) if files_of(options, number).best.exists()]
    return files_of(options, max(asked or found, default=options.stage - 1)).best


def last_iteration(options: TrainingOptions, num_images: int) -> int | None:
    """Where --max_iters or --epochs ends a run over so many training images; None: nowhere."""
    if options.epochs > 0:
        return math.ceil(options.epochs * num_images / options.batch_size)
    return options.max_iters if options.max_iters >= 0 else None


def validation_images(options: TrainingOptions, dataset: Dataset) -> np.ndarray:
    """The images that say which model is best: int64 rows of the data set."""
    indices = dataset.captioned_indices("val")
    return indices if options.val_images_use < 0 else indices[: options.val_images_use]


def fresh_checkpoint(options: TrainingOptions, dataset: Dataset, given: Collection[str] = ()) -> Checkpoint:
    """A new run: weights from --start_from, or VGG16's for the CNN and random ones for the rest.

    Args:
        given: the options that the user named; none of them may ask for another shape than --start_from brings.
    """
    history = TrainingHistory(opt=dataclasses.asdict(options))
    if options.start_from:
        if options.stage and options.start_from != "bundled" and not Path(options.start_from).exists():
            raise InputError(
                f"{options.start_from}: no such file, and stage {options.stage} starts from it",
                remedy="run the stages before it, too, or name a model with --start_from",
            )
        start = load_checkpoint(bundled_model_path() if options.start_from == "bundled" else options.start_from)
        if options.decoder == "attention" and start.config.decoder != "attention":
            raise InputError(
                f"--decoder attention: {options.start_from} has the decoder {start.config.decoder}",
                remedy="leave --decoder out to train that one, or leave --start_from out",
            )
        _require_its_shape(options, start.config, given)
        if "cnn_model" in given and (options.stage or 1) == 1:
            log.info("--cnn_model is not used: the CNN's weights come from %s (--start_from)", options.start_from)
        # The original's number format is for imported weights as they are.
        decoding = {name: value for name, value in start.decoding.items() if name != "precision"} | {"suppress_unk": 1}
        if options.grow_vocab:
            start = grow_vocab(start, dataset.words_to_know(start.vocab), dataset.max_length)
        config = dataclasses.replace(
            start.config,
            drop_prob_lm=options.drop_prob_lm,
            drop_prob_words=options.drop_prob_words,
            drop_prob_features=options.drop_prob_features,
            image_mode=dataset.image_mode,
        )
        config.require_sound()
        return Checkpoint(config, start.vocab, start.state_dict, history, decoding)
    weights = read_cnn_weights(options.cnn_model, options.cnn_layer, options.cnn_pixels)
    mean, deviation = _pixels_of(dataset) if weights.pixels == "data" else (None, None)
    config = ModelConfig(
        vocab_size=dataset.vocab.size,
        max_length=dataset.max_length,
        encoding_size=options.input_encoding_size,
        rnn_size=options.rnn_size,
        num_layers=options.num_layers,
        drop_prob_lm=options.drop_prob_lm,
        decoder=options.decoder,
        attention_heads=options.attention_heads,
        drop_prob_words=options.drop_prob_words,
        drop_prob_features=options.drop_prob_features,
        cnn_layer=options.cnn_layer,
        cnn_pixels=weights.pixels,
        pixel_mean=mean,
        pixel_std=deviation,
        conv_widths=weights.conv_widths,
        fc_width=weights.fc_width or VGG16_FC_WIDTH,
        image_mode=dataset.image_mode,
    )
    config.require_sound()
    torch.manual_seed(options.seed)
    model = CaptionModel(config)
    model.encoder.load_state_dict(weights.state, strict=False)
    return Checkpoint(config, dataset.vocab, model.state_dict(), history, decoding_for_new_model(options.decoder))


def _pixels_of(dataset: Dataset) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of red, green and blue of the training pictures, or of a spread part of many."""
    indices = dataset.captioned_indices("train")
    pixels = PixelStatistics()
    dataset.require_whole_file()
    for index in indices[:: math.ceil(len(indices) / PIXEL_PICTURES)]:
        pixels.add(np.asarray(dataset.images[int(index)]))
    mean, deviation = pixels.mean_and_deviation()
    deviation = np.maximum(deviation, 1.0)  # of pictures of one colour: nothing to scale
    told = "; ".join(", ".join(f"{value:.3f}" for value in values) for values in (mean, deviation))
    log.info("pixels of the training pictures: mean and standard deviation of red, green, blue: %s", told)
    return tuple(mean.tolist()), tuple(deviation.tolist())


def _require_its_shape(options: TrainingOptions, config: ModelConfig, given: Collection[str]) -> None:
    """What a model starts from says its shape: an option that asks for another one would be ignored."""
    has = {**dataclasses.asdict(config), "input_encoding_size": config.encoding_size}
    for name in sorted(OF_THE_SHAPE.intersection(given)):
        asked = getattr(options, name)
        if asked is not None and asked != has[name]:
            raise InputError(
                f"--{name} {asked}: {options.start_from} has {has[name]}",
                remedy=f"leave --{name} out to train that model, or leave --start_from out for a new one",
            )


def in_words_of(start: Checkpoint, dataset: Dataset) -> Dataset:
    """The data set with the model's word ids, and UNK for words that the model lacks and that occur once.

    Raises:
        InputError: they do not go together: the model lacks words, or its pictures or captions have another shape.
    """
    move = ", or move it to this data with --start_from and --grow_vocab 1"
    theirs, ours = dataset.words_to_know(start.vocab), start.vocab
    if not ours.covers(theirs):
        lacking = [word for word in theirs.words if word not in ours]
        problem = f"its captions are split by the {theirs.tokenizer} rule, the model's by the {ours.tokenizer} rule"
        if lacking:
            problem = (
                f"the model does not know {len(lacking)} of its {dataset.vocab.size} words, {lacking[0]!r} for example"
            )
        raise InputError(
            f"{dataset.json_name}: {problem}", remedy="prepare the data with the model's vocabulary" + move
        )
    if start.config.image_mode != dataset.image_mode:
        raise InputError(
            f"{dataset.h5_name}: holds pictures in the mode {dataset.image_mode},"
            f" the model was trained on the mode {start.config.image_mode}",
            remedy=f"prepare the data with --image_mode {start.config.image_mode}",
        )
    if start.config.max_length != dataset.max_length:
        raise InputError(
            f"{dataset.h5_name}: labels have {dataset.max_length} words, the model {start.config.max_length}",
            remedy="prepare the data with the model's --max_length" + move,
        )
    fitted = dataset.with_words_of(ours)
    if rare := dataset.vocab.size - theirs.size:
        log.info("vocabulary: %d words that the model does not know occur only once in the data: UNK", rare)
    return fitted


def make_trainer(options: TrainingOptions, model: CaptionModel, dtype: torch.dtype, processes: Processes) -> Trainer:
    """The update rules as the options name them."""
    epsilon = options.optim_epsilon
    cnn_rule = Rule(
        options.cnn_optim, options.cnn_learning_rate, options.cnn_optim_alpha, options.cnn_optim_beta, epsilon
    )
    return Trainer(
        model,
        lm_rule=Rule(
            options.optim,
            options.learning_rate,
            options.optim_alpha,
            options.optim_beta,
            epsilon,
            options.weight_decay,
        ),
        cnn_rule=cnn_rule if options.finetune_cnn_after >= 0 else None,
        finetune_from_block=options.finetune_cnn_layers,
        grad_clip=options.grad_clip,
        grad_norm=options.grad_norm,
        ema=options.ema,
        label_smoothing=options.label_smoothing,
        cnn_weight_decay=options.cnn_weight_decay,
        accumulate=options.accumulate,
        dtype=dtype,
        seed=options.seed,
        processes=processes,
    )


def image_weights(options: TrainingOptions, dataset: Dataset, indices: np.ndarray) -> np.ndarray | None:
    """How often each training image is in an epoch, see `EpochOrder`; None: once."""
    return weights_by_source([dataset.info[int(i)] for i in indices], options.weights_of_sources())


def augmentation_of(options: TrainingOptions) -> Augmentation | None:
    """How training images are changed; None: not at all."""
    augmentation = Augmentation(options.augment_flip, options.augment_rotation, options.augment_colour)
    return None if augmentation == Augmentation() else augmentation


def cache_form(options: TrainingOptions, model: CaptionModel) -> CacheForm | None:
    """What --cache_features asks to keep; None: nothing.

    Raises:
        InputError: grids shall be mirrored, and the model has none.
    """
    if not options.cache_features:
        return None
    form = CacheForm(
        options.cache_features,
        mirrored=options.augment_flip > 0 and options.flip_features == "photo",
        last_block=options.finetune_cnn_after >= 0,
        kind=options.cache_type,
    )
    if options.augment_flip > 0 and not form.mirrored and len(form.shape(model)) == 1:
        raise InputError(
            "--flip_features grid: the features of this model are vectors, which have no left and right",
            remedy="leave it out, and the mirrored photos' features are computed too",
        )
    return form


def load_features(
    options: TrainingOptions, trainer: Trainer, dataset: Dataset, stop_signal: Callable[[], int]
) -> CachedFeatures | None:
    """The cached CNN features, computed by all processes if need be; None without --cache_features.

    Raises:
        Stopped: a process was asked to stop before they were done; the next run goes on there.
    """
    form = cache_form(options, trainer.model)
    if form is None:
        return None
    return cached_features(
        trainer.model,
        dataset,
        dataset.files[0].path.resolve().parent,
        form,
        device=trainer.device,
        dtype=inference_dtype(options.precision, trainer.device),
        num_workers=options.num_workers,
        processes=trainer.processes,
        stop_signal=stop_signal,
    )


def fit_grid(trainer: Trainer, dataset: Dataset, indices: np.ndarray, features: CachedFeatures | None) -> None:
    """Bring the channels of a new attending model to one range, by a few training photos; nothing for other models.

    Args:
        indices: the training images.
        features: of `load_features`.
    """
    model, processes = trainer.model, trainer.processes
    if not isinstance(model.encoder.embed, GridEmbedding):
        return
    few = indices[:: math.ceil(len(indices) / GRID_PHOTOS)]
    if processes.is_main:
        with torch.no_grad():
            if features is None:
                images = torch.from_numpy(np.stack([dataset.images[int(i)] for i in few]))
                grids = torch.cat([model.cnn_features(part.to(trainer.device)) for part in images.split(8)])
            else:
                grids = features.read(few).to(trainer.device)
                grids = model.encoder.last_block(grids) if grids.ndim == 4 else grids
        model.encoder.embed.fit_scale(grids)
    else:
        model.encoder.embed.scale.zero_()
    processes.sum_([model.encoder.embed.scale])  # all processes have the main one's
