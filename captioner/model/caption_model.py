"""The whole model: its shape, and encoder and decoder under one roof."""

import dataclasses
from dataclasses import dataclass

from torch import Tensor, nn

from captioner.data.images import crop
from captioner.errors import InputError
from captioner.model.decoder import Decoder
from captioner.model.encoder import (
    CONVS_BEFORE_POOL,
    VGG16_FC_WIDTH,
    VGG16_WIDTHS,
    CnnLayer,
    Encoder,
    Pixels,
    normalise,
)


@dataclass(frozen=True)
class ModelConfig:
    """Everything needed to rebuild a model; saved with its weights."""

    vocab_size: int
    max_length: int = 16
    encoding_size: int = 512
    rnn_size: int = 512
    num_layers: int = 1
    drop_prob_lm: float = 0.5
    cnn_layer: CnnLayer = "fc7"
    cnn_pixels: Pixels = "caffe"
    conv_widths: tuple[int, ...] = VGG16_WIDTHS
    fc_width: int = VGG16_FC_WIDTH

    def to_dict(self) -> dict:
        """Plain types only, for the checkpoint."""
        return {**dataclasses.asdict(self), "conv_widths": list(self.conv_widths)}

    @classmethod
    def from_dict(cls, values: dict, source: str) -> "ModelConfig":
        """Rebuild from `to_dict`'s result read from the file `source`.

        Raises:
            InputError: a field is missing, unknown or of the wrong kind.
        """
        fields = {field.name: field for field in dataclasses.fields(cls)}
        unknown, missing = sorted(values.keys() - fields.keys()), sorted(fields.keys() - values.keys())
        if unknown or missing:
            problem = f"unknown {unknown}" if unknown else f"missing {missing}"
            raise InputError(f"{source}: its model config has {problem}", remedy="was it written by another version?")
        for name, choices in (("cnn_layer", ("fc7", "pool5")), ("cnn_pixels", ("caffe", "torchvision"))):
            if values[name] not in choices:
                raise InputError(f"{source}: {name} is {values[name]!r}", expected=" or ".join(choices))
        for name in ("vocab_size", "max_length", "encoding_size", "rnn_size", "num_layers", "fc_width"):
            if not isinstance(values[name], int) or values[name] < 1:
                raise InputError(f"{source}: {name} is {values[name]!r}", expected="a positive whole number")
        widths = values["conv_widths"]
        if not isinstance(widths, list) or len(widths) != len(VGG16_WIDTHS) or any(type(w) is not int for w in widths):
            raise InputError(f"{source}: conv_widths is {widths!r}", expected=f"{len(VGG16_WIDTHS)} whole numbers")
        return cls(**{**values, "conv_widths": tuple(widths)})


class CaptionModel(nn.Module):
    """Encoder and decoder built from a `ModelConfig`; `state_dict` keys are `encoder.*` and `decoder.*`."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = Encoder(config.cnn_layer, config.conv_widths, config.fc_width, config.encoding_size)
        self.decoder = Decoder(
            config.vocab_size, config.encoding_size, config.rnn_size, config.num_layers, config.drop_prob_lm
        )

    def cnn_features(self, images: Tensor, offsets: Tensor | None = None) -> Tensor:
        """Pixels to CNN feature on whatever device the images are.

        Args:
            images: uint8 (N, 3, 256, 256) RGB.
            offsets: int64 (N, 2), first row and column of each crop; None is the centre.

        Returns:
            (N, F) in the CNN's dtype.
        """
        pixels = normalise(crop(images, offsets), self.config.cnn_pixels)
        return self.encoder.cnn(pixels.to(self.encoder.input_dtype))

    def language_model_parameters(self) -> list[nn.Parameter]:
        """What captions train from the first iteration: the decoder and the encoder's projection."""
        return [*self.decoder.parameters(), *self.encoder.embed.parameters()]

    def cnn_parameters(self, from_block: int = 1) -> list[nn.Parameter]:
        """The ImageNet weights from a convolution block (1-5) on, trained only when fine-tuning."""
        first = sum(2 * convs + 1 for convs in CONVS_BEFORE_POOL[: from_block - 1])  # conv + ReLU each, then a pool
        modules = [self.encoder.features[first:], *self.encoder.cnn_modules()[1:]]
        return [p for module in modules for p in module.parameters()]
