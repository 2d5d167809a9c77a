"""Checkpoints → a captioner, ready on a device at the precision that was asked for."""

import contextlib
import copy
import hashlib
import json
import logging
import math
import struct
import zlib
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import torch
from torch import nn

from captioner.data.batch import Batch, PixelInputs
from captioner.data.vocabulary import Vocab
from captioner.errors import InputError
from captioner.inference.captioner import Captioner
from captioner.kernels import Int8Convolutions, can_int8
from captioner.kernels.int8 import measure_ranges
from captioner.model.caption_model import CaptionModel, build_model
from captioner.model.checkpoint import ASSETS, Checkpoint, bundled_model_path, load_checkpoint
from captioner.runtime.files import atomic_write, cache_folder, read_small
from captioner.runtime.precision import Precision, inference_dtype, prepare_for_inference

log = logging.getLogger(__name__)

CALIBRATION_PHOTOS = 48


def load_models(paths: Sequence[str | Path] = ()) -> list[Checkpoint]:
    """The checkpoints named, or the bundled one; all with the same vocabulary, and squares made alike.

    Raises:
        InputError: one cannot be read, or does not fit the first.
    """
    chosen: Sequence[str | Path] = paths or [bundled_model_path()]
    checkpoints = [load_checkpoint(path) for path in chosen]
    require_same_vocabulary([(str(path), own.vocab) for path, own in zip(chosen, checkpoints, strict=True)])
    for path, own in zip(chosen, checkpoints, strict=True):
        if own.config.image_mode != checkpoints[0].config.image_mode:
            raise InputError(
                f"{path}: was trained on pictures in the mode {own.config.image_mode}, {chosen[0]} on the mode"
                f" {checkpoints[0].config.image_mode}",
                remedy="average models that see pictures alike",
            )
    return checkpoints


def require_same_vocabulary(vocabs: Sequence[tuple[str, Vocab]]) -> None:
    """Refuse models or data whose word ids mean different words.

    Args:
        vocabs: where each comes from, and the vocabulary.
    """
    first_source, first = vocabs[0]
    for source, vocab in vocabs[1:]:
        if vocab.words != first.words:
            raise InputError(
                f"{source}: its vocabulary ({vocab.size} words) is not that of {first_source} ({first.size} words)",
                remedy="use a dataset and models prepared together",
            )


def make_captioner(
    checkpoints: Sequence[Checkpoint],
    device: torch.device,
    precision: Precision,
    photos: Callable[[int], Iterable[Batch]],
) -> Captioner:
    """Build the models of `load_models` and bring them to the device.

    Args:
        precision: of the CNN. "auto" is what suits the models: imported ones keep to the original's float32; 8-bit
            integers where the CPU has them and the CNN's scales come with the package, for then it is known what they
            cost (the model card says it); else half precision where the hardware has it.
        photos: the first photos of the run, that many at most; asked for where 8-bit scales are not known yet.

    Raises:
        InputError: this machine cannot compute at that precision.
    """
    if precision == "int8":
        require_int8(device)
    models = [build_model(checkpoint) for checkpoint in checkpoints]
    if precision == "auto":
        precision = checkpoints[0].decoding.get("precision", "auto")
    if precision == "int8" or (precision == "auto" and can_int8(device)):
        names = [_ranges_name(model) for model in models]  # takes as long as reading all weights, so only once
        shipped = [_stored_ranges(ASSETS / name, model) for name, model in zip(names, models, strict=True)]
        if precision == "int8" or all(shipped):
            precision = "int8"
            for model, name, ranges in zip(models, names, shipped, strict=True):
                ranges = ranges or _own_ranges(model, cache_folder() / name, photos)
                features = model.encoder.features
                model.encoder.features = Int8Convolutions(features, model.normalise.limits(), ranges)
    dtype = inference_dtype("auto" if precision == "int8" else precision, device)
    captioner = Captioner(models, checkpoints[0].vocab, device, dtype)
    log.info("arithmetic: %s, on %s", captioner.arithmetic, device)
    return captioner


def require_int8(device: torch.device) -> None:
    """Say what is missing where `can_int8` is false.

    Raises:
        InputError: no CPU with VNNI instructions, or no PyTorch that uses them rightly.
    """
    remedy = "use --precision auto"
    if device.type != "cpu":
        raise InputError("--precision int8 is for CPUs", remedy=f"{remedy}, or --gpuid -1")
    if not can_int8(device):
        raise InputError("--precision int8 needs a CPU with AVX-512 VNNI, and a PyTorch that uses it", remedy=remedy)


def _own_ranges(model: CaptionModel, path: Path, photos: Callable[[int], Iterable[Batch]]) -> list[float]:
    """The scales of the 8-bit convolutions, from this user's cache or measured now."""
    ranges = _stored_ranges(path, model)
    if ranges is None:
        log.info("int8: measuring activations on the first photos, once for this model")
        dtype = inference_dtype("auto", torch.device("cpu"))
        fast = copy.deepcopy(model.encoder.features)
        prepare_for_inference(fast, dtype)
        found = (batch.inputs for batch in photos(CALIBRATION_PHOTOS))
        images = [inputs.images for inputs in found if isinstance(inputs, PixelInputs) and len(inputs.images)]
        if not images:
            raise InputError("--precision int8: none of the first photos can be read", remedy="use --precision auto")
        ranges = measure_ranges(fast, (model.pixels(some).to(dtype) for some in images))
        _store_ranges(ranges, path)
    return ranges


def _ranges_name(model: CaptionModel) -> str:
    """The same for the same convolutions and pixels."""
    pixels = f"{model.config.cnn_pixels}{model.config.pixel_mean or ''}{model.config.pixel_std or ''}"
    digest = hashlib.blake2b(pixels.encode(), digest_size=10)
    for weights in model.encoder.features.parameters():
        digest.update(weights.detach().contiguous().numpy().data)
    return f"int8-{digest.hexdigest()}.json"


def _stored_ranges(path: Path, model: CaptionModel) -> list[float] | None:
    """The scales of a file; None: it is not there, or damaged, and they are to be measured anew."""
    count = sum(isinstance(layer, nn.Conv2d) for layer in model.encoder.features) - 1
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError, RecursionError, OverflowError):
        content = json.loads(read_small(path))
        ranges = [float(value) for value in content["ranges"]]
        if content["sum"] != _sum_of(ranges):
            return None
        if len(ranges) == count and all(math.isfinite(value) and value >= 0 for value in ranges):
            return ranges
    return None


def _sum_of(ranges: Sequence[float]) -> int:
    """A check sum: another scale gives other captions, and does not look like damage."""
    return zlib.crc32(struct.pack(f"<{len(ranges)}d", *ranges))


def _store_ranges(ranges: Sequence[float], path: Path) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(path, "w") as stream:
            json.dump({"ranges": list(ranges), "sum": _sum_of(ranges)}, stream)
    except (OSError, InputError) as error:
        log.warning("int8: the measured scales cannot be kept (%s)", error)
