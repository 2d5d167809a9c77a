"""Layers that are not trained are cast to half precision once, and what is trained is the same."""

import dataclasses

import pytest
import torch
from test_pretended_gpu import make_batch, make_model
from torch.utils._python_dispatch import TorchDispatchMode
from trainers import make_trainer

from captioner.training.loop import update
from captioner.training.trainer import Trainer


class Casts(TorchDispatchMode):
    """Counts weights of convolutions that are cast."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten._to_copy.default and args[0].shape[2:] == (3, 3):
            self.count += args[0].dtype == torch.float32 and (kwargs or {}).get("dtype") == torch.bfloat16
        return func(*args, **(kwargs or {}))


def trained(from_block: int, finetune: list[bool]) -> tuple[Trainer, list[float], list[int]]:
    """A trainer after those iterations, their losses, and how many weights of convolutions each of them cast."""
    trainer = make_trainer(make_model("lstm"), "sgd", 0.01, torch.bfloat16, from_block=from_block)
    losses, casts = [], []
    for iteration, tuned in enumerate(finetune):
        with Casts() as found:
            loss = update(trainer, make_batch(iteration), iteration, rate_factor=1.0, finetune=tuned)
        losses.append(float(loss))
        casts.append(found.count)
    return trainer, losses, casts


@pytest.mark.parametrize("from_block", [1, 5])
def test_frozen_layers_are_cast_once_and_train_the_same(from_block, monkeypatch):
    finetune = [False, False, True, True]
    trainer, losses, casts = trained(from_block, finetune)
    # 13 once, then none; all while all are trained, or, once, the ten before the last block beside its three.
    assert casts == ([13, 0, 13, 13] if from_block == 1 else [13, 0, 13 + 3, 3])
    monkeypatch.setattr(Trainer, "_through_frozen_layers", lambda _, batch: batch)
    plain, wanted, many = trained(from_block, finetune)
    assert losses == wanted and many == [13, 13, 13, 13]
    for (name, one), other in zip(trainer.model.named_parameters(), plain.model.parameters(), strict=True):
        assert torch.equal(one, other), name


def test_what_is_trained_keeps_its_dropout():
    trainer = make_trainer(make_model("lstm"), dtype=torch.bfloat16)
    trainer.trained(False)
    trainer._through_frozen_layers(make_batch())
    assert all(module.training for module in trainer.model.decoder.modules())


def test_features_and_float32_pass_untouched():
    batch = make_batch()
    trainer = make_trainer(make_model("lstm"))
    assert trainer._through_frozen_layers(batch) is batch
    trainer = make_trainer(make_model("lstm"), dtype=torch.bfloat16)
    seen = trainer._through_frozen_layers(batch)
    assert seen.inputs.features.dtype == torch.bfloat16 and trainer._through_frozen_layers(seen) is seen
    assert dataclasses.replace(seen, inputs=batch.inputs) == batch
