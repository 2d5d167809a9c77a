"""The one place that saves and loads models."""

import dataclasses
import os
import pickle
import warnings
import zipfile
from importlib import resources
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from captioner.data.vocabulary import Vocab
from captioner.errors import InputError
from captioner.model.checkpoint_content import Checkpoint as Checkpoint  # both are imported from here, too
from captioner.model.checkpoint_content import TrainingHistory as TrainingHistory
from captioner.model.checkpoint_fields import require_finite, require_sound_fields, short, weights_digest
from captioner.model.config import ModelConfig
from captioner.runtime.files import atomic_write

FORMAT_VERSIONS = (1, 2)  # 2 knows attending models; others are written as 1, for older readers
ASSETS = Path(str(resources.files("captioner"))) / "assets"  # what comes with the package
BUNDLED_MODEL = "captioner-vgg16.pt"

StorageType = Literal["float32", "float16", "int8"]

# The history's fields stand in the file one by one, beside the model's.
_HISTORY_FIELDS = tuple(f.name for f in dataclasses.fields(TrainingHistory))


def bundled_model_path() -> Path:
    """The model that comes with the package.

    Raises:
        InputError: this installation carries none.
    """
    path = ASSETS / BUNDLED_MODEL
    if not path.is_file():
        raise InputError("this installation has no bundled model", remedy="name one with --model FILE.pt")
    return path


def save_checkpoint(path: str | Path, checkpoint: Checkpoint, dtype: StorageType = "float32") -> None:
    """Write a checkpoint whole or not at all.

    Args:
        dtype: how weights are stored. "int8": matrices as int8 with one float32 scale per output row, vectors as they
            are. Loading always gives float32.

    Raises:
        InputError: the file cannot be written.
    """
    with atomic_write(path) as stream:
        torch.save(unshared(to_plain(checkpoint, dtype)), stream)


def unshared(value: Any) -> Any:
    """The same plain value, in which no list and every text is shared: equal values make equal files, also after a
    killed run."""
    texts: dict[str, str] = {}

    def copied(one: Any) -> Any:
        if isinstance(one, str):
            return texts.setdefault(one, one)
        if type(one) is dict:
            return {copied(key): copied(item) for key, item in one.items()}
        if type(one) in (list, tuple):
            return type(one)(map(copied, one))
        return one

    return copied(value)


def load_checkpoint(path: str | Path) -> Checkpoint:
    """Read a checkpoint written by `save_checkpoint` on any device; weights come as float32 on the CPU.

    Raises:
        InputError: no such file, not one of ours, damaged, or holding anything but plain types and tensors.
    """
    path = Path(path)
    return from_plain(load_plain(path), path)


def to_plain(checkpoint: Checkpoint, dtype: StorageType) -> dict[str, Any]:
    """The content of the file: plain types and tensors alone."""
    stored = {name: _store(tensor, dtype) for name, tensor in checkpoint.state_dict.items()}
    return {
        "format_version": checkpoint.config.format_version,
        "config": checkpoint.config.to_dict(),
        "vocab": {"ix_to_word": checkpoint.vocab.ix_to_word, "tokenizer": checkpoint.vocab.tokenizer},
        "state_dict": stored,
        "weights_digest": weights_digest(stored),
        "decoding": checkpoint.decoding,
        **{name: getattr(checkpoint.history, name) for name in _HISTORY_FIELDS},
    }


def from_plain(content: Any, path: Path) -> Checkpoint:
    """What `to_plain` made, read from the file `path`.

    Raises:
        InputError: it is something else, or incomplete.
    """
    if not isinstance(content, dict) or "format_version" not in content:
        raise InputError(
            f"{path}: not a captioner checkpoint", remedy="convert foreign files with caption-convert first"
        )
    version = content["format_version"]
    if type(version) is not int or version not in FORMAT_VERSIONS:
        raise InputError(
            f"{path}: checkpoint format {short(version)}",
            expected=f"format {' or '.join(map(str, FORMAT_VERSIONS))}",
        )
    content = {
        "reward_history": {},
        "val_accuracy_history": {},
        **content,
    }  # which files of earlier versions do not have
    missing = [name for name in ("config", "vocab", "state_dict", "decoding", *_HISTORY_FIELDS) if name not in content]
    if missing:
        raise InputError(f"{path}: the checkpoint lacks {', '.join(missing)}", remedy="it is damaged or incomplete")
    require_sound_fields(content, str(path))
    digest = weights_digest(content["state_dict"], f"{path}: ")
    if content.get("weights_digest", digest) != digest:  # older files have none
        raise InputError(f"{path}: its weights are not those that were saved", remedy="it is damaged: take a copy")
    config = ModelConfig.from_dict(content["config"], str(path))
    vocab = Vocab.from_ix_to_word(
        content["vocab"].get("ix_to_word"), tokenizer=content["vocab"].get("tokenizer", "ascii"), source=str(path)
    )
    if vocab.size != config.vocab_size:
        raise InputError(f"{path}: the vocabulary has {vocab.size} words, the model {config.vocab_size}")
    state_dict = {name: _restore(stored, f"{path}: {name}") for name, stored in content["state_dict"].items()}
    for name, tensor in state_dict.items():
        require_finite(tensor, f"{path}: {name}")
    history = TrainingHistory(**{name: content[name] for name in _HISTORY_FIELDS})
    return Checkpoint(config, vocab, state_dict, history, content["decoding"])


def load_plain(path: Path) -> Any:
    """`torch.load` restricted to plain types and tensors: nothing in the file is ever executed.

    Raises:
        InputError: no such file, not a PyTorch file, damaged, or holding code.
    """
    if not os.path.exists(path):  # Path.exists fails for names that are too long
        raise InputError(f"{path}: no such file", remedy="check the path")
    if not path.is_file():
        raise InputError(f"{path}: not a file", expected="a .pt file")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of torch's, about formats that only damaged files have
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        if zipfile.is_zipfile(path):
            raise InputError(
                f"{path}: holds more than plain types and tensors, so it is not loaded (it could run code)",
                expected="a file written by caption-train or caption-convert",
            ) from error
        raise _not_pytorch(path) from error
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror or error})") from error
    except Exception as error:  # torch raises many kinds for a damaged file, none of them documented
        raise _not_pytorch(path) from error


def _not_pytorch(path: Path) -> InputError:
    return InputError(
        f"{path}: not a PyTorch file, or a damaged one",
        expected="a .pt file from caption-train or caption-convert",
        remedy="caption-convert makes one of a neuraltalk2 .t7" if path.suffix == ".t7" else "",
    )


def _store(tensor: Tensor, dtype: StorageType) -> Any:
    tensor = tensor.detach().cpu().contiguous()
    if dtype == "float16":
        return tensor.half()
    if dtype == "int8" and tensor.ndim >= 2:
        rows = tensor.float().flatten(1)
        scale = (rows.abs().amax(dim=1) / 127).clamp(min=1e-12)
        values = (rows / scale[:, None]).round().to(torch.int8).view(tensor.shape)
        return {"values": values, "scale": scale}
    return tensor.float()


def _restore(stored: Any, where: str) -> Tensor:
    if isinstance(stored, Tensor):
        return stored.float()
    if isinstance(stored, dict) and stored.keys() == {"values", "scale"}:
        values, scale = stored["values"], stored["scale"]
        if (
            isinstance(values, Tensor)
            and isinstance(scale, Tensor)
            and values.ndim >= 2
            and scale.shape == values.shape[:1]
        ):
            return values.float() * scale.view(-1, *[1] * (values.ndim - 1))
    raise InputError(f"{where}: not a tensor this version knows how to read")
