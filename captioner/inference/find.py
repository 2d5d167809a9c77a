"""Photos by words: which of them make a text likely.

By Bayes' rule the photo that a text is about is the one with the greatest log p(text | photo), whatever log p(text) is:
that is the same for all photos, and only makes the numbers of different texts comparable. To judge a text with a photo
costs the decoder about a fifth of a GFLOP, so that thousands of photos take many seconds. What is likely to be said
about a photo is therefore noted once, word by word; that gives a first guess for every photo and says which photos are
alike. Some photos are judged, those that come into question by the first guess and a sample of the others; what they
show about photos like them (kernel ridge regression) corrects the guess for all; the best by it are judged, too, and
correct it again.

A model that looks at 14×14 cells is asked about 7×7, each the mean of four: that is an index of a quarter of the size,
and what it says of a text is near to what it would say of the photo itself, not equal.

Letters: P photos, V words, K captions of a photo, D words of a text.
"""

import difflib
import hashlib
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from captioner.data.batch import Batch, PixelInputs
from captioner.data.tokenizers import tokenise
from captioner.errors import InputError
from captioner.inference.caption import Likelihood
from captioner.inference.captioner import Captioner
from captioner.inference.photo_index import PhotoIndex, Place
from captioner.model.attention_decoder import AttentionDecoder
from captioner.model.caption_model import CaptionModel
from captioner.model.checkpoint import Checkpoint
from captioner.model.checkpoint_fields import weights_digest
from captioner.model.decoder import Decoder
from captioner.model.encoder import GridEmbedding, coarser_grid
from captioner.model.one_text import text_logprobs
from captioner.search import EnsembleState, SearchOptions, ensemble_step, search
from captioner.search.rules import Step

FIRST = 32  # photos judged because the first guess likes them
SAMPLE = 64  # photos judged because they are spread over all
ROUNDS, EACH = 5, 32  # and then, round by round, those that the guess likes as the ones before have corrected it
PHOTOS_AT_ONCE = 64
BEAMS = 3  # captions by which likely words are found
LEAST = -30.0  # of a word's log-probability, in half precision
COMMON = 800  # words by which photos are compared, the most common ones of the vocabulary
MOST_CELLS = 49  # of a grid in the index
RIDGE = 0.3  # of the regression, in units of a photo's likeness to itself


@dataclass(frozen=True)
class Found:
    """One photo of a search.

    Attributes:
        position: of the photo, in the list that is searched.
        likelihood: of the text as the beginning of a caption, thus without END: photos are found better so, for a text
            seldom says all. `gain` is against the mean over all photos searched.
    """

    position: int
    likelihood: Likelihood


@dataclass(frozen=True)
class Query:
    """A text as the model reads it: ids, words, and those that it does not know, which are left out; what it knows
    instead, for people."""

    ids: tuple[int, ...]
    words: tuple[str, ...]
    unknown: tuple[str, ...]
    hint: str = ""


class PhotoSearch:
    """Searches among photos whose features are in an index.

    Args:
        captioner: what judges.
        digests: of its CNNs and of its language models (`digests_of`).
        folder: where indices lie.
    """

    def __init__(self, captioner: Captioner, digests: tuple[str, str], folder: Path) -> None:
        self.captioner = captioner
        self._eyes = [_Eye(model) for model in captioner.models]
        sizes = sum(math.prod(eye.shape) for eye in self._eyes), captioner.vocab.size + 1
        self.index = PhotoIndex(folder / f"photos-{digests[0]}", digests[1], sizes, self._likely_words)
        self.positions: list[int] = []  # of the photos that are searched, in the list given to `open`
        self._places: list[Place] = []
        self._words = np.empty((0, 0), np.float16)  # (P, V+1), log-probabilities
        self._likeness = np.empty((0, 0), np.float32)  # (P, COMMON); a photo's product with itself is 1 on average

    def open(self, paths: Sequence[Path], batches: Callable[[Sequence[int]], Iterable[Batch]]) -> None:
        """Search among these files from now on; new ones are looked at, unreadable ones left out.

        Args:
            batches: positions in `paths` → batches of those that can be decoded.

        Raises:
            InputError: the index cannot be written, or is damaged.
        """

        def encode(positions: Sequence[int]) -> Iterator[tuple[int, np.ndarray]]:
            for batch in batches(positions):
                if batch.positions:
                    yield from zip(batch.positions, self._features(batch), strict=True)

        self.index.update(paths, encode)
        found = [(position, place) for position, path in enumerate(paths) if (place := self.index.find(path))]
        self.positions, self._places = [position for position, _ in found], [place for _, place in found]
        if found:
            self._words = self.index.words(self._places)
            common = self._words[:, :COMMON].astype(np.float32)  # vocabularies begin with the most common words
            common -= common.mean(0)
            common /= np.maximum(common.std(0), 1e-3)
            self._likeness = common / max(float(np.sqrt((common**2).sum() / len(common))), 1e-3)

    def query(self, text: str) -> Query:
        """A text as the model reads it.

        Raises:
            InputError: it has no word that the model knows.
        """
        vocab = self.captioner.vocab
        words = tokenise(text, vocab.tokenizer)
        known = [word for word in words if word in vocab]
        unknown = tuple(word for word in words if word not in vocab)
        near = [match for word in unknown for match in difflib.get_close_matches(word, vocab.words, n=1)]
        hint = f" (it knows {', '.join(near)})" if near else ""
        if not known:
            raise InputError(f"{text!r}: the model knows none of these words{hint}", remedy="say it in other words")
        return Query(tuple(vocab.encode(known, len(known))), tuple(known), unknown, hint)

    def find(self, query: Query) -> list[Found]:
        """The photos that make a text likeliest, best first: FIRST + SAMPLE + ROUNDS * EACH of them at most."""
        first = guess = self._guess(query)
        spread = np.linspace(0, len(guess) - 1, min(SAMPLE, len(guess))).astype(np.int64)
        rows = np.union1d(_best(guess, FIRST), spread)
        judged = self._judge(query, rows)  # (rows, D)
        for _ in range(ROUNDS):
            guess = self._corrected(first, rows, judged.sum(1).numpy())
            left = np.setdiff1d(np.arange(len(guess)), rows)
            more = left[_best(guess[left], EACH)]
            rows, judged = np.concatenate([rows, more]), torch.cat([judged, self._judge(query, more)])
        logprobs = judged.sum(1)
        # log p(text): the mean of p(text | photo), of those not judged as guessed.
        others = torch.from_numpy(np.delete(guess, rows))
        log_p = torch.cat([logprobs, others.to(logprobs)]).logsumexp(0) - math.log(len(guess))
        return [
            Found(
                self.positions[rows[row]],
                Likelihood(query.words, tuple(judged[row].tolist()), query.unknown, (logprobs[row] - log_p).item()),
            )
            for row in logprobs.argsort(descending=True, stable=True).tolist()
        ]

    def rank(self, query: Query, position: int) -> int:
        """The place of a photo among all for a text, from 1; of one that is not judged, the first that is free."""
        found = [one.position for one in self.find(query)]
        return found.index(position) + 1 if position in found else len(found) + 1

    def _guess(self, query: Query) -> np.ndarray:
        """The logarithm of p(text | photo) as if words came independently, float32 (P,)."""
        return self._words[:, [word - 1 for word in query.ids]].sum(1, dtype=np.float32)

    def _corrected(self, guess: np.ndarray, rows: np.ndarray, logprobs: np.ndarray) -> np.ndarray:
        """A guess (P,) for all photos, after some (rows) were judged: the first one, stretched and shifted to fit, and
        what it is wrong by for photos like these."""
        slope, level = np.polyfit(guess[rows], logprobs, 1) if np.ptp(guess[rows]) > 0 else (0.0, logprobs.mean())
        fitted = slope * guess + level
        judged = self._likeness[rows]
        weights = np.linalg.solve(judged @ judged.T + RIDGE * np.eye(len(rows)), logprobs - fitted[rows])
        # In float32: else all of the likenesses would be copied into float64.
        corrected: np.ndarray = fitted + self._likeness @ (judged.T @ weights.astype(np.float32))
        return corrected

    @torch.inference_mode()
    def _judge(self, query: Query, rows: np.ndarray) -> Tensor:
        """Log-probabilities (P, D) of the words, on the CPU, for photos by row."""
        parts = [torch.empty(0, len(query.ids))]
        for start in range(0, len(rows), PHOTOS_AT_ONCE):
            some = rows[start : start + PHOTOS_AT_ONCE]
            features = self.index.features([self._places[row] for row in some])
            with self.captioner.turn:
                scored = [text_logprobs(own, seen, query.ids) for own, seen in self._encoded(features)]
                parts.append((torch.stack(scored).logsumexp(0) - math.log(len(scored))).cpu())
        return torch.cat(parts)

    @torch.inference_mode()
    def _features(self, batch: Batch) -> np.ndarray:
        """(P, F) of all CNNs, side by side."""
        assert isinstance(batch.inputs, PixelInputs)
        with self.captioner.turn:
            inputs = batch.inputs.to(self.captioner.device)
            each = [eye.features(inputs) for eye in self._eyes]
            return torch.cat([features.flatten(1).float().cpu() for features in each], 1).numpy()

    def _encoded(self, features: np.ndarray) -> list[tuple[Decoder | AttentionDecoder, Tensor]]:
        """Each model's decoder, and what it sees of photos with features (P, F)."""
        sizes = [math.prod(eye.shape) for eye in self._eyes]
        parts = torch.from_numpy(features).to(self.captioner.device).float().split(sizes, 1)
        return [
            (decoder, eye.encode(part.unflatten(1, eye.shape)))
            for eye, decoder, part in zip(self._eyes, self.captioner.decoders, parts, strict=True)
        ]

    def _decoding(self, features: np.ndarray) -> tuple[Step, Any]:
        """Step and state of a search for captions of photos with features (P, F)."""
        decoders, encodings = zip(*self._encoded(features), strict=True)
        states = tuple(decoder.start(seen) for decoder, seen in zip(decoders, encodings, strict=True))
        if len(decoders) == 1:
            return decoders[0].step, states[0]
        return ensemble_step([decoder.step for decoder in decoders]), EnsembleState(states)

    @torch.inference_mode()
    def _likely_words(self, features: np.ndarray) -> np.ndarray:
        """Log-probability of each word, and of END, at any place in a photo's likeliest captions: float16 (P, V+1)."""
        vocab, found = self.captioner.vocab, []
        options = SearchOptions(beam_size=BEAMS, n_best=BEAMS, suppress=(vocab.unk_id,) if vocab.unk_id else ())
        for start in range(0, len(features), PHOTOS_AT_ONCE):
            some = features[start : start + PHOTOS_AT_ONCE]
            with self.captioner.turn:
                step, state = self._decoding(some)
                captions = search(
                    step,
                    state,
                    num_images=len(some),
                    vocab_size=vocab.size,
                    max_length=self.captioner.max_length,
                    options=options,
                )
                rows = torch.tensor([photo for photo, own in enumerate(captions) for _ in own], device=state.device)
                texts = [torch.tensor([*one.tokens, 0]) for own in captions for one in own]
                labels = pad_sequence(texts, batch_first=True).to(state.device)  # (K·P, D+1)
                likely = torch.zeros(len(some), vocab.size + 1, device=state.device)
                tokens, state = labels.new_full((len(labels),), vocab.end_id), state.select(rows)
                for column in labels.unbind(1):
                    logprobs, state = step(tokens.clamp(min=1), state)  # a caption that has ended goes on to no effect
                    going_on = tokens > 0
                    likely.index_add_(0, rows[going_on], logprobs[going_on].exp())
                    tokens = column * going_on
                likely = (likely / likely.sum(1, keepdim=True)).log().clamp(min=LEAST)
                found.append(likely.cpu().numpy().astype(np.float16))
        return np.concatenate(found)


class _Eye:
    """What a model sees of photos, in the form in which the index keeps it."""

    def __init__(self, model: CaptionModel) -> None:
        self._model = model
        shape, embedding = model.encoder.feature_shape, model.encoder.embed
        self._coarse = embedding.coarser() if isinstance(embedding, GridEmbedding) and shape[0] > MOST_CELLS else None
        self.shape = shape if self._coarse is None else (shape[0] // 4, *shape[1:])  # of one photo

    def features(self, inputs: PixelInputs) -> Tensor:
        """What the CNN makes of photos."""
        features = self._model.cnn_features(inputs.images, inputs.offsets)
        return features if self._coarse is None else coarser_grid(features)

    def encode(self, features: Tensor) -> Tensor:
        """What the language model sees of such features."""
        return self._model.encode_features(features) if self._coarse is None else self._coarse(features)


def _best(guess: np.ndarray, count: int) -> np.ndarray:
    """The indices of the greatest values, first ones first among equals."""
    return np.argsort(-guess, kind="stable")[:count]


def digests_of(checkpoints: Sequence[Checkpoint], arithmetic: str) -> tuple[str, str]:
    """What features depend on, and what all else depends on that is kept: digests of CNNs, and of whole models."""
    of_cnns, of_models = hashlib.blake2b(arithmetic.encode(), digest_size=10), hashlib.blake2b(digest_size=10)
    for checkpoint in checkpoints:
        config, weights = checkpoint.config, checkpoint.state_dict
        cnn = {
            name: tensor for name, tensor in weights.items() if name.startswith(("encoder.features", "encoder.class"))
        }
        grid = config.decoder == "attention"
        of_cnns.update(
            f"{weights_digest(cnn)} {config.cnn_layer} {config.cnn_pixels} {config.image_mode} {grid}".encode()
        )
        of_models.update(f"{weights_digest(weights)} {checkpoint.vocab.words}".encode())
    return of_cnns.hexdigest(), of_models.hexdigest()
