"""Curves of a training run for TensorBoard."""

from pathlib import Path

from captioner.errors import InputError
from captioner.model.checkpoint_content import TrainingHistory

CAPTIONS_SHOWN = 8


class EventLog:
    """Writes losses, validation losses, scores and a few captions as they come about.

    A continued run shows each step once: TensorBoard drops what a killed one wrote from the resumed iteration on.

    Args:
        folder: for the event files of this run.
        history: where the run stands.

    Raises:
        InputError: the package is not installed.
    """

    def __init__(self, folder: Path, history: TrainingHistory) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise InputError(
                "--tensorboard 1 needs a package that is not installed", remedy='pip install "captioner[tensorboard]"'
            ) from error
        self._writer = SummaryWriter(str(folder), purge_step=history.iteration)
        if history.iteration in history.val_loss_history:  # dropped too, but this validation will not be repeated
            self.validation(history)

    def training(self, iteration: int, name: str, value: float) -> None:
        """The loss of an iteration, or its reward; `name` says which."""
        self._writer.add_scalar(f"{name}/training", value, iteration)
        self._writer.flush()  # a killed run shall lack nothing from before the state it goes on from

    def validation(self, history: TrainingHistory) -> None:
        """The history's last validation: its loss, its scores and the first captions."""
        step = history.iteration
        self._writer.add_scalar("loss/validation", history.val_loss_history[step], step)
        for name, value in history.val_accuracy_history.get(step, {}).items():
            self._writer.add_scalar(f"accuracy/{name}", value, step)
        for name, value in history.val_lang_stats_history.get(step, {}).items():
            self._writer.add_scalar(f"score/{name}", value, step)
        shown = [f"{row['image_id']}: {row['caption']}" for row in history.val_predictions[:CAPTIONS_SHOWN]]
        self._writer.add_text("captions", "\n\n".join(shown), step)
        self._writer.flush()

    def close(self) -> None:
        """Nothing more will be written."""
        self._writer.close()
