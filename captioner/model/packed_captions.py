"""The captions of a batch laid out step by step, so that no network computes a step after a caption's end.

Letters: M captions, D words of the longest, P targets of all captions together.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from captioner.runtime.transfers import upload


@dataclass(frozen=True)
class PackedCaptions:
    """What a language model is fed and shall predict; step 0 feeds START. All tensors are on the CPU.

    The longest captions come first: those still running at step t are the first counts[t] of them, never more than the
    step before. The rows (P,) of all steps lie one step after the other.

    Attributes:
        order: (M,) the captions, longest first.
        counts: rows of each step.
        caption: (P,) the caption of each row.
        tokens: (P,) ids to feed, 1..V+1.
        targets: (P,) ids to predict, 1..V+1; 0 where nothing is asked.
    """

    order: Tensor
    counts: list[int]
    caption: Tensor
    tokens: Tensor
    targets: Tensor

    def with_targets(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Of hidden states (P, H) those that predict something, and which column (id - 1) each shall predict."""
        has_target = self.targets > 0
        if not has_target.all():  # only captions with a 0 amid their words have steps without a target
            hidden = hidden[upload(has_target.nonzero().squeeze(1), hidden.device)]
        return hidden, upload(self.targets[has_target] - 1, hidden.device)


def pack_captions(labels: Tensor, end_id: int) -> PackedCaptions:
    """Arrange labels (M, D), int64 word ids, 0-padded; END = START = `end_id`.

    Words after a 0 are targets too, as in the original's LanguageModelCriterion; the 0 itself is fed as word 1.
    """
    targets = caption_targets(labels, end_id)  # (M, D+1)
    steps = torch.arange(1, targets.shape[1] + 1)
    lengths = torch.where(targets > 0, steps, 0).amax(dim=1)  # steps a caption needs
    order = lengths.argsort(descending=True, stable=True)
    lengths, targets = lengths[order], targets[order]
    counts = (lengths.unsqueeze(0) > torch.arange(int(lengths[0])).unsqueeze(1)).sum(1).tolist()
    inputs = F.pad(labels[order], (1, 0), value=end_id).clamp(min=1)  # (M, D+1): START, then the words
    running = [slice(0, count) for count in counts]
    return PackedCaptions(
        order,
        counts,
        caption=torch.cat([order[rows] for rows in running]),
        tokens=torch.cat([inputs[rows, t] for t, rows in enumerate(running)]),
        targets=torch.cat([targets[rows, t] for t, rows in enumerate(running)]),
    )


def caption_targets(labels: Tensor, end_id: int) -> Tensor:
    """What each step from START on shall predict: (M, D) ids, 0-padded -> (M, D+1), 0 where nothing.

    The words themselves, and END at the first 0 or after a caption of full length.
    """
    targets = F.pad(labels, (0, 1))
    first_null = (targets == 0).to(torch.uint8).argmax(dim=1, keepdim=True)
    return targets.scatter(1, first_null, end_id)
