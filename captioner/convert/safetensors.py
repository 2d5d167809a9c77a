"""Models as .safetensors, a format that other programs read: tensors by name, and texts beside them."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from captioner.errors import InputError
from captioner.model.checkpoint import Checkpoint, TrainingHistory, from_plain, to_plain
from captioner.runtime.files import atomic_write

_KEYS = ("config", "vocab", "opt", "decoding", "iteration")


def write_safetensors(path: Path, checkpoint: Checkpoint, dtype: torch.dtype) -> None:
    """Write the tensors by their names in `state_dict`; config, vocab, opt, decoding and iteration go into the header's
    `__metadata__`, each as JSON.

    Raises:
        InputError: the file cannot be written.
    """
    content = to_plain(checkpoint, "float32")
    metadata = {"format": "captioner", **{key: json.dumps(content[key]) for key in _KEYS}}
    tensors = {name: tensor.to(dtype) for name, tensor in content["state_dict"].items()}
    with atomic_write(path) as stream:
        stream.write(save(tensors, metadata))


def read_safetensors(path: Path) -> Checkpoint:
    """Read what `write_safetensors` wrote; weights come as float32. The histories of the training are not in it.

    Raises:
        InputError: it is something else, or damaged.
    """
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            content: dict[str, Any] = {key: json.loads(metadata[key]) for key in _KEYS}
            content["state_dict"] = {name: file.get_tensor(name) for name in sorted(file.keys())}
    except KeyError as error:
        raise InputError(
            f"{path}: no model of ours (its header lacks {error})", expected="a file from caption-convert"
        ) from error
    except (SafetensorError, ValueError, OSError, RecursionError) as error:
        raise InputError(f"{path}: not a .safetensors file, or a damaged one ({error})") from error
    history = TrainingHistory(content.pop("opt"), content.pop("iteration"))
    return from_plain({"format_version": 1, **vars(history), **content}, path)
