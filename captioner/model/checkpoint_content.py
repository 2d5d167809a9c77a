"""What a model's file tells: the model, and the history of its training."""

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from captioner.data.vocabulary import Vocab
from captioner.model.config import ModelConfig


@dataclass
class TrainingHistory:
    """How far a training run has come, and what it saw on the way; histories map iteration → value."""

    opt: dict[str, Any] = field(default_factory=dict)
    iteration: int = 0
    loss_history: dict[int, float] = field(default_factory=dict)
    val_loss_history: dict[int, float] = field(default_factory=dict)
    val_lang_stats_history: dict[int, dict[str, float]] = field(default_factory=dict)
    val_predictions: list[dict[str, Any]] = field(default_factory=list)
    best_score: float | None = None
    val_accuracy_history: dict[int, dict[str, float]] = field(default_factory=dict)  # "top1", "top5": of the next word
    reward_history: dict[int, float] = field(default_factory=dict)  # of self-critical training


@dataclass
class Checkpoint:
    """A trained model as it stands in a file: its shape, its words, its weights, and how it came about."""

    config: ModelConfig
    vocab: Vocab
    state_dict: dict[str, Tensor]
    history: TrainingHistory = field(default_factory=TrainingHistory)
    # Search options that suit this model when the user gives none, e.g. {"suppress_unk": 1}.
    decoding: dict[str, Any] = field(default_factory=dict)
