"""The training recipe: batch, loss, backward, clip, step, schedule; validation, saving. Read this first.

What a run consists of is opened in one call (setup.py and opening.py); the two functions below are what it does.
"""

import itertools
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from captioner.data.batch import Batch
from captioner.data.vocabulary import Vocab
from captioner.model.checkpoint_content import Checkpoint, TrainingHistory
from captioner.training.health_checks import LossMonitor
from captioner.training.optim import without_improvement
from captioner.training.options import TrainingOptions
from captioner.training.resume import ResumeState
from captioner.training.run_files import Progress, RunFiles
from captioner.training.tensorboard import EventLog
from captioner.training.trainer import Trainer

log = logging.getLogger(__name__)

AGREE_EVERY = 10  # iterations between two rounds in which several processes ask each other whether to stop


@dataclass
class TrainingRun:
    """All that a run consists of.

    Attributes:
        last: the number of iterations; None: without end.
        batches: from the history's iteration on; this process's share of each.
        schedule: the factor of both learning rates in an iteration.
        validate: enters loss, scores and captions of the validation images into the history; whether they are the best.
        stop_signal: the number of the signal that asked to stop, 0 if none has.
    """

    options: TrainingOptions
    trainer: Trainer
    vocab: Vocab
    decoding: dict[str, object]
    history: TrainingHistory
    last: int | None
    batches: Iterator[Batch]
    schedule: Callable[[int], float]
    validate: Callable[[TrainingHistory], bool]
    monitor: LossMonitor
    progress: Progress
    files: RunFiles
    events: EventLog | None
    stop_signal: Callable[[], int]

    def validation_is_due(self, iteration: int) -> bool:
        """Every so often and at the end; not again right after resuming."""
        due = iteration % self.options.save_checkpoint_every == 0 or self.is_finished(iteration)
        return due and iteration not in self.history.val_loss_history

    def is_finished(self, iteration: int) -> bool:
        """Whether all iterations are done, or the last validations brought no better model."""
        patience = self.options.patience if self.options.lr_schedule != "plateau" else 0
        in_vain = patience > 0 and without_improvement(self.history) >= patience
        return in_vain or (self.last is not None and iteration >= self.last)

    def asked_to_stop(self, iteration: int) -> int:
        """The number of the signal, the same in all processes; 0: go on."""
        processes = self.trainer.processes
        return processes.largest(self.stop_signal()) if processes.size == 1 or iteration % AGREE_EVERY == 0 else 0

    def save_models(self, better: bool) -> None:
        """Write report and last model, and the best one if this is it, after making sure that the weights are sound."""
        self.trainer.require_sound_weights(self.history.iteration)
        if self.trainer.processes.is_main:
            self.files.save_models(self._checkpoint(), better, self.progress.pace)
            if self.events:
                self.events.validation(self.history)

    def save_state(self) -> None:
        """Write what --resume goes on from, after making sure that loss and weights are sound."""
        self.monitor.flush()
        self.trainer.require_sound_weights(self.history.iteration)
        if self.trainer.processes.is_main:
            states = self.trainer.optimizer_states()
            self.files.save_state(ResumeState(self._checkpoint(), states, self.monitor.first), self.progress.pace)
        self.files.state_is_saved()

    def _checkpoint(self) -> Checkpoint:
        model = self.trainer.model
        return Checkpoint(model.config, self.vocab, model.state_dict(), self.history, self.decoding)


def train(run: TrainingRun) -> int:
    """Train until the last iteration or until asked to stop; returns the number of that signal, else 0.

    The history's iteration is the number of updates behind the weights; validation and saving come before the next one.
    """
    history, options = run.history, run.options
    for iteration in itertools.count(history.iteration):
        if run.validation_is_due(iteration):
            run.monitor.flush()
            with run.trainer.averaged():
                better = run.validate(history)
                nothing_better_comes = run.is_finished(iteration) and history.best_score is None  # not one iteration
                run.save_models(better or nothing_better_comes)
            run.save_state()
        finished, stopping = run.is_finished(iteration), run.asked_to_stop(iteration)
        if finished or stopping or run.files.state_is_old():
            run.save_state()
        if finished or stopping:
            break

        batch = run.progress.next(run.batches)
        finetune = 0 <= options.finetune_cnn_after <= iteration
        rewarded = 0 <= options.self_critical_after <= iteration
        rate_factor = run.schedule(iteration)
        loss = update(run.trainer, batch, iteration, rate_factor=rate_factor, finetune=finetune, self_critical=rewarded)
        history.iteration = iteration + 1

        run.monitor.note(iteration, loss, rewarded=rewarded)
        if options.losses_log_every and iteration % options.losses_log_every == 0:
            run.monitor.flush()
            name, curve = ("reward", history.reward_history) if rewarded else ("loss", history.loss_history)
            run.progress.report(iteration, name, curve[iteration], rate_factor * options.learning_rate)
    if run.events:
        run.events.close()
    return stopping


def update(
    trainer: Trainer,
    batch: Batch,
    iteration: int,
    *,
    rate_factor: float,
    finetune: bool,
    self_critical: bool = False,
) -> Tensor:
    """Update the weights once.

    Args:
        batch: this process's share of the global batch.
        rate_factor: multiplies all learning rates.
        finetune: whether the CNN is trained too.
        self_critical: whether captions are sampled and rewarded; else the given ones are made likelier.

    Returns:
        scalar float32 on the device: the loss of the global batch before the update, mean −log p per target; or the
        mean −reward per sample.

    Raises:
        InputError: the memory is too small even for one image at a time.
    """
    groups = trainer.trained(finetune)

    losses: list[tuple[Tensor, int]] = []
    while not losses:  # once more, in smaller pieces, where the memory was too small
        with trainer.pieces.of(batch) as pieces:
            trainer.begin(iteration, groups)
            losses = [_backward(trainer, piece, self_critical) for piece in pieces]
    loss_sum, num_targets = trainer.sum_over_processes(losses, groups)
    torch._foreach_div_(trainer.gradients(groups), num_targets.float())
    for group in groups:
        group.clip_gradients()
        group.set_learning_rate(rate_factor)
        group.optimizer.step()
    if trainer.average:
        trainer.average.update(iteration)
    return (loss_sum / num_targets).float()


def _backward(trainer: Trainer, piece: Batch, self_critical: bool) -> tuple[Tensor, int]:
    """Add the gradients of a piece of a batch; returns its loss, summed, and over how many targets."""
    loss_sum, num_targets = trainer.loss_sum(piece, self_critical)
    loss_sum.backward()
    return loss_sum.detach(), num_targets
