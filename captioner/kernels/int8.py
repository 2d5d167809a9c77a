"""VGG16's convolutions in 8-bit integers on a CPU: twice as fast as bfloat16, four to five times as float32.

Pictures and activations are unsigned with one scale per layer, weights signed with one per output channel, sums have
32 bits, as in Jacob et al. 2018. oneDNN does the arithmetic, through the operators that torch's own quantisation
compiles to. The scale of a layer's activations is how large they get on some photos (`measure_ranges`).
"""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

LEVELS = 255  # of an unsigned byte
WEIGHT_LEVELS = 127
TINY = 1e-12  # keeps scales of what is always 0 above 0
GEOMETRY = ([1, 1], [1, 1], [1, 1], 1)  # of all of VGG16's convolutions: stride, padding, dilation, groups

# Of the photos' largest activations: the very largest would spend levels on rarities, the mean clips too many photos.
QUANTILE = 0.95


@torch.inference_mode()
def measure_ranges(features: nn.Sequential, batches: Iterable[Tensor]) -> list[float]:
    """How large the activations after each convolution but the last get: the largest of a photo, in nearly all photos.

    Args:
        features: the convolutions with their ReLUs and poolings, of any floating-point type.
        batches: float (N, 3, 224, 224), normalised.

    Returns:
        One value per convolution but the last, whose output stays float32.
    """
    relus = [layer for layer in features if isinstance(layer, nn.ReLU)][:-1]
    largest: list[list[Tensor]] = [[] for _ in relus]  # of each photo

    def watch(relu: nn.ReLU, found: list[Tensor]) -> RemovableHandle:
        return relu.register_forward_hook(lambda _module, _inputs, output: found.append(output.amax(dim=(1, 2, 3))))

    handles = [watch(relu, found) for relu, found in zip(relus, largest, strict=True)]
    try:
        for images in batches:
            features(images)
    finally:
        for handle in handles:
            handle.remove()
    return [float(torch.cat(found).float().quantile(QUANTILE)) for found in largest]


class Int8Convolutions(nn.Sequential):
    """The convolutions of an encoder with their ReLUs and poolings, in 8-bit integers; for inference.

    float32 (N, 3, 224, 224), normalised → float32 (N, C, 7, 7), or (N, C, 14, 14) without the last pooling.

    Args:
        features: the float ones, which stay as they are.
        limits: the least and the greatest value of an input, below and above 0.
        ranges: of `measure_ranges`.
    """

    def __init__(self, features: nn.Sequential, limits: tuple[float, float], ranges: Sequence[float]) -> None:
        low, high = limits
        scale, zero = (high - low) / LEVELS, round(-low * LEVELS / (high - low))
        layers: list[nn.Module] = [_Quantise(scale, zero)]
        remaining = iter(ranges)
        for layer in features:
            if isinstance(layer, nn.Conv2d):
                largest = next(remaining, None)
                output_scale = None if largest is None else max(largest, TINY) / LEVELS
                layers.append(_Convolution(layer, scale, zero, output_scale))
                scale, zero = output_scale or 1.0, 0
            elif isinstance(layer, nn.MaxPool2d):
                layers.append(_Pool())
        super().__init__(*layers)


class _Quantise(nn.Module):
    """float32 → uint8 levels, of which `zero` stands for 0."""

    def __init__(self, scale: float, zero: int) -> None:
        super().__init__()
        self.scale, self.zero = scale, zero

    def forward(self, values: Tensor) -> Tensor:
        levels = (values / self.scale).round_().add_(self.zero).clamp_(0, LEVELS)
        return levels.to(torch.uint8).contiguous(memory_format=torch.channels_last)


class _Convolution(nn.Module):
    """One 3×3 convolution with its ReLU: uint8 → uint8, or → float32 (`output_scale` None)."""

    def __init__(self, layer: nn.Conv2d, scale: float, zero: int, output_scale: float | None) -> None:
        super().__init__()
        weight = layer.weight.detach().float()
        assert layer.bias is not None
        self.bias = layer.bias.detach().float()
        self.weight_scale = weight.abs().amax(dim=(1, 2, 3)).clamp(min=TINY) / WEIGHT_LEVELS
        self.weight_zero = torch.zeros(len(weight), dtype=torch.int32)
        self.scale, self.zero, self.output_scale = scale, zero, output_scale
        levels = (weight / self.weight_scale.view(-1, 1, 1, 1)).round().to(torch.int8)
        self.packed = torch.ops.onednn.qconv_prepack(levels, self.weight_scale, scale, zero, *GEOMETRY)

    def forward(self, values: Tensor) -> Tensor:
        output_type = torch.float32 if self.output_scale is None else torch.uint8
        weight = (self.packed, self.weight_scale, self.weight_zero, self.bias)
        output = (self.output_scale or 1.0, 0, output_type)
        return torch.ops.onednn.qconv2d_pointwise(
            values, self.scale, self.zero, *weight, *GEOMETRY, *output, "relu", [], ""
        )


class _Pool(nn.Module):
    """2×2 maximum; torch's own has no unsigned bytes."""

    def forward(self, values: Tensor) -> Tensor:
        rows = torch.maximum(values[:, :, ::2], values[:, :, 1::2])
        return torch.maximum(rows[..., ::2], rows[..., 1::2]).contiguous(memory_format=torch.channels_last)
