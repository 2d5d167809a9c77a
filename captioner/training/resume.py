"""The state a stopped run goes on from, in a file of its own."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from captioner.errors import InputError
from captioner.model.checkpoint import Checkpoint, from_plain, load_plain, to_plain, unshared
from captioner.model.checkpoint_fields import plain_digest
from captioner.runtime.files import atomic_write


@dataclass
class ResumeState:
    """All that a stopped run needs: the model after `checkpoint.history.iteration` updates, and its optimisers.

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
        **to_plain(state.checkpoint, "float32"),
        "optimizers": state.optimizers,
        "first_loss": state.first_loss,
        "optimizers_digest": plain_digest(state.optimizers),
    }
    with atomic_write(path) as stream:
        torch.save(unshared(content), stream)


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
    optimizers = content["optimizers"]
    digest = plain_digest(optimizers)
    if not isinstance(optimizers, dict) or content.get("optimizers_digest", digest) != digest:  # older files have none
        raise InputError(f"{path}: its optimisers' state is not what was saved", remedy="it is damaged: take a copy")
    return ResumeState(from_plain(content, path), content["optimizers"], content["first_loss"])
