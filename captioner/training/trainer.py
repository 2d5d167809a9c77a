"""One training step and everything a run must remember to go on exactly where it stopped."""

import logging
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from captioner.data.batches import Batch
from captioner.errors import InputError
from captioner.model.caption_model import CaptionModel
from captioner.runtime.processes import Processes
from captioner.training.optim import clip_elementwise, make_optimizer

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Rule:
    """An update rule with its hyper-parameters (names of the original; see optim.make_optimizer)."""

    name: str
    learning_rate: float
    alpha: float
    beta: float
    epsilon: float

    def optimizer(self, parameters: list[torch.nn.Parameter]) -> torch.optim.Optimizer:
        return make_optimizer(
            self.name, parameters, lr=self.learning_rate, alpha=self.alpha, beta=self.beta, eps=self.epsilon
        )


class Trainer:
    """Updates a model batch by batch.

    Two groups of weights with a rule each: the language model (decoder and the encoder's projection), trained always,
    its gradients clamped elementwise to ±grad_clip; and the CNN, only when fine-tuning, clamped only with weight decay,
    as the original does (train.lua).

    A batch passes through in `pieces`, whose gradients add up to those of the whole batch. Where the device's memory is
    too small, their number doubles, for good.

    Args:
        model: on its device.
        finetune_from_block: first convolution block (1-5) that fine-tuning trains; the ones before stay as they are.
        accumulate: pieces to begin with.
        dtype: number format of autocast; float32 switches autocast off.
        seed: dropout of iteration k depends on the seed, k and the process only, so a resumed run repeats it.
    """

    def __init__(
        self,
        model: CaptionModel,
        *,
        lm_rule: Rule,
        cnn_rule: Rule | None,
        finetune_from_block: int,
        grad_clip: float,
        cnn_weight_decay: float,
        accumulate: int,
        dtype: torch.dtype,
        seed: int,
        processes: Processes,
    ) -> None:
        self.model, self.grad_clip, self.cnn_weight_decay = model, grad_clip, cnn_weight_decay
        self.accumulate, self.pieces = accumulate, accumulate
        self.dtype, self.seed, self.processes = dtype, seed, processes
        self.device = next(model.parameters()).device
        for module in model.encoder.cnn_modules():
            module.to(memory_format=torch.channels_last)
        self.lm_parameters = model.language_model_parameters()
        self.cnn_parameters = model.cnn_parameters(from_block=finetune_from_block)
        self.lm_rule, self.cnn_rule = lm_rule, cnn_rule
        self.lm_optimizer = lm_rule.optimizer(self.lm_parameters)
        self.cnn_optimizer = cnn_rule.optimizer(self.cnn_parameters) if cnn_rule else None
        for parameter in model.cnn_parameters():
            parameter.requires_grad_(False)

    def step(self, batch: Batch, iteration: int, *, rate_factor: float, finetune: bool) -> Tensor:
        """Update the weights once.

        Args:
            batch: this process's share of the global batch.
            rate_factor: multiplies both learning rates (their decay).
            finetune: whether the CNN is trained too.

        Returns:
            scalar float32 on the device: the loss of the global batch before the update, mean −log p per target.

        Raises:
            InputError: the memory is too small even for one image at a time.
        """
        self._prepare_mode(finetune)
        trained = self.lm_parameters + (self.cnn_parameters if finetune else [])
        # Processes need not agree on the number of pieces: they meet only when all of their pieces are done.
        while (totals := self._accumulate(batch, iteration, trained)) is None:
            self._halve(len(batch.positions))
        gradients = [parameter.grad for parameter in trained if parameter.grad is not None]
        self.processes.sum_([totals, *gradients])
        torch._foreach_div_(gradients, totals[1].float())
        self._update(rate_factor, finetune)
        return (totals[0] / totals[1]).float()

    def _accumulate(self, batch: Batch, iteration: int, trained: list[torch.nn.Parameter]) -> Tensor | None:
        """Leave the summed gradients in the parameters: float64 (2,), loss sum and targets; None if out of memory."""
        torch.manual_seed((self.seed * 1_000_003 + iteration) * 1024 + self.processes.rank)
        for parameter in trained:  # also what an attempt without enough memory left behind
            parameter.grad = None
        totals = torch.zeros(2, dtype=torch.float64, device=self.device)
        try:
            for piece in batch.split(self.pieces):
                loss_sum, num_targets = self._loss_sum(piece.to(self.device))
                loss_sum.backward()
                totals[0] += loss_sum.detach()
                totals[1] += num_targets
        except torch.OutOfMemoryError:
            return None  # the handler is left before the next attempt: its traceback keeps activations alive
        return totals

    def _halve(self, num_images: int) -> None:
        size = math.ceil(num_images / self.pieces)
        if size <= 1:
            raise InputError(
                "out of memory with one image at a time",
                remedy="free the GPU from other programs, lower --seq_per_img or --rnn_size, use --cnn_layer pool5 or "
                "--finetune_cnn_layers 5, or train on the CPU with --gpuid -1",
            )
        self.pieces = math.ceil(num_images / math.ceil(size / 2))
        if self.device.type == "cuda":
            torch.cuda.empty_cache()  # blocks of the old sizes are of no use to smaller ones
        log.warning(
            "out of memory with %d images at once: going on with %d (--accumulate %d); the effective batch is the same",
            size,
            math.ceil(size / 2),
            self.pieces,
        )

    def _prepare_mode(self, finetune: bool) -> None:
        self.model.train()
        for module in self.model.encoder.cnn_modules():
            module.train(finetune)
        for parameter in self.cnn_parameters:
            parameter.requires_grad_(finetune)

    def _loss_sum(self, batch: Batch) -> tuple[Tensor, int]:
        with torch.autocast(self.device.type, dtype=self.dtype, enabled=self.dtype != torch.float32):
            return self.model(batch.images, batch.image_of_caption, batch.labels, batch.offsets, batch.features)

    def _update(self, rate_factor: float, finetune: bool) -> None:
        clip_elementwise(self.lm_parameters, self.grad_clip)
        _set_rate(self.lm_optimizer, self.lm_rule.learning_rate * rate_factor)
        self.lm_optimizer.step()
        if finetune:
            assert self.cnn_optimizer is not None and self.cnn_rule is not None
            if self.cnn_weight_decay > 0:
                for parameter in self.cnn_parameters:
                    assert parameter.grad is not None
                    parameter.grad.add_(parameter.detach(), alpha=self.cnn_weight_decay)
                clip_elementwise(self.cnn_parameters, self.grad_clip)
            _set_rate(self.cnn_optimizer, self.cnn_rule.learning_rate * rate_factor)
            self.cnn_optimizer.step()

    def require_sound_weights(self, iteration: int) -> None:
        """Refuse weights that are not finite: a gradient can be so while the loss does not show it yet.

        Raises:
            InputError: an update has destroyed the weights.
        """
        for name, parameter in self.model.named_parameters():
            if not all(bool(extreme.isfinite()) for extreme in parameter.detach().aminmax()):
                raise InputError(
                    f"iteration {iteration}: {name} holds values that are not finite",
                    remedy="the last saved state is good: lower --learning_rate, then --resume auto",
                )

    def optimizer_states(self) -> dict[str, Any]:
        """Plain types and tensors for the resume state; `pieces` too, since dropout draws anew for each of them."""
        states: dict[str, Any] = {"lm": self.lm_optimizer.state_dict(), "pieces": [self.accumulate, self.pieces]}
        if self.cnn_optimizer is not None:
            states["cnn"] = self.cnn_optimizer.state_dict()
        return states

    def restore_optimizers(self, states: dict[str, Any], source: str) -> None:
        """Continue with saved optimiser states.

        Raises:
            InputError: they belong to another rule or model.
        """
        asked, needed = states.get("pieces", (1, 1))
        if asked == self.accumulate:  # another --accumulate is the user's new wish
            self.pieces = needed
        for name, optimizer in (("lm", self.lm_optimizer), ("cnn", self.cnn_optimizer)):
            if optimizer is not None and name in states:
                try:
                    optimizer.load_state_dict(states[name])
                except (ValueError, KeyError, TypeError) as error:
                    raise InputError(
                        f"{source}: its optimiser state does not fit the options ({error})",
                        remedy="resume with the same --optim and --cnn_optim, or use --start_from",
                    ) from error


def _set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = rate
