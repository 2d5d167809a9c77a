"""Weights of ours for other places: .pt in less space, .safetensors, and torchvision's .pth."""

import json
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from captioner.convert.torchvision import PIXELS_KEY
from captioner.errors import InputError
from captioner.model.checkpoint import Checkpoint, StorageType, save_checkpoint
from captioner.model.choices import Pixels
from captioner.runtime.files import atomic_write

FLOAT_TYPES = {"float32": torch.float32, "float16": torch.float16}
SAFETENSORS_TYPES = {torch.float32: "F32", torch.float16: "F16"}


def export_checkpoint(path: Path, checkpoint: Checkpoint, dtype: StorageType) -> None:
    """Write a checkpoint without resume state, loadable on any device.

    A `path` ending in .safetensors gets that format: the tensors by their names in `state_dict`, and in the header's
    `__metadata__` config, vocab, opt, decoding and iteration, each as JSON. Anything else gets our own .pt.

    Raises:
        InputError: the file cannot be written, or int8 was asked of .safetensors.
    """
    if path.suffix != ".safetensors":
        save_checkpoint(path, checkpoint, dtype)
        return
    metadata = {
        "format": "captioner",
        "config": json.dumps(checkpoint.config.to_dict()),
        "vocab": json.dumps({"ix_to_word": checkpoint.vocab.ix_to_word, "tokenizer": checkpoint.vocab.tokenizer}),
        "opt": json.dumps(checkpoint.record.opt),
        "decoding": json.dumps(checkpoint.decoding),
        "iteration": json.dumps(checkpoint.record.iteration),
    }
    _write_safetensors(path, checkpoint.state_dict, metadata, _float_type(path, dtype))


def _write_safetensors(path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str], dtype: torch.dtype) -> None:
    """The format: the header's length in eight bytes, the header in JSON, the tensors' bytes one after the other."""
    header: dict[str, dict] = {"__metadata__": metadata}
    end = 0
    for name, tensor in tensors.items():
        begin, end = end, end + tensor.numel() * dtype.itemsize
        header[name] = {
            "dtype": SAFETENSORS_TYPES[dtype],
            "shape": list(tensor.shape),
            "data_offsets": [begin, end],
        }
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)  # readers map the tensors, which wants them aligned
    with atomic_write(path) as stream:
        stream.write(len(encoded).to_bytes(8, "little") + encoded)
        for tensor in tensors.values():
            stream.write(tensor.to(dtype).contiguous().numpy().data)


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
