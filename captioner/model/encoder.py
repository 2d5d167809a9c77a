"""VGG16 as an image encoder (Simonyan & Zisserman 2014; original: misc/net_utils.lua).

Letters: N images, C channels, F width of the CNN feature (fc7: 4096, pool5: 512), S cells in a row of the last grid (7,
or 14 without the last pooling), G of all (S²), E encoding size.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from captioner.model.choices import GRIDS, VGG16_FC_WIDTH, VGG16_WIDTHS, CnnLayer, Pixels

CONVS_BEFORE_POOL = (2, 2, 3, 3, 3)  # the five blocks of VGG16
LAST_BLOCK = sum(2 * convs + 1 for convs in CONVS_BEFORE_POOL[:-1])  # where it begins: conv + ReLU each, then a pool
LAST_GRID = GRIDS["pool5"]  # 224 pixels halved five times
LARGEST_ROOT = 4.0  # what the scales of a grid bring the roots of its channels' largest activations to, about
GRID_SCALE = 0.36  # does so on average, where no photos have been seen yet
NEXT_TO_NOTHING = 1e-4  # activations of pool5 go up to about 100
# torchvision counts convolutions, ReLUs and poolings alike.
CONV_NAMES = tuple(f"features.{index}" for index in (0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28))
FC_NAMES = ("classifier.0", "classifier.3")

# Caffe's convention: grey levels 0..255 minus the mean of ImageNet, RGB order here.
CAFFE_MEAN = (123.68, 116.779, 103.939)
# torchvision's convention: scaled to 0..1, then standardised.
TORCHVISION_MEAN = (0.485, 0.456, 0.406)
TORCHVISION_STD = (0.229, 0.224, 0.225)


class Normalise(nn.Module):
    """Bring grey levels to what the weights were trained with.

    Args:
        pixels: "caffe" (0-255 minus the mean), "torchvision" (0-1, standardised) or "data" (standardised by what
            follows).
        mean, std: of red, green and blue in grey levels 0-255; for "data".
    """

    mean: Tensor
    std: Tensor | None

    def __init__(self, pixels: Pixels, mean: Sequence[float] | None = None, std: Sequence[float] | None = None) -> None:
        super().__init__()

        # Buffers, which lie on the model's device: constants made anew for each batch would be uploads. Not in files:
        # the config says which they are. On the CPU even where a model without values is made ("meta").
        def constant(name: str, values: Tensor | None) -> None:
            self.register_buffer(name, None if values is None else values.view(3, 1, 1), persistent=False)

        if pixels == "caffe":
            constant("mean", torch.tensor(CAFFE_MEAN, device="cpu"))
            constant("std", None)
        elif pixels == "data":
            assert mean and std
            constant("mean", torch.tensor(mean, dtype=torch.float32, device="cpu"))
            constant("std", torch.tensor(std, dtype=torch.float32, device="cpu"))
        else:
            constant("mean", 255 * torch.tensor(TORCHVISION_MEAN, device="cpu"))
            constant("std", 255 * torch.tensor(TORCHVISION_STD, device="cpu"))

    def limits(self) -> tuple[float, float]:
        """The least and the greatest value of all channels."""
        black_and_white = torch.tensor([0, 255], dtype=torch.uint8, device=self.mean.device).view(2, 1, 1, 1)
        values = self(black_and_white.expand(2, 3, 1, 1))
        return float(values.min()), float(values.max())

    def forward(self, images: Tensor) -> Tensor:
        """uint8 (N, 3, 224, 224), RGB → float32 (N, 3, 224, 224)."""
        values = images.float() - self.mean
        return values if self.std is None else values / self.std


class Encoder(nn.Module):
    """Image → feature: the 13 convolutions of VGG16, a head, and a projection to the encoding.

    Parameters carry torchvision's names (`features.0.weight`, ..., `classifier.3.bias`), so that its files load as they
    are; `embed` is the captioner's own projection.

    Args:
        cnn_layer: "fc7" (both hidden fully connected layers), "pool5" (the last convolution's 7×7 grid, or the mean
            over it: a tenth of the weights) or "conv5_3" (its 14×14 grid before the last pooling).
        conv_widths: output channels of the 13 convolutions; narrow ones make tests fast.
        fc_width: width of fc6 and fc7; unused by other layers.
        encoding_size: E.
        grid_drop_prob: None: the feature of an image is one vector. Else it is the whole grid, for a language model
            that attends to its cells, and this is the dropout of what comes into their projection.
    """

    embed: "nn.Linear | GridEmbedding"
    feature_shape: tuple[int, ...]
    last_block_shape: tuple[int, ...]

    def __init__(
        self,
        cnn_layer: CnnLayer = "fc7",
        conv_widths: Sequence[int] = VGG16_WIDTHS,
        fc_width: int = VGG16_FC_WIDTH,
        encoding_size: int = 512,
        grid_drop_prob: float | None = None,
    ) -> None:
        super().__init__()
        assert len(conv_widths) == sum(CONVS_BEFORE_POOL)
        assert grid_drop_prob is None or cnn_layer in GRIDS
        self.cnn_layer = cnn_layer
        layers = _convolutions(conv_widths)
        self.features = nn.Sequential(*(layers[:-1] if cnn_layer == "conv5_3" else layers))
        if cnn_layer == "fc7":
            self.classifier = nn.Sequential(
                nn.Linear(conv_widths[-1] * LAST_GRID**2, fc_width),
                nn.ReLU(inplace=True),
                nn.Dropout(0.5),
                nn.Linear(fc_width, fc_width),
                nn.ReLU(inplace=True),
            )
        width = fc_width if cnn_layer == "fc7" else conv_widths[-1]
        cells = GRIDS.get(cnn_layer, 0) ** 2
        self.feature_shape = (width,) if grid_drop_prob is None else (cells, width)
        self.last_block_shape = (2 * LAST_GRID, 2 * LAST_GRID, conv_widths[-CONVS_BEFORE_POOL[-1] - 1])
        # VGG's dropout after fc7 belongs to the projection: cached features come before it.
        self.dropout = nn.Dropout(0.5 if cnn_layer == "fc7" else 0.0)
        if grid_drop_prob is None:
            self.embed = nn.Linear(width, encoding_size)
        else:
            self.embed = GridEmbedding(cells, width, encoding_size, grid_drop_prob)

    def cnn(self, images: Tensor) -> Tensor:
        """float (N, 3, 224, 224), normalised → CNN feature (N, F), or (N, G, C): what a frozen CNN computes once."""
        return self.head(self.features(images))

    def before_last_block(self, images: Tensor) -> Tensor:
        """float (N, 3, 224, 224), normalised → (N, 14, 14, C), not negative: what the last convolution block sees."""
        return self.features[:LAST_BLOCK](images).permute(0, 2, 3, 1)

    def last_block(self, inputs: Tensor) -> Tensor:
        """The rest of `cnn`: (N, 14, 14, C), of any floating-point type → (N, F), or (N, G, C)."""
        return self.head(self.features[LAST_BLOCK:](inputs.permute(0, 3, 1, 2).to(self.input_dtype)))

    def head(self, grid: Tensor) -> Tensor:
        """The last convolution block's output (N, C, S, S) → CNN feature (N, F), or (N, G, C)."""
        if isinstance(self.embed, GridEmbedding):
            return grid.flatten(2).transpose(1, 2)
        if self.cnn_layer != "fc7":
            return grid.mean(dim=(2, 3))
        return self.classifier(grid.flatten(1).to(next(self.classifier.parameters()).dtype))

    @property
    def input_dtype(self) -> torch.dtype:
        """What `cnn` wants its images in: the type of the convolutions' weights, float32 where they are 8-bit."""
        return next((weight.dtype for weight in self.features.parameters()), torch.float32)

    def project(self, features: Tensor) -> Tensor:
        """CNN feature, of any floating-point type → what the language model sees: (N, F) → (N, E); grids (N, G, C) →
        (N, G, E)."""
        if isinstance(self.embed, GridEmbedding):
            return self.embed(features)
        return torch.relu(self.embed(self.dropout(features.to(self.embed.weight.dtype))))

    def cnn_modules(self) -> list[nn.Module]:
        """The layers whose weights come from ImageNet, as opposed to `embed`, which captions alone train."""
        return [self.features, self.classifier] if self.cnn_layer == "fc7" else [self.features]


class GridEmbedding(nn.Module):
    """A photo's grid, brought to the language model's width; each cell learns its place.

    Args:
        cells: G.
        channels: C.
        encoding_size: E.
        drop_prob: dropout of the channels of each cell, in training mode only.
    """

    scale: Tensor

    def __init__(self, cells: int, channels: int, encoding_size: int, drop_prob: float = 0.2) -> None:
        super().__init__()
        self.register_buffer("scale", torch.full((channels,), GRID_SCALE))
        self.position = nn.Parameter(torch.empty(cells, encoding_size))
        self.project = nn.Linear(channels, encoding_size)
        self.norm = nn.LayerNorm(encoding_size)
        self.dropout = nn.Dropout(drop_prob)
        if not self.position.is_meta:
            nn.init.normal_(self.position, std=0.02)

    @torch.no_grad()
    def fit_scale(self, grids: Tensor) -> None:
        """Bring all channels to about the same range, by the largest activations in grids (N, G, C) of some photos."""
        largest = grids.to(self.scale).amax(dim=(0, 1))
        # A little more than what these photos show; a channel that they do not show is not blown up.
        self.scale.copy_((LARGEST_ROOT / (1.2 * largest).sqrt()).clamp(max=4 * GRID_SCALE))

    def forward(self, grids: Tensor) -> Tensor:
        """(N, G, C), not negative, of any floating-point type → (N, G, E)."""
        # The square root brings the few large activations nearer to the many small ones. It is steepest at 0: what
        # is next to nothing counts as nothing, so that fine-tuning has finite gradients.
        roots = F.threshold(grids.to(self.scale.dtype), NEXT_TO_NOTHING, 0.0).sqrt()
        return self.norm(self.project(self.dropout(roots * self.scale)) + self.position)

    def coarser(self) -> "GridEmbedding":
        """The same weights for grids of `coarser_grid`: the place of a cell is the mean of those of its four."""
        cells, width = self.position.shape
        embedding = GridEmbedding(cells // 4, self.project.in_features, width, self.dropout.p)
        embedding.scale, embedding.project, embedding.norm = self.scale, self.project, self.norm
        embedding.position = nn.Parameter(_means_of_four(self.position.detach()[None])[0])
        return embedding.train(self.training)


def coarser_grid(grids: Tensor) -> Tensor:
    """A cell for every 2×2: (N, G, C), not negative → (N, G/4, C); means of the roots, which are what counts."""
    return _means_of_four(grids.float().sqrt()).square()


def _means_of_four(grids: Tensor) -> Tensor:
    side = math.isqrt(grids.shape[1])
    return F.avg_pool2d(grids.transpose(1, 2).unflatten(2, (side, side)), 2).flatten(2).transpose(1, 2)


def _convolutions(widths: Sequence[int]) -> list[nn.Module]:
    layers: list[nn.Module] = []
    channels, remaining = 3, list(widths)
    for count in CONVS_BEFORE_POOL:
        for _ in range(count):
            width = remaining.pop(0)
            layers += [nn.Conv2d(channels, width, kernel_size=3, padding=1), nn.ReLU(inplace=True)]
            channels = width
        layers.append(nn.MaxPool2d(2, 2))
    return layers
