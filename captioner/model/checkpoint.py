"""The one place that saves and loads checkpoints and reports."""

import dataclasses
import json
import math
import pickle
import zipfile
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from captioner.data.vocabulary import Vocab
from captioner.errors import InputError
from captioner.model.config import ModelConfig
from captioner.runtime.files import atomic_write

FORMAT_VERSION = 1
ASSETS = Path(str(resources.files("captioner"))) / "assets"  # what comes with the package
BUNDLED_MODEL = "captioner-flickr8k.pt"

StorageType = Literal["float32", "float16", "int8"]


@dataclass
class Checkpoint:
    """A trained model and how it came about; histories map iteration → value."""

    config: ModelConfig
    vocab: Vocab
    state_dict: dict[str, Tensor]
    opt: dict[str, Any] = field(default_factory=dict)
    iteration: int = 0
    loss_history: dict[int, float] = field(default_factory=dict)
    val_loss_history: dict[int, float] = field(default_factory=dict)
    val_lang_stats_history: dict[int, dict[str, float]] = field(default_factory=dict)
    val_predictions: list[dict[str, Any]] = field(default_factory=list)
    best_score: float | None = None
    # Search options that suit this model when the user gives none, e.g. {"suppress_unk": 1}.
    decoding: dict[str, Any] = field(default_factory=dict)


# Fields stored as they are; config, vocab and state_dict need translation.
_PLAIN_FIELDS = tuple(f.name for f in dataclasses.fields(Checkpoint) if f.name not in ("config", "vocab", "state_dict"))


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
        torch.save(_to_plain(checkpoint, dtype), stream)


def load_checkpoint(path: str | Path) -> Checkpoint:
    """Read a checkpoint written by `save_checkpoint` on any device; weights come as float32 on the CPU.

    Raises:
        InputError: no such file, not one of ours, damaged, or holding anything but plain types and tensors.
    """
    path = Path(path)
    return _from_plain(load_plain(path), path)


def _to_plain(checkpoint: Checkpoint, dtype: StorageType) -> dict[str, Any]:
    return {
        "format_version": FORMAT_VERSION,
        "config": checkpoint.config.to_dict(),
        "vocab": {"ix_to_word": checkpoint.vocab.ix_to_word, "tokenizer": checkpoint.vocab.tokenizer},
        "state_dict": {name: _store(tensor, dtype) for name, tensor in checkpoint.state_dict.items()},
        **{name: getattr(checkpoint, name) for name in _PLAIN_FIELDS},
    }


def _from_plain(content: Any, path: Path) -> Checkpoint:
    if not isinstance(content, dict) or "format_version" not in content:
        raise InputError(
            f"{path}: not a captioner checkpoint", remedy="convert foreign files with caption-convert first"
        )
    if content["format_version"] != FORMAT_VERSION:
        raise InputError(
            f"{path}: checkpoint format {content['format_version']!r}", expected=f"format {FORMAT_VERSION}"
        )
    missing = [name for name in ("config", "vocab", "state_dict", *_PLAIN_FIELDS) if name not in content]
    if missing:
        raise InputError(f"{path}: the checkpoint lacks {', '.join(missing)}", remedy="it is damaged or incomplete")
    config = ModelConfig.from_dict(content["config"], str(path))
    vocab = Vocab.from_ix_to_word(
        content["vocab"].get("ix_to_word"), tokenizer=content["vocab"].get("tokenizer", "ascii"), source=str(path)
    )
    if vocab.size != config.vocab_size:
        raise InputError(f"{path}: the vocabulary has {vocab.size} words, the model {config.vocab_size}")
    state_dict = {name: _restore(stored, f"{path}: {name}") for name, stored in content["state_dict"].items()}
    return Checkpoint(config, vocab, state_dict, **{name: content[name] for name in _PLAIN_FIELDS})


def load_plain(path: Path) -> Any:
    """`torch.load` restricted to plain types and tensors: nothing in the file is ever executed.

    Raises:
        InputError: no such file, not a PyTorch file, damaged, or holding code.
    """
    if not path.exists():
        raise InputError(f"{path}: no such file", remedy="check the path")
    if not path.is_file():
        raise InputError(f"{path}: not a file", expected="a .pt file")
    try:
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


@dataclass
class ResumeState:
    """All that a stopped run needs: the model after `checkpoint.iteration` updates, and its optimisers.

    Nothing else has a state: sampler, captions, crops and dropout follow from the seed and the iteration.
    """

    checkpoint: Checkpoint
    optimizers: dict[str, Any]
    first_loss: float | None


def save_resume_state(path: str | Path, state: ResumeState) -> None:
    """Write the resume state of a run whole or not at all.

    Raises:
        InputError: the file cannot be written.
    """
    content = {
        **_to_plain(state.checkpoint, "float32"),
        "optimizers": state.optimizers,
        "first_loss": state.first_loss,
    }
    with atomic_write(path) as stream:
        torch.save(content, stream)


def load_resume_state(path: str | Path) -> ResumeState:
    """Read a resume state.

    Raises:
        InputError: no such file, damaged, or a checkpoint without resume state.
    """
    path = Path(path)
    content = load_plain(path)
    if not isinstance(content, dict) or not {"optimizers", "first_loss"} <= content.keys():
        raise InputError(
            f"{path}: holds no resume state", remedy="name a run's …_resume.pt, or use --start_from for weights alone"
        )
    return ResumeState(_from_plain(content, path), content["optimizers"], content["first_loss"])


def write_report(path: str | Path, checkpoint: Checkpoint) -> None:
    """The original's `model_id<ID>.json`: opt, iter, histories and predictions, readable by its notebooks."""
    report = {
        "opt": checkpoint.opt,
        "iter": checkpoint.iteration,
        "loss_history": checkpoint.loss_history,
        "val_loss_history": checkpoint.val_loss_history,
        "val_lang_stats_history": checkpoint.val_lang_stats_history,
        "val_predictions": checkpoint.val_predictions,
    }
    with atomic_write(path, "w", encoding="utf-8") as stream:
        json.dump(_without_nan(report), stream, ensure_ascii=False, allow_nan=False)


def _without_nan(value: Any) -> Any:
    # JSON has no NaN; browsers refuse a report that holds one.
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {key: _without_nan(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_without_nan(item) for item in value]
    return value


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
        if values.ndim >= 2 and scale.shape == values.shape[:1]:
            return values.float() * scale.view(-1, *[1] * (values.ndim - 1))
    raise InputError(f"{where}: not a tensor this version knows how to read")
