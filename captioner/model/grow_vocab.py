"""Move a trained model to data with other words: what it has learnt about words both have is kept."""

import dataclasses
import logging

import torch

from captioner.data.vocabulary import UNK, Vocab
from captioner.model.caption_model import build_model, make_decoder
from captioner.model.checkpoint_content import Checkpoint

log = logging.getLogger(__name__)


def grow_vocab(start: Checkpoint, vocab: Vocab, max_length: int, seed: int) -> Checkpoint:
    """The model of `start` for the words of `vocab`.

    Words of both vocabularies keep their rows of the embedding and of the output layer, as do START and END; new words
    get the initial values of a new model; words gone are dropped. UNK is a word like others here. All other weights
    stay: given a history of shared words, the logits of shared words and of END are those of the old model.

    Args:
        vocab: the words of the new data, V of them.
        max_length: the longest caption of the new data, in words.
        seed: of the initial values.

    Returns:
        A checkpoint without history.

    Raises:
        InputError: weights are missing or of the wrong shape.
    """
    config = dataclasses.replace(start.config, vocab_size=vocab.size, max_length=max_length)
    old_rows = {word: row for row, word in enumerate(start.vocab.words)}
    shared = [row for row, word in enumerate(vocab.words) if word in old_rows]
    targets = torch.tensor([*shared, vocab.size])
    sources = torch.tensor([*(old_rows[vocab.words[row]] for row in shared), start.vocab.size])
    torch.manual_seed(seed)
    fresh = make_decoder(config)
    state_dict = build_model(start).state_dict()
    for name in fresh.rows_of_words:
        rows = fresh.state_dict()[name]
        rows[targets] = state_dict[f"decoder.{name}"][sources]
        state_dict[f"decoder.{name}"] = rows
    log.info(
        "vocabulary: %d words shared, %d new, %d dropped; UNK %s",
        len(shared),
        vocab.size - len(shared),
        start.vocab.size - len(shared),
        {(1, 1): "kept", (0, 1): "new", (1, 0): "dropped", (0, 0): "in neither"}[UNK in start.vocab, UNK in vocab],
    )
    if vocab.tokenizer != start.vocab.tokenizer:
        log.info(
            "the new captions are split by the %s rule, the model's by the %s rule",
            vocab.tokenizer,
            start.vocab.tokenizer,
        )
    return Checkpoint(config, vocab, state_dict)
