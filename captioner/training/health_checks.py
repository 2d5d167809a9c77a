"""What ends a training run or makes its log warn before hours are lost: loss, captions or pixels that look wrong."""

import logging
import math
from collections import Counter
from collections.abc import Callable, Collection
from itertools import pairwise

import torch
from torch import Tensor

from captioner.errors import InputError
from captioner.model.caption_model import CaptionModel
from captioner.model.checkpoint_content import TrainingHistory
from captioner.runtime.transfers import Later

log = logging.getLogger(__name__)

EXPLODED = 20  # times the first loss: stop, as the original does

SAMPLES = 5000  # of self-critical training, looked at together
SHORTER, LONGER = 0.6, 1.5  # than the references
TOO_MANY = 0.1  # of the samples, and twice as many as in the beginning
POORER = 0.5  # of the words in the beginning

WINDOW = 100  # iterations whose mean loss counts: it varies by less than 1 %, the loss of one batch by 5 %
LIKE_GUESSING = 0.9  # of ln(V+1); after two windows a healthy run on Flickr8k is at half of it
RISEN = 1.15  # times the best window; switching on VGG16's own dropout for fine-tuning costs less

# How far photos move the mean features of the last convolution away from those of a plain mean-coloured picture, in
# lengths of the latter. VGG16 of Oxford: 4.3-10.1 with its own pixels, 0.29-0.56 with torchvision's, which are about
# 58 times smaller; the other way round 58 times more than it should be. Scaling a layer does not change it.
TOO_WEAK, TOO_STRONG = 1.0, 60.0


ALIKE, ENOUGH = 0.9, 10  # share of validation captions that are the same one; of fewer it says nothing


class LossTrend:
    """Warns once if the loss is still what guessing gives, and once if it rises.

    Args:
        vocab_size: V; guessing one of V words or END costs ln(V+1) per target.
        window: iterations to average over.
    """

    def __init__(self, vocab_size: int, window: int = WINDOW) -> None:
        self.guessing, self.window = math.log(vocab_size + 1), window
        self._sum, self._count = 0.0, 0
        self._best = math.inf
        self._windows = 0
        self._quiet: set[str] = set()

    def add(self, iteration: int, loss: float) -> None:
        """Take the loss of the next iteration; at the end of a window, compare."""
        self._sum, self._count = self._sum + loss, self._count + 1
        if self._count < self.window:
            return
        mean, self._sum, self._count = self._sum / self._count, 0.0, 0
        self._windows += 1
        span = f"iterations {iteration - self.window + 1}-{iteration}"
        if self._windows > 1 and mean > LIKE_GUESSING * self.guessing:
            self._warn(
                "guessing",
                f"the loss does not fall: {mean:.3f} on average over {span}, and guessing gives {self.guessing:.3f}; "
                "try a --learning_rate ten times higher or lower (4e-4 suits adam), and look at the data with "
                "caption-prepro --check 1",
            )
        elif mean > RISEN * self._best:
            self._warn(
                "rising",
                f"the loss rises: {mean:.3f} on average over {span}, {self._best:.3f} at its best; lower "
                "--learning_rate (and --cnn_learning_rate), or start from the best checkpoint with --start_from",
            )
        self._best = min(self._best, mean)

    def _warn(self, kind: str, text: str) -> None:
        if kind not in self._quiet:
            log.warning("warning: %s", text)
        self._quiet.add(kind)


class SampleTrend:
    """Warns, once of each, if the captions that self-critical training samples collapse into what pays alone.

    The first samples are the measure, but for the length, whose measure is that of the references.

    Args:
        reference_length: mean number of words of the references, END included.
        unfinished: ids of words that no caption should end in: articles, prepositions.
        window: samples to count together.
    """

    def __init__(
        self, reference_length: float, unfinished: Collection[int], end_id: int, window: int = SAMPLES
    ) -> None:
        self.reference_length, self.unfinished, self.end_id = reference_length, set(unfinished), end_id
        self.window = window
        self._samples: list[list[int]] = []
        self._first: dict[str, float] = {}
        self._quiet: set[str] = set()

    def add(self, samples: list[list[int]]) -> None:
        """Take samples, ids with END; at the end of a window, compare."""
        self._samples += samples
        if len(self._samples) < self.window:
            return
        seen, self._samples = self._measure(self._samples), []
        self._first = self._first or seen
        length = seen["length"] / self.reference_length
        if not SHORTER < length < LONGER:
            self._warn("length", f"have {seen['length']:.1f} words, the references {self.reference_length:.1f}")
        for name, what in (("repeated", "say a word twice in a row"), ("unfinished", "end in an article or the like")):
            if seen[name] > max(TOO_MANY, 2 * self._first[name]):
                self._warn(name, f"{what}: {100 * seen[name]:.0f} %, {100 * self._first[name]:.0f} % in the beginning")
        if seen["words"] < POORER * self._first["words"]:
            self._warn("words", f"use {seen['words']:.0f} words, {self._first['words']:.0f} in the beginning")

    def _measure(self, samples: list[list[int]]) -> dict[str, float]:
        spoken = [[word for word in sample if word != self.end_id] for sample in samples]
        return {
            "length": sum(map(len, samples)) / len(samples),
            "repeated": sum(any(a == b for a, b in pairwise(words)) for words in spoken) / len(samples),
            "unfinished": sum(words[-1] in self.unfinished for words in spoken if words) / len(samples),
            "words": float(len({word for words in spoken for word in words})),
        }

    def _warn(self, kind: str, text: str) -> None:
        if kind not in self._quiet:
            log.warning(
                "warning: self-critical training may be collapsing: the sampled captions %s; lower --learning_rate, or "
                "stop here with the best model so far",
                text,
            )
        self._quiet.add(kind)


class LossMonitor:
    """Watches the loss without making a GPU wait: each loss is read once the next one is under way.

    Args:
        history: its histories of loss and reward are filled every `log_every` iterations (0: never).
        first: the run's first loss, where it was resumed.
        describe: names the batch of an iteration, for the error.
        trend: warns of a loss that does not fall.
    """

    def __init__(
        self,
        history: TrainingHistory,
        first: float | None,
        log_every: int,
        describe: Callable[[int], str],
        trend: LossTrend,
    ) -> None:
        self.history, self.first, self.log_every, self.describe = history, first, log_every, describe
        self.trend = trend
        self._pending: tuple[int, Later, bool] | None = None

    def note(self, iteration: int, loss: Tensor, *, rewarded: bool = False) -> None:
        """Take the loss of an iteration, or its negative reward if it was `rewarded`, and check the one before."""
        under_way = Later(loss)
        self.flush()
        self._pending = (iteration, under_way, rewarded)

    def flush(self) -> None:
        """Read and check the last loss; after this every update so far is known to be sound.

        Raises:
            InputError: the loss is not finite, or 20 times the first.
        """
        if self._pending is None:
            return
        (iteration, under_way, rewarded), self._pending = self._pending, None
        loss = float(under_way)
        if not math.isfinite(loss):
            raise InputError(
                f"iteration {iteration}: the loss is {loss}, on {self.describe(iteration)}",
                remedy="the last saved state is good: look at these images, lower --learning_rate, then --resume auto",
            )
        logged = self.log_every and iteration % self.log_every == 0
        if rewarded:
            if logged:
                self.history.reward_history[iteration] = -loss
            return
        if self.first is None:
            self.first = loss
        if loss > EXPLODED * self.first:
            raise InputError(
                f"iteration {iteration}: the loss exploded from {self.first:.3f} to {loss:.3f}",
                remedy="the last saved state is good; lower --learning_rate",
            )
        self.trend.add(iteration, loss)
        if logged:
            self.history.loss_history[iteration] = loss


def warn_of_captions(captions: list[str]) -> None:
    """Warn if nearly all images of a validation got the same caption."""
    if len(captions) < ENOUGH:
        return
    ((caption, count),) = Counter(captions).most_common(1)
    if count >= ALIKE * len(captions):
        log.warning(
            "warning: %d of %d validation captions are alike (%r): the model does not look at the images, as at the "
            "beginning of any training; train longer, and if that lasts, check --cnn_model and --cnn_pixels, or try "
            "a higher --learning_rate",
            count,
            len(captions),
            caption,
        )


@torch.no_grad()
def warn_of_pixels(model: CaptionModel, images: Tensor) -> None:
    """Warn if the pictures are no grey levels 0-255, or the CNN's weights want them in the other convention.

    Args:
        model: with a CNN trained on ImageNet.
        images: uint8 (N, 3, 256, 256), a few photos; the median decides.
    """
    if int(images.max()) <= 1:
        log.warning(
            "warning: the pictures of the data set are black: no grey level above 1; were they scaled to 0-1 "
            "where 0-255 belongs? Prepare them with caption-prepro"
        )
        return
    pixels, features = model.config.cnn_pixels, model.encoder.features
    if pixels == "data":
        return  # what the user asks for; such weights are random, or the user's own
    values = model.pixels(images.to(next(features.parameters()).device))
    of_photos = features(values).mean(dim=(2, 3))  # (N, C)
    of_mean = features(torch.zeros_like(values[:1])).mean(dim=(2, 3))
    moved = float(((of_photos - of_mean).norm(dim=1) / of_mean.norm()).median())
    if not math.isfinite(moved) or TOO_WEAK <= moved <= TOO_STRONG:  # not finite: a CNN without biases tells nothing
        return
    other = {"caffe": "torchvision", "torchvision": "caffe"}[pixels]
    found = "hardly differ from those of a plain picture" if moved < TOO_WEAK else "are far out of range"
    log.warning(
        "warning: the CNN's features of the photos %s (%.2g times the plain picture's; %g to %g is usual): its weights "
        "may want %s pixels; try --cnn_pixels %s",
        found,
        moved,
        TOO_WEAK,
        TOO_STRONG,
        other,
        other,
    )
