"""A trainer of small models, for tests that call the iteration itself."""

import torch

from captioner.model.caption_model import CaptionModel
from captioner.runtime.processes import Processes
from captioner.training.trainer import Rule, Trainer


def make_trainer(
    model: CaptionModel,
    optim: str = "sgd",
    learning_rate: float = 0.1,
    dtype: torch.dtype = torch.float32,
    trains_cnn: bool = True,
    from_block: int = 1,
) -> Trainer:
    """All of `model`, or its language model alone, trained by one rule."""
    rule = Rule(optim, learning_rate=learning_rate, alpha=0.8, beta=0.999, epsilon=1e-8)
    return Trainer(
        model,
        lm_rule=rule,
        cnn_rule=rule if trains_cnn else None,
        finetune_from_block=from_block,
        grad_clip=0.1,
        cnn_weight_decay=0.0,
        accumulate=1,
        dtype=dtype,
        seed=0,
        processes=Processes(),
    )
