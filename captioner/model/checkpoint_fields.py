"""What the fields of a checkpoint file must be, whoever wrote it; and the digest that vouches for its weights."""

import hashlib
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from captioner.errors import InputError

LARGEST_SIZE = 2**16  # of a layer or a vocabulary's tenth part: far beyond use, within any memory
LARGEST_VOCABULARY = 10**6
LONGEST_CAPTION = 1000
DEEPEST = 20  # lists and tables within each other


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**53


def _is_number(value: Any) -> bool:
    return type(value) in (int, float)  # also NaN: a validation may have come to that


def _is_plain(value: Any, depth: int = 0) -> bool:
    """Numbers, texts, and lists and tables of such."""
    if depth > DEEPEST:
        return False
    if isinstance(value, list | tuple):
        return all(_is_plain(item, depth + 1) for item in value)
    if isinstance(value, dict):
        return all(_is_plain(key, depth + 1) and _is_plain(item, depth + 1) for key, item in value.items())
    return value is None or type(value) in (bool, int, float, str)


def _is_history(value: Any) -> bool:
    return isinstance(value, dict) and all(_is_count(key) and _is_number(item) for key, item in value.items())


def _is_scores(value: Any) -> bool:
    return isinstance(value, dict) and all(
        _is_count(key)
        and isinstance(scores, dict)
        and all(isinstance(name, str) and _is_number(score) for name, score in scores.items())
        for key, scores in value.items()
    )


def _is_options(value: Any) -> bool:
    if not isinstance(value, dict) or not all(isinstance(name, str) for name in value) or not _is_plain(value):
        return False
    named = [value.get(name) or "" for name in ("input_h5", "input_json")]
    paths = [path for one in named for path in (one if isinstance(one, list) else [one])]
    batch_size = value.get("batch_size", 1)
    return all(isinstance(path, str) for path in paths) and _is_count(batch_size) and 1 <= batch_size <= LARGEST_SIZE


# Field → what it must be, in a function and in words.
_FIELDS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "config": (lambda value: isinstance(value, dict) and _is_plain(value), "a table of plain values"),
    "vocab": (
        lambda value: isinstance(value, dict) and _is_plain(value) and isinstance(value.get("tokenizer", ""), str),
        "a table of words",
    ),
    "state_dict": (lambda value: isinstance(value, dict) and all(isinstance(k, str) for k in value), "named tensors"),
    "opt": (_is_options, "options by name"),
    "iteration": (_is_count, "a whole number"),
    "loss_history": (_is_history, "numbers by iteration"),
    "val_loss_history": (_is_history, "numbers by iteration"),
    "val_lang_stats_history": (_is_scores, "scores by iteration"),
    "val_accuracy_history": (_is_scores, "accuracies by iteration"),
    "reward_history": (_is_history, "numbers by iteration"),
    "val_predictions": (
        lambda value: isinstance(value, list) and all(isinstance(row, dict) and _is_plain(row) for row in value),
        "a list of captions",
    ),
    "best_score": (lambda value: value is None or _is_number(value), "a number"),
    "decoding": (
        lambda value: isinstance(value, dict) and all(isinstance(k, str) for k in value) and _is_plain(value),
        "search options by name",
    ),
    "first_loss": (lambda value: value is None or (_is_number(value) and math.isfinite(value)), "a number"),
}
_SIZES = {"max_length": LONGEST_CAPTION, "vocab_size": LARGEST_VOCABULARY}


def require_sound_fields(content: Mapping[str, Any], source: str) -> None:
    """Check the kinds of all fields that are there, and the sizes of the model.

    Args:
        content: of a checkpoint or of a resume state.
        source: names the file.

    Raises:
        InputError: naming the first field that is something else.
    """
    for name, (is_sound, expected) in _FIELDS.items():
        if name in content and not is_sound(content[name]):
            raise InputError(f"{source}: {name} is {short(content[name])}", expected=expected, remedy="it is damaged")
    for name, value in content.get("config", {}).items():
        for number in value if isinstance(value, list) else [value]:
            largest = _SIZES.get(name, LARGEST_SIZE)
            if _is_number(number) and not -largest <= number <= largest:
                raise InputError(f"{source}: {name} is {short(value)}", expected=f"at most {largest}")


def require_finite(tensor: Tensor, where: str) -> None:
    """Refuse weights that no training ends with.

    Raises:
        InputError: some are NaN or infinite.
    """
    # The sum of finite numbers may overflow, but never the other way round: the second look is rare.
    if not math.isfinite(float(tensor.sum())) and not bool(tensor.isfinite().all()):
        raise InputError(
            f"{where}: {int((~tensor.isfinite()).sum())} of {tensor.numel()} weights are not finite",
            remedy="the training behind it failed: take an earlier checkpoint",
        )


def weights_digest(stored: Mapping[str, Any], source: str = "") -> str:
    """A digest of weights as they stand in the file: names, types, shapes and bytes.

    Raises:
        InputError: something is no tensor.
    """
    digest = hashlib.blake2b(digest_size=16)
    for name, value in sorted(stored.items()):
        parts = value if isinstance(value, dict) else {"": value}
        if not all(isinstance(part, str) and _is_plain_tensor(tensor) for part, tensor in parts.items()):
            raise InputError(f"{source}{name}: not a tensor this version knows how to read")
        for part, tensor in sorted(parts.items()):
            digest.update(f"{name} {part} {tensor.dtype} {tuple(tensor.shape)}\0".encode("utf-8", "surrogatepass"))
            digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _is_plain_tensor(value: object) -> bool:
    return isinstance(value, Tensor) and value.layout == torch.strided and not value.is_quantized


def plain_digest(value: Any) -> str:
    """A digest of lists, tables, plain values and tensors within each other, as they stand in a file."""
    digest = hashlib.blake2b(digest_size=16)

    def add(item: Any, depth: int = 0) -> None:
        if depth > DEEPEST:
            raise InputError("the saved state is nested too deeply", remedy="it is damaged")
        if isinstance(item, dict):
            digest.update(b"{%d" % len(item))
            for key, inner in item.items():
                add(key, depth + 1)
                add(inner, depth + 1)
        elif isinstance(item, list | tuple):
            digest.update(b"[%d" % len(item))
            for inner in item:
                add(inner, depth + 1)
        elif isinstance(item, Tensor):
            digest.update(weights_digest({"": item}).encode())
        else:
            digest.update(f"{type(item).__name__} {item!r}\0".encode("utf-8", "surrogatepass"))

    add(value)
    return digest.hexdigest()


def short(value: object) -> str:
    """A value, for messages."""
    if isinstance(value, dict | list):
        return f"a {type(value).__name__} of {len(value)} entries, not all of which fit"
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
