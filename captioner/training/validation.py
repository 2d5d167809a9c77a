"""The look at the validation images that a training run takes every so often."""

import logging

import numpy as np
import torch
from tqdm import tqdm

from captioner.data.batches import VALIDATION_BATCH, dataset_batches, shares
from captioner.data.cached_features import CachedFeatures
from captioner.data.dataset import Dataset
from captioner.inference.caption import Caption
from captioner.inference.captioner import Captioner
from captioner.inference.run import Totals, captions_of, evaluate
from captioner.metrics import METRICS, score
from captioner.model.checkpoint_content import TrainingHistory
from captioner.search import SearchOptions
from captioner.training.health_checks import warn_of_captions
from captioner.training.trainer import Trainer

log = logging.getLogger(__name__)


class Validation:
    """Greedy captions, loss and scores of a model in training.

    Args:
        indices: the validation images, as rows of the dataset; each with captions.
        language_eval: whether captions are scored; then CIDEr says which model is best, else the loss.
        features: cached CNN features, of which those of the centre crop are used.
    """

    def __init__(
        self,
        trainer: Trainer,
        dataset: Dataset,
        indices: np.ndarray,
        *,
        language_eval: bool,
        num_workers: int,
        features: CachedFeatures | None,
    ) -> None:
        self.trainer, self.dataset, self.indices = trainer, dataset, indices
        self.language_eval, self.num_workers, self.features = language_eval, num_workers, features
        unk_id = dataset.vocab.unk_id
        self._told = ""  # of scores that cannot be computed here: once is enough
        self.search_options = SearchOptions(beam_size=1, suppress=(unk_id,) if unk_id else ())

    def __call__(self, history: TrainingHistory) -> bool:
        """Enter loss, scores and captions into the history; returns whether this is the best score so far."""
        totals, found = self._evaluate()
        assert totals.loss is not None
        loss, (top1, top5) = totals.loss, totals.accuracy
        captions = [caption.text for caption in found]
        history.val_loss_history[history.iteration] = loss
        history.val_accuracy_history[history.iteration] = {"top1": top1, "top5": top5}
        history.val_predictions = [{"image_id": caption.image_id, "caption": caption.text} for caption in found]
        quality, scored = -loss, ""
        if self.language_eval:
            scores = self._scores(captions)
            history.val_lang_stats_history[history.iteration] = scores
            quality, scored = scores["CIDEr"], f", CIDEr {scores['CIDEr']:.3f}"
        # Noise may score better than the first captions of a training; it is never the best model.
        trained = history.iteration > 0 or bool(history.opt.get("start_from"))
        better = trained and (history.best_score is None or quality > history.best_score)
        history.best_score = quality if better else history.best_score
        distinct = len(set(captions))
        log.info(
            "validation at iteration %d: loss %.4f, top-1 accuracy %.3f, top-5 %.3f%s, %d distinct captions of %d%s",
            history.iteration,
            loss,
            top1,
            top5,
            scored,
            distinct,
            len(captions),
            " (best so far)" if better else "",
        )
        if history.iteration:
            warn_of_captions(captions)
        return better

    def _scores(self, captions: list[str]) -> dict[str, float]:
        """coco-caption's scores, as far as they can be computed here; the main process computes them for all."""
        found: dict[str, float] = {}
        if self.trainer.processes.is_main:
            known = [self.dataset.references_of(int(i)) for i in self.indices]
            scores = score(captions, known, metrics=METRICS)
            if scores.skipped_line != self._told:
                log.warning("%s", scores.skipped_line or "all scores can be computed now")
            found, self._told = scores.corpus, scores.skipped_line
        return self.trainer.processes.gather(found)[0]

    def _evaluate(self) -> tuple[Totals, list[Caption]]:
        """What the images add up to, and the caption of each in order; all processes share the work."""
        trainer, processes = self.trainer, self.trainer.processes
        captioner = Captioner([trainer.model], self.dataset.vocab, trainer.device, torch.float32)
        totals = Totals()
        found: list[tuple[int, Caption]] = []
        positions = shares(len(self.indices), VALIDATION_BATCH, processes.rank, processes.size)
        batches = dataset_batches(self.dataset, self.indices, positions, self.num_workers, self.features)
        hidden = None if processes.is_main and log.isEnabledFor(logging.INFO) else True  # None: on a terminal
        bar = tqdm(total=len(self.indices), desc="validation", unit=" images", leave=False, disable=hidden)
        half = torch.autocast(trainer.device.type, dtype=trainer.dtype, enabled=trainer.dtype != torch.float32)
        with half, bar:
            for evaluated in evaluate(captioner, batches, self.search_options):
                totals.add(evaluated)
                bar.update(len(evaluated.positions) * processes.size)
                found += zip(evaluated.positions, captions_of(evaluated, self.dataset.vocab), strict=True)
        gathered = processes.gather((totals, found))
        merged = sorted((pair for _, pairs in gathered for pair in pairs), key=lambda pair: pair[0])
        return Totals.sum_of([part for part, _ in gathered]), [caption for _, caption in merged]
