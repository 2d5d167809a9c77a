"""A model with all that changes its weights: groups of parameters, each with its update rule, and how batches pass."""

import contextlib
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from captioner.data.batch import Batch, PixelInputs
from captioner.errors import InputError
from captioner.kernels import arithmetic, prove_for_training
from captioner.model.caption_model import CaptionModel
from captioner.model.encoder import CONVS_BEFORE_POOL
from captioner.runtime.device import widest_float
from captioner.runtime.pieces import Pieces
from captioner.runtime.precision import keep_float32
from captioner.runtime.processes import Processes
from captioner.training.frozen_layers import FrozenLayers
from captioner.training.optim import clip_elementwise, make_optimizer

log = logging.getLogger(__name__)

# Of a model and a batch with all its references: −reward summed over sampled captions, and their number.
SelfCriticalLoss = Callable[[CaptionModel, Batch], tuple[Tensor, int]]


TOO_LITTLE_MEMORY = (
    "free the GPU from other programs, lower --seq_per_img or --rnn_size, use --cnn_layer pool5 or "
    "--finetune_cnn_layers 5, or train on the CPU with --gpuid -1"
)


@dataclass(frozen=True)
class Rule:
    """An update rule with its hyper-parameters (names of the original; see optim.make_optimizer)."""

    name: str
    learning_rate: float
    alpha: float
    beta: float
    epsilon: float
    weight_decay: float = 0.0


class ParameterGroup:
    """Parameters that are trained by one rule.

    Args:
        clip: gradient elements are clamped to ± this; None leaves them.
        norm: instead, all gradients together are scaled down to this norm; 0: not.
        decay: L2 weight decay, added to the gradients before they are clamped.
    """

    def __init__(
        self, parameters: list[nn.Parameter], rule: Rule, clip: float | None, norm: float = 0.0, decay: float = 0.0
    ) -> None:
        self.parameters, self.rule, self.clip, self.norm, self.decay = parameters, rule, clip, norm, decay
        self.optimizer = make_optimizer(
            rule.name,
            parameters,
            lr=rule.learning_rate,
            alpha=rule.alpha,
            beta=rule.beta,
            eps=rule.epsilon,
            weight_decay=rule.weight_decay,
        )

    def clip_gradients(self) -> None:
        """Decay and clamp the gradients, as the original does (train.lua)."""
        if self.decay > 0:
            for parameter in self.parameters:
                assert parameter.grad is not None
                parameter.grad.add_(parameter.detach(), alpha=self.decay)
        if self.norm > 0:
            nn.utils.clip_grad_norm_(self.parameters, self.norm)
        elif self.clip is not None:
            clip_elementwise(self.parameters, self.clip)

    def restore(self, state: dict[str, Any]) -> None:
        """Go on with a saved state of the rule.

        Raises:
            ValueError: it is of other parameters; or what else torch raises then.
        """
        self.optimizer.load_state_dict(state)
        for parameter, values in self.optimizer.state.items():
            for name, value in values.items():
                if isinstance(value, Tensor) and value.ndim and value.shape != parameter.shape:
                    raise ValueError(f"{name} has the shape {tuple(value.shape)}")

    def set_learning_rate(self, factor: float) -> None:
        """The rule's learning rate times the factor that the schedule gives."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.rule.learning_rate * factor


class RunningAverage:
    """An exponential moving average of weights (Polyak & Juditsky 1992), which captions better than the last of them.

    Args:
        decay: the part of it that each update keeps; less in the first updates, when the weights change most.
    """

    def __init__(self, parameters: list[nn.Parameter], decay: float) -> None:
        self.parameters, self.decay = parameters, decay
        self.values = [parameter.detach().clone() for parameter in parameters]

    @torch.no_grad()
    def update(self, iteration: int) -> None:
        """Take in the weights after the update of an iteration."""
        decay = min(self.decay, (1 + iteration) / (10 + iteration))
        torch._foreach_lerp_(self.values, [p.detach() for p in self.parameters], 1 - decay)

    @contextlib.contextmanager
    def in_place(self) -> Iterator[None]:
        """Within, the parameters have the averaged values."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        for parameter, value in zip(self.parameters, self.values, strict=True):
            own = parameter.clone()
            parameter.copy_(value)
            value.copy_(own)

    def restore(self, values: list[Tensor]) -> None:
        """Go on with saved values; of another set of weights (the CNN's came or went) they say nothing."""
        if [value.shape for value in values] == [value.shape for value in self.values]:
            for mine, saved in zip(self.values, values, strict=True):
                mine.copy_(saved)


class Trainer:
    """A model in training; `loop.update` changes its weights batch by batch.

    Two groups of weights with a rule each: the language model (decoder and the encoder's projection), trained always,
    its gradients clamped elementwise to ±grad_clip; and the CNN, only when fine-tuning, clamped only with weight decay,
    as the original does (train.lua).

    Args:
        model: on its device.
        grad_norm: instead of clamping, the language model's gradients are scaled down to this norm; 0: not.
        ema: decay of the running average of the trained weights; 0: none is kept.
        finetune_from_block: first convolution block (1-5) that fine-tuning trains; the ones before stay as they are.
        accumulate: pieces that batches pass through in, to begin with; their gradients add up to the whole batch's.
        dtype: number format of autocast; float32 switches autocast off.
        seed: dropout of iteration k depends on the seed, k and the process only, so a resumed run repeats it.

    Attributes:
        arithmetic: what it computes with, for people: see `kernels.arithmetic`.
    """

    def __init__(
        self,
        model: CaptionModel,
        *,
        lm_rule: Rule,
        cnn_rule: Rule | None,
        finetune_from_block: int,
        grad_clip: float,
        grad_norm: float = 0.0,
        ema: float = 0.0,
        self_critical: SelfCriticalLoss | None = None,
        label_smoothing: float = 0.0,
        cnn_weight_decay: float,
        accumulate: int,
        dtype: torch.dtype,
        seed: int,
        processes: Processes,
    ) -> None:
        self.model, self.dtype, self.seed, self.processes = model, dtype, seed, processes
        self.label_smoothing, self.self_critical = label_smoothing, self_critical
        self.accumulate, self.pieces = accumulate, Pieces(accumulate, TOO_LITTLE_MEMORY)
        self.device = next(model.parameters()).device
        keep_float32(dtype)
        prove_for_training(self.device)
        self.arithmetic = arithmetic(dtype, self.device)
        for module in model.encoder.cnn_modules():
            module.to(memory_format=torch.channels_last)
        for parameter in model.cnn_parameters():
            parameter.requires_grad_(False)
        self.groups = {"lm": ParameterGroup(model.language_model_parameters(), lm_rule, grad_clip, grad_norm)}
        if cnn_rule:
            clip = grad_clip if cnn_weight_decay > 0 else None
            cnn = model.cnn_parameters(from_block=finetune_from_block)
            self.groups["cnn"] = ParameterGroup(cnn, cnn_rule, clip, decay=cnn_weight_decay)
        trained = [parameter for group in self.groups.values() for parameter in group.parameters]
        self.average = RunningAverage(trained, ema) if ema else None
        self._from_block, self._finetuned = finetune_from_block, False
        self._frozen: FrozenLayers | None = None

    def trained(self, finetune: bool) -> list[ParameterGroup]:
        """Put the model into training mode; returns what is trained: the language model, and the CNN if fine-tuned."""
        self.model.train()
        for module in self.model.encoder.cnn_modules():
            module.train(finetune)
        if finetune != self._finetuned:
            self._finetuned, self._frozen = finetune, None
        if "cnn" in self.groups:
            for parameter in self.groups["cnn"].parameters:
                parameter.requires_grad_(finetune)
        return [group for name, group in self.groups.items() if finetune or name == "lm"]

    def loss_sum(self, piece: Batch, self_critical: bool = False) -> tuple[Tensor, int]:
        """The loss of a piece of a batch, summed, and over what it is summed.

        −log p over the targets; or −reward over the captions sampled (`SelfCritical.loss_sum`).
        """
        batch = piece.to(self.device)
        with torch.autocast(self.device.type, dtype=self.dtype, enabled=self.dtype != torch.float32):
            batch = self._through_frozen_layers(batch)
            if self_critical:
                assert self.self_critical is not None
                return self.self_critical(self.model, batch)
            return self.model(batch.inputs, batch.captions, self.label_smoothing)

    def _through_frozen_layers(self, batch: Batch) -> Batch:
        """The batch as the first trained layer sees it; in float32, where autocast casts nothing, as it is."""
        all_trained = self._finetuned and self._from_block < len(CONVS_BEFORE_POOL)
        if self.dtype == torch.float32 or all_trained or not isinstance(batch.inputs, PixelInputs):
            return batch
        if self._frozen is None:
            self._frozen = FrozenLayers(self.model, last_block=self._finetuned, dtype=self.dtype)
        return replace(batch, inputs=self._frozen(batch.inputs))

    def begin(self, iteration: int, groups: list[ParameterGroup]) -> None:
        """Be as at the beginning of an iteration, whatever an attempt at it without enough memory has left behind."""
        torch.manual_seed((self.seed * 1_000_003 + iteration) * 1024 + self.processes.rank)
        for group in groups:
            group.optimizer.zero_grad(set_to_none=True)

    def sum_over_processes(self, losses: list[tuple[Tensor, int]], groups: list[ParameterGroup]) -> Tensor:
        """Add up the gradients of all processes, and what the pieces of this one came to.

        All at once when the pieces are done, however many they were, and not with DistributedDataParallel, which sums
        during the last backward pass: see docs/architecture.md and bench/ddp.py.

        Args:
            losses: of each piece the sum of its losses and the number of its targets.

        Returns:
            (2,) on the device, in its widest type: the two, summed over all pieces of all processes.
        """
        totals = torch.zeros(2, dtype=widest_float(self.device), device=self.device)
        for loss_sum, num_targets in losses:
            totals[0] += loss_sum
            totals[1] += num_targets
        self.processes.sum_([totals, *self.gradients(groups)])
        return totals

    def gradients(self, groups: list[ParameterGroup]) -> list[Tensor]:
        """Those of all parameters of the groups that have one."""
        return [p.grad for group in groups for p in group.parameters if p.grad is not None]

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
        """Plain types and tensors for the resume state; the pieces too, since dropout draws anew for each of them, and
        how many processes there are, each of which draws its own."""
        states: dict[str, Any] = {"pieces": [self.accumulate, self.pieces.count], "processes": self.processes.size}
        if self.average:
            states["average"] = self.average.values
        return states | {name: group.optimizer.state_dict() for name, group in self.groups.items()}

    def averaged(self) -> contextlib.AbstractContextManager[None]:
        """Within, the model has the averaged weights, if an average is kept."""
        return self.average.in_place() if self.average else contextlib.nullcontext()

    def restore_optimizers(self, states: dict[str, Any], source: str) -> None:
        """Continue with saved optimiser states.

        Raises:
            InputError: they belong to another rule or model.
        """
        try:
            asked, needed = states.get("pieces", (1, 1))
            if asked == self.accumulate:  # another --accumulate is the user's new wish
                self.pieces.count = needed
            if (before := states.get("processes", self.processes.size)) != self.processes.size:
                log.info(
                    "%d process(es) go on with what %d did: the same training, but for rounding and what dropout draws",
                    self.processes.size,
                    before,
                )
            if self.average and "average" in states:
                self.average.restore(states["average"])
            for name, group in self.groups.items():
                if name in states:
                    group.restore(states[name])
        except (ValueError, KeyError, TypeError, AttributeError, IndexError, RuntimeError) as error:
            raise InputError(
                f"{source}: its optimiser state does not fit the options ({error})",
                remedy="resume with the same --optim and --cnn_optim, or use --start_from",
            ) from error
