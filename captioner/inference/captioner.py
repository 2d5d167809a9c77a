"""The only evaluation loop: captions and loss of batches, for training-time validation and for caption-eval."""

import collections
import copy
import logging
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from captioner.data.batches import Batch
from captioner.data.vocabulary import Vocab
from captioner.model.caption_model import CaptionModel
from captioner.model.kernels.packed_linear import can_pack
from captioner.runtime.precision import prepare_for_inference
from captioner.search import Hypothesis, SearchOptions, ensemble_step, search

log = logging.getLogger(__name__)


@dataclass
class Evaluated:
    """One batch after the model, without its pixels: small enough to send to another process."""

    positions: list[int]  # of each captioned image within the run
    info: list[dict[str, Any]]
    hypotheses: list[list[Hypothesis]]  # per image, best first
    skipped: list[tuple[str, str]] = field(default_factory=list)  # unreadable files: name, reason
    loss_sum: float = 0.0  # −Σ log p over the targets, natural logarithm; where captions are known
    num_targets: int = 0


@dataclass
class Totals:
    """What a whole run adds up to; the loss does not depend on how images were batched."""

    num_captioned: int = 0
    num_skipped: int = 0
    loss_sum: float = 0.0
    num_targets: int = 0

    @property
    def loss(self) -> float | None:
        """Mean −log p per target (words and one END per caption); None where no captions are known."""
        return self.loss_sum / self.num_targets if self.num_targets else None

    def add(self, evaluated: Evaluated) -> None:
        self.num_captioned += len(evaluated.positions)
        self.num_skipped += len(evaluated.skipped)
        self.loss_sum += evaluated.loss_sum
        self.num_targets += evaluated.num_targets


class Captioner:
    """One model, or several that average their probabilities, ready to caption batches on a device.

    Args:
        models: with the same vocabulary and maximal length.
        vocab: theirs.
        dtype: number format of the CNN and of the search's products; sums and probabilities are float32. Other than
            float32 converts the CNN in place. The loss of given captions is computed in the decoder's own format.
    """

    def __init__(self, models: Sequence[CaptionModel], vocab: Vocab, device: torch.device, dtype: torch.dtype) -> None:
        self.models, self.vocab, self.device = list(models), vocab, device
        self.max_length = min(model.config.max_length for model in models)
        for model in self.models:
            model.to(device).eval()
            for module in model.encoder.cnn_modules():
                prepare_for_inference(module, dtype)
        self.decoders = [model.decoder for model in self.models]
        if dtype != torch.float32:
            self.decoders = [copy.deepcopy(decoder).to(dtype) for decoder in self.decoders]
        if dtype == torch.bfloat16 and can_pack(device):
            for decoder in self.decoders:
                decoder.pack()

    def encode(self, batch: Batch) -> list[Tensor]:
        """What each model's decoder sees of the images, one row per image."""
        return [model.encode(batch.images, batch.offsets, batch.features) for model in self.models]

    @torch.inference_mode()
    def __call__(self, batch: Batch, options: SearchOptions, seed: int) -> Evaluated:
        """Caption the images of a batch; if it carries captions, add up their loss (of the first model).

        Args:
            seed: sampling only; the image at position i draws from seed + i, however images are batched.
        """
        evaluated = Evaluated(batch.positions, batch.info, [], batch.skipped)
        if not batch.positions:
            return evaluated
        moved = batch.to(self.device)
        encodings = self.encode(moved)
        evaluated.hypotheses = self._search(encodings, options, [seed + position for position in batch.positions])
        if moved.labels is not None and len(moved.labels):
            assert moved.image_of_caption is not None
            loss_sum, num_targets = self.models[0].loss_sum(encodings[0], moved.image_of_caption, moved.labels)
            evaluated.loss_sum, evaluated.num_targets = float(loss_sum), int(num_targets)
        return evaluated

    def _search(self, encodings: list[Tensor], options: SearchOptions, seeds: list[int]) -> list[list[Hypothesis]]:
        states = tuple(decoder.start(encoding) for decoder, encoding in zip(self.decoders, encodings, strict=True))
        single = len(self.decoders) == 1
        return search(
            self.decoders[0].step if single else ensemble_step([decoder.step for decoder in self.decoders]),
            states[0] if single else states,
            num_images=len(seeds),
            vocab_size=self.vocab.size,
            max_length=self.max_length,
            options=options,
            seeds=seeds,
        )


def evaluate(
    captioner: Captioner, batches: Iterable[Batch], options: SearchOptions, seed: int = 0
) -> Iterator[Evaluated]:
    """Caption every batch in turn, in halves where the device's memory is too small for a whole one."""
    waiting: collections.deque[Batch] = collections.deque()
    for batch in batches:
        waiting.append(batch)
        done: list[Evaluated] = []
        while waiting:
            part = waiting.popleft()
            try:
                done.append(captioner(part, options, seed))
            except torch.OutOfMemoryError:
                if len(part.positions) <= 1:
                    raise
                log.warning("out of memory with %d images at once: going on with half as many", len(part.positions))
                waiting.extendleft(reversed(part.split(2)))
        yield _join(done)


def _join(parts: list[Evaluated]) -> Evaluated:
    return Evaluated(
        positions=[position for part in parts for position in part.positions],
        info=[info for part in parts for info in part.info],
        hypotheses=[hypotheses for part in parts for hypotheses in part.hypotheses],
        skipped=[skipped for part in parts for skipped in part.skipped],
        loss_sum=sum(part.loss_sum for part in parts),
        num_targets=sum(part.num_targets for part in parts),
    )


def result_rows(evaluated: Evaluated, vocab: Vocab, min_confidence: float = 0.0) -> list[dict[str, Any]]:
    """One row per image as in the original's vis.json, with how sure the model is.

    `logprob` is the natural log of p(caption | image), summed over the words and END; `confidence` its geometric mean
    per word, between 0 and 1. Below `min_confidence` the caption is "" and the row is marked `abstained`.
    """
    rows = []
    for position, info, hypotheses in zip(evaluated.positions, evaluated.info, evaluated.hypotheses, strict=True):
        described = [_describe(hypothesis, vocab) for hypothesis in hypotheses]
        row = {
            "image_id": info.get("id", position + 1),
            **described[0],
            "file_name": info.get("file_path", ""),
        }
        if row["confidence"] < min_confidence:
            row |= {"caption": "", "abstained": True}
        if len(described) > 1:
            row["n_best"] = described
        rows.append(row)
    return rows


def _describe(hypothesis: Hypothesis, vocab: Vocab) -> dict[str, Any]:
    words = [vocab.word(token) for token in hypothesis.tokens]
    return {
        "caption": " ".join(words),
        "logprob": hypothesis.logprob,
        "confidence": hypothesis.confidence,
        "words": [
            {"word": word, "logprob": logprob} for word, logprob in zip(words, hypothesis.word_logprobs, strict=False)
        ],
    }
