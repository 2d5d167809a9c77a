"""Greedy, sampling and beam search over `step(tokens, state) -> (logprobs, state)`; knows no images and no words.

All images and all their beams go through the network as one batch per step. Images whose result is certain leave the
batch. Nothing in a step loops over images or beams.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from captioner.errors import InputError
from captioner.search.beam import beam_search
from captioner.search.options import Hypothesis, SearchOptions
from captioner.search.paths import follow_paths
from captioner.search.requirements import automaton_of
from captioner.search.rules import State, Step

__all__ = ["EnsembleState", "Hypothesis", "SearchOptions", "State", "ensemble_step", "require_possible", "search"]


@torch.inference_mode()
def search(
    step: Step,
    state: State,
    *,
    num_images: int,
    vocab_size: int,
    max_length: int,
    options: SearchOptions,
    seeds: Sequence[int] | None = None,
) -> list[list[Hypothesis]]:
    """Find captions for a batch of images.

    Args:
        step: the network; it is fed START first.
        state: its state after the image step, one row per image.
        num_images: rows of `state`.
        vocab_size: V.
        max_length: no caption has more tokens, END counting as one.
        options: how to search.
        seeds: one per image, for sampling: an image and its seed alone decide what is drawn. Without them they are
            drawn from torch's generator.

    Returns:
        For each image its hypotheses, best first: `n_best` of them, different from each other (samples may repeat).

    Raises:
        InputError: an id of the options is no word, or no caption can be as they want it.
    """
    require_possible(options, vocab_size, max_length)
    if num_images == 0:
        return []
    if options.require:
        return _with_requirements(step, state, num_images, vocab_size, max_length, options)
    if options.beam_size > 1 and not options.sample:
        return beam_search(step, state, num_images, vocab_size, max_length, options)
    if not options.sample:
        seeds = None  # a greedy search draws nothing, whatever the caller offers
    elif seeds is None:
        seeds = torch.randint(2**62, (num_images,)).tolist()
    return follow_paths(step, state, num_images, vocab_size, max_length, options, seeds)


def require_possible(options: SearchOptions, vocab_size: int, max_length: int) -> None:
    """Make sure that there are captions as `options` want them.

    Raises:
        InputError: an id is no word, or what has to be said is too long.
    """
    ids = {
        "suppress": options.suppress,
        "bad_endings": options.bad_endings,
        "repeatable": options.repeatable,
        "prefix": options.prefix,
        "require": [word for forms in options.require for form in forms for word in form],
    }
    for name, words in ids.items():
        for word in words:
            if not 1 <= word <= vocab_size:
                raise InputError(f"{name} {word}", expected=f"word ids from 1 to {vocab_size}")
    least, most = len(options.prefix), min(max_length, options.max_words or max_length)
    if options.require:
        automaton = automaton_of(options.require, options.suppress)
        least += int(automaton.missing[automaton.after(options.prefix)])
    if least > most:
        raise InputError(
            f"what the captions have to say takes {least} words, and they have {most} at most", remedy="ask for less"
        )


def _with_requirements(
    step: Step, state: State, num_images: int, vocab_size: int, max_length: int, options: SearchOptions
) -> list[list[Hypothesis]]:
    found = beam_search(step, state, num_images, vocab_size, max_length, options)
    without = [image for image, hypotheses in enumerate(found) if not hypotheses]
    if without:  # the other rules stood in the way of all beams
        rows = torch.tensor(without, device=state.device)
        free = replace(
            options, min_length=0, no_repeat_ngram=0, no_immediate_repeat=False, repeatable=(), bad_endings=()
        )
        again = beam_search(step, state.select(rows, 1), len(without), vocab_size, max_length, free)
        for image, hypotheses in zip(without, again, strict=True):
            found[image] = hypotheses
    return found


@dataclass(frozen=True)
class EnsembleState:
    """The states of several networks, of the same rows."""

    states: tuple[Any, ...]

    @property
    def device(self) -> torch.device:
        return self.states[0].device

    def select(self, rows: Tensor, per_image: int | None = None) -> "EnsembleState":
        return EnsembleState(tuple(state.select(rows, per_image) for state in self.states))


def ensemble_step(steps: Sequence[Step]) -> Step:
    """One step that averages the probabilities of several networks, for an `EnsembleState` of theirs."""

    def step(tokens: Tensor, state: EnsembleState) -> tuple[Tensor, EnsembleState]:
        results = [one(tokens, own) for one, own in zip(steps, state.states, strict=True)]
        mean = torch.stack([logprobs for logprobs, _ in results]).logsumexp(0) - math.log(len(steps))
        return mean, EnsembleState(tuple(own for _, own in results))

    return step
