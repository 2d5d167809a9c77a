"""The only loop over batches: their captions, and the loss of known ones. Training's validation runs through it too."""

import contextlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
from torch import Tensor

from captioner.data.batch import Batch
from captioner.data.batches import pinned_ahead
from captioner.data.vocabulary import Vocab
from captioner.inference.caption import Caption, Word
from captioner.inference.captioner import Captioner
from captioner.inference.explain import heat_maps
from captioner.inference.lookahead import Lookahead, Seen
from captioner.inference.rerank import reranked
from captioner.runtime.transfers import download
from captioner.search import EnsembleState, Hypothesis, SearchOptions, ensemble_step, search


@dataclass
class Evaluated:
    """One batch after the model, without its pixels: small enough to send to another process."""

    positions: list[int]  # of each captioned image within the run
    info: list[dict[str, Any]]
    hypotheses: list[list[Hypothesis]]  # per image, best first
    skipped: list[tuple[str, str]] = field(default_factory=list)  # unreadable files: name, reason
    loss_sum: float = 0.0  # −Σ log p over the targets, natural logarithm; where captions are known
    num_targets: int = 0
    num_top1: int = 0  # targets that were the likeliest next word, or among the five likeliest
    num_top5: int = 0
    heat: list[list[bytes]] = field(default_factory=list)  # per image and word of the best caption, where asked for
    arithmetic: str = ""  # what they were computed with


@dataclass
class Totals:
    """What a whole run adds up to; the loss does not depend on how images were batched."""

    num_captioned: int = 0
    num_skipped: int = 0
    loss_sum: float = 0.0
    num_targets: int = 0
    num_top1: int = 0
    num_top5: int = 0

    @classmethod
    def restored(cls, values: Mapping[str, float]) -> "Totals":
        """Those of an interrupted run, by name; what is not there is 0."""
        counts = {f.name: f.type(values.get(f.name, 0)) for f in fields(cls) if callable(f.type)}
        return cls(**counts)

    @classmethod
    def sum_of(cls, parts: Sequence["Totals"]) -> "Totals":
        """All parts together."""
        return cls(**{f.name: sum(getattr(part, f.name) for part in parts) for f in fields(cls)})

    @property
    def loss(self) -> float | None:
        """Mean −log p per target (words and one END per caption); None where no captions are known."""
        return self.loss_sum / self.num_targets if self.num_targets else None

    @property
    def accuracy(self) -> tuple[float, float]:
        """Part of the targets that were the likeliest next word, and that were among the five likeliest."""
        targets = max(self.num_targets, 1)
        return self.num_top1 / targets, self.num_top5 / targets

    def add(self, evaluated: Evaluated) -> None:
        self.num_captioned += len(evaluated.positions)
        self.num_skipped += len(evaluated.skipped)
        self.loss_sum += evaluated.loss_sum
        self.num_targets += evaluated.num_targets
        self.num_top1 += evaluated.num_top1
        self.num_top5 += evaluated.num_top5


def evaluate_batch(
    captioner: Captioner,
    batch: Batch,
    options: SearchOptions,
    seed: int,
    explain: bool = False,
    seen: Seen | None = None,
) -> Evaluated:
    """Caption the images of a batch; if it carries captions, add up their loss (of the first model).

    Args:
        seed: sampling only; the image at position i draws from seed + i, however images are batched.
        explain: with a map per word of where the first model looked (see `heat_maps`).
        seen: what the models see of the batch, where that is computed already.
    """
    evaluated = Evaluated(batch.positions, batch.info, [], batch.skipped, arithmetic=captioner.arithmetic)
    if not batch.positions:
        return evaluated
    with torch.inference_mode():
        seen = seen or captioner.see(batch, with_grid=explain)
        _caption(captioner, batch, seen.encodings, options, seed, evaluated)
    if seen.grid is not None:
        best = [hypotheses[0].tokens for hypotheses in evaluated.hypotheses]
        evaluated.heat = heat_maps(captioner.models[0], seen.grid, best)
    return evaluated


def _caption(
    captioner: Captioner,
    batch: Batch,
    encodings: Sequence[Tensor],
    options: SearchOptions,
    seed: int,
    evaluated: Evaluated,
) -> None:
    """Enter captions, and the loss of known ones."""
    seeds = [seed + position for position in batch.positions]
    evaluated.hypotheses = captions_of_encodings(captioner, encodings, options, seeds)
    known = batch.captions
    if len(known):
        model = captioner.models[0]
        loss_sum, num_targets, hits = model.loss_and_hits(encodings[0], known.image_of_caption, known.labels)
        loss, found = download([loss_sum, hits])
        evaluated.loss_sum, evaluated.num_targets = float(loss), num_targets
        evaluated.num_top1, evaluated.num_top5 = found.tolist()


def captions_of_encodings(
    captioner: Captioner, encodings: Sequence[Tensor], options: SearchOptions, seeds: Sequence[int]
) -> list[list[Hypothesis]]:
    """Search captions of images as each model sees them, one row per image, and order them as the options want."""
    # Captions that all models judge in the end are found by the first one alone.
    decoders = captioner.decoders[:1] if options.rerank == "models" else captioner.decoders
    states = tuple(decoder.start(encoding) for decoder, encoding in zip(decoders, encodings, strict=False))
    single = len(decoders) == 1
    found = search(
        decoders[0].step if single else ensemble_step([decoder.step for decoder in decoders]),
        states[0] if single else EnsembleState(states),
        num_images=len(seeds),
        vocab_size=captioner.vocab.size,
        max_length=captioner.max_length,
        options=options,
        seeds=seeds,
    )
    if not options.rerank:
        return found
    judges = [model.decoder for model in captioner.models]
    return [
        reranked(hypotheses, options, captioner.vocab.size, judges, [seen[image : image + 1] for seen in encodings])
        for image, hypotheses in enumerate(found)
    ]


def evaluate(
    captioner: Captioner, batches: Iterable[Batch], options: SearchOptions, seed: int = 0, explain: bool = False
) -> Iterator[Evaluated]:
    """Caption every batch in turn, in smaller pieces where the device's memory is too small for a whole one.

    On a GPU the next batch is read, uploaded and encoded meanwhile.

    Args:
        explain: with a map per word of where the first model looked (see `heat_maps`).
    """
    ahead = Lookahead(captioner, explain) if captioner.device.type == "cuda" else None
    encoded = ahead.encoded(pinned_ahead(batches)) if ahead else ((batch, None) for batch in batches)

    def caption(piece: Batch, seen: Seen | None) -> Evaluated:
        with captioner.turn, ahead.searching(seen) if ahead and seen else contextlib.nullcontext():
            return evaluate_batch(captioner, piece, options, seed, explain, seen)

    for batch, seen in encoded:
        done: list[Evaluated] = []
        while not done:  # once more, in smaller pieces, where the memory was too small
            with captioner.pieces.of(batch) as pieces:
                done = [caption(piece, seen if len(pieces) == 1 else None) for piece in pieces]
        yield _join(done)


def _join(parts: list[Evaluated]) -> Evaluated:
    return Evaluated(
        positions=[position for part in parts for position in part.positions],
        info=[info for part in parts for info in part.info],
        hypotheses=[hypotheses for part in parts for hypotheses in part.hypotheses],
        skipped=[skipped for part in parts for skipped in part.skipped],
        loss_sum=sum(part.loss_sum for part in parts),
        num_targets=sum(part.num_targets for part in parts),
        num_top1=sum(part.num_top1 for part in parts),
        num_top5=sum(part.num_top5 for part in parts),
        heat=[heat for part in parts for heat in part.heat],
        arithmetic=parts[0].arithmetic,
    )


def captions_of(evaluated: Evaluated, vocab: Vocab, min_confidence: float = 0.0) -> list[Caption]:
    """A batch's captions in words, one per readable image; below `min_confidence` the text is withheld."""
    heats = evaluated.heat or [[]] * len(evaluated.positions)
    each = zip(evaluated.positions, evaluated.info, evaluated.hypotheses, heats, strict=True)
    return [
        replace(
            _caption_of(hypotheses, vocab, info.get("file_path", ""), info.get("id", position + 1), min_confidence),
            heat=tuple(heat),
            arithmetic=evaluated.arithmetic,
        )
        for position, info, hypotheses, heat in each
    ]


def _caption_of(
    hypotheses: Sequence[Hypothesis], vocab: Vocab, file_name: str, image_id: int | str, min_confidence: float
) -> Caption:
    best, *others = hypotheses
    words = [vocab.word(token) for token in best.tokens]
    abstained = best.confidence < min_confidence
    return Caption(
        text="" if abstained else " ".join(words),
        logprob=best.logprob,
        confidence=best.confidence,
        # The last of the log-probabilities may be END's.
        words=tuple(map(Word, words, best.word_logprobs)),
        alternatives=tuple(_caption_of([other], vocab, file_name, image_id, 0.0) for other in others),
        file_name=file_name,
        image_id=image_id,
        abstained=abstained,
    )
