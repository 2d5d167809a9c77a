"""One batch: what a model sees of some images, and what is known about them.

Letters: N images of a batch, M their captions, D words per caption, F width of a CNN feature.
"""

import math
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class PixelInputs:
    """Images as they are stored, for a model that looks at them itself.

    Attributes:
        images: uint8 (N, 3, 256, 256), RGB.
        offsets: int64 (N, 2), first row and column of each image's crop; None is the centre.
    """

    images: Tensor
    offsets: Tensor | None = None

    def to(self, device: torch.device) -> "PixelInputs":
        offsets = None if self.offsets is None else self.offsets.to(device, non_blocking=True)
        return PixelInputs(self.images.to(device, non_blocking=True), offsets)

    def pin(self) -> "PixelInputs":
        return PixelInputs(self.images.pin_memory(), None if self.offsets is None else self.offsets.pin_memory())

    def __getitem__(self, rows: slice) -> "PixelInputs":
        return PixelInputs(self.images[rows], None if self.offsets is None else self.offsets[rows])


@dataclass(frozen=True)
class FeatureInputs:
    """What the model's CNN made of the images earlier.

    Attributes:
        features: float32 (N, F), or (N, G, C) where the model attends: of `CaptionModel.cnn_features`; or
            (N, 14, 14, C): of `CaptionModel.last_block_inputs`.
    """

    features: Tensor

    def to(self, device: torch.device) -> "FeatureInputs":
        return FeatureInputs(self.features.to(device, non_blocking=True))

    def pin(self) -> "FeatureInputs":
        return FeatureInputs(self.features.pin_memory())

    def __getitem__(self, rows: slice) -> "FeatureInputs":
        return FeatureInputs(self.features[rows])


@dataclass(frozen=True)
class KnownCaptions:
    """Captions of a batch's images, on the CPU, where the decoder arranges them; none by default.

    Attributes:
        labels: int64 (M, D), word ids, 0-padded.
        image_of_caption: int64 (M,), the row of the image that each describes, in rising order.
    """

    labels: Tensor = field(default_factory=lambda: torch.zeros(0, 0, dtype=torch.int64))
    image_of_caption: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.int64))

    def __len__(self) -> int:
        return len(self.labels)

    def pin(self) -> "KnownCaptions":
        return KnownCaptions(self.labels.pin_memory(), self.image_of_caption.pin_memory())

    def of_images(self, start: int, stop: int) -> "KnownCaptions":
        """Those of the images in rows start..stop-1, whose numbers begin with 0."""
        chosen = (self.image_of_caption >= start) & (self.image_of_caption < stop)
        return KnownCaptions(self.labels[chosen], self.image_of_caption[chosen] - start)


@dataclass(frozen=True)
class Batch:
    """Images on their way to a model.

    Attributes:
        info: per image: id, file_path, ... as the source has them.
        positions: of each image within the whole run, from 0.
        skipped: files that could not be read and are not in the batch: name, reason.
    """

    info: list[dict[str, Any]]
    positions: list[int]
    inputs: PixelInputs | FeatureInputs
    captions: KnownCaptions = field(default_factory=KnownCaptions)
    skipped: list[tuple[str, str]] = field(default_factory=list)

    def to(self, device: torch.device) -> "Batch":
        """The same batch with its inputs on `device`; the copy overlaps with computation where memory is pinned."""
        return replace(self, inputs=self.inputs.to(device))

    def pin(self) -> "Batch":
        """The same batch in page-locked memory, so that copies to a GPU need not wait."""
        return replace(self, inputs=self.inputs.pin(), captions=self.captions.pin())

    def split(self, parts: int) -> "list[Batch]":
        """The batch cut into up to `parts` smaller ones with about equally many images each."""
        count = len(self.positions)
        if parts <= 1 or count <= 1:
            return [self]
        size = math.ceil(count / parts)
        return [
            Batch(
                self.info[start : start + size],
                self.positions[start : start + size],
                self.inputs[start : start + size],
                self.captions.of_images(start, start + size),
                self.skipped if start == 0 else [],
            )
            for start in range(0, count, size)
        ]
