"""Weights of ours for other places: .pt in less space, .safetensors, and torchvision's .pth."""

from collections import OrderedDict
from pathlib import Path

import torch
from torch import Tensor

from captioner.convert.safetensors import write_safetensors
from captioner.convert.torchvision import PIXELS_KEY
from captioner.errors import InputError
from captioner.model.checkpoint import Checkpoint, StorageType, save_checkpoint
from captioner.model.choices import Pixels
from captioner.runtime.files import atomic_write

FLOAT_TYPES = {"float32": torch.float32, "float16": torch.float16}


def export_checkpoint(path: Path, checkpoint: Checkpoint, dtype: StorageType) -> None:
    """Write a checkpoint without resume state, loadable on any device.

    A `path` ending in .safetensors gets that format, anything else our own .pt.

    Raises:
        InputError: the file cannot be written, or int8 was asked of .safetensors.
    """
    if path.suffix != ".safetensors":
        save_checkpoint(path, checkpoint, dtype)
        return
    write_safetensors(path, checkpoint, _float_type(path, dtype))


def export_cnn_weights(path: Path, state: dict[str, Tensor], pixels: Pixels, dtype: StorageType) -> None:
    """Write a state_dict that torchvision's vgg16 reads too (without its classes), with the pixels it wants.

    Raises:
        InputError: the file cannot be written, or int8 was asked for.
    """
    float_type = _float_type(path, dtype)
    content = OrderedDict((name, tensor.to(float_type)) for name, tensor in state.items())
    # torch carries this attribute through saving and loading; see convert/torchvision.py.
    content._metadata = {"": {PIXELS_KEY: pixels}}  # type: ignore[attr-defined]
    with atomic_write(path) as stream:
        torch.save(content, stream)


def _float_type(path: Path, dtype: StorageType) -> torch.dtype:
    if dtype not in FLOAT_TYPES:
        raise InputError(
            f"{path}: --dtype {dtype} is for our own .pt",
            expected=" or ".join(FLOAT_TYPES),
            remedy="choose one of them",
        )
    return FLOAT_TYPES[dtype]
