"""Give a trained model the words of other data beside its own: what it has learnt about words stays."""

import dataclasses
import logging

import torch

from captioner.data.vocabulary import Vocab
from captioner.model.caption_model import build_model
from captioner.model.checkpoint_content import Checkpoint

log = logging.getLogger(__name__)


def grow_vocab(start: Checkpoint, vocab: Vocab, max_length: int) -> Checkpoint:
    """The model of `start` for its words and those of `vocab`.

    Its words keep their ids, and their rows of the embedding and of the output layer, as do START and END theirs; new
    words come after them. Each begins as the mean of the old ones, so that its logit is the mean of theirs and it is
    no likelier than they are on average (Hewitt 2021). All other weights stay: given a history of words the model
    knew, the logits of those words and of END are the old ones.

    Args:
        vocab: the words of the new data, and how its captions are split, which is how the grown model splits them.
        max_length: the longest caption of the new data, in words.

    Returns:
        A checkpoint without history.

    Raises:
        InputError: weights are missing or of the wrong shape.
    """
    known = start.vocab.size
    grown = start.vocab.grown_by(vocab)
    new = grown.size - known
    model = build_model(start)
    state_dict = model.state_dict()
    for name in model.decoder.rows_of_words:
        old = state_dict[f"decoder.{name}"]
        state_dict[f"decoder.{name}"] = torch.cat(
            [old[:-1], old[:-1].mean(0, keepdim=True).repeat_interleave(new, 0), old[-1:]]
        )
    log.info("vocabulary: the model's %d words and %d new", known, new)
    if vocab.tokenizer != start.vocab.tokenizer:
        log.info(
            "the new captions are split by the %s rule, the model's by the %s rule",
            vocab.tokenizer,
            start.vocab.tokenizer,
        )
    config = dataclasses.replace(start.config, vocab_size=grown.size, max_length=max_length)
    return Checkpoint(config, grown, state_dict)
