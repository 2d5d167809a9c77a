"""Captions and references → scores named as coco-caption names them. Needs no COCO ids, no Java and no torch."""

from captioner.metrics.scorer import METRICS, WITHOUT_JAVA, Scores, score, tokenise_groups

__all__ = ["METRICS", "WITHOUT_JAVA", "Scores", "score", "tokenise_groups"]
