"""The whole model: encoder and decoder under one roof."""

import torch
from torch import Tensor, nn

from captioner.data.images import crop
from captioner.errors import InputError
from captioner.model.checkpoint import Checkpoint
from captioner.model.config import ModelConfig
from captioner.model.decoder import Decoder
from captioner.model.encoder import (
    CONVS_BEFORE_POOL,
    Encoder,
    normalise,
)


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


def build_model(checkpoint: Checkpoint, source: str = "checkpoint") -> CaptionModel:
    """The checkpoint's model on the CPU in float32, in evaluation mode.

    Raises:
        InputError: weights are missing, unknown or of the wrong shape.
    """
    with torch.device("meta"):  # no time spent on initial values that are replaced at once
        model = CaptionModel(checkpoint.config)
    expected = model.state_dict()
    for name in sorted(expected.keys() | checkpoint.state_dict.keys()):
        if name not in checkpoint.state_dict:
            raise InputError(f"{source}: the weights {name} are missing")
        if name not in expected:
            raise InputError(f"{source}: the weights {name} do not belong to this model")
        found, wanted = tuple(checkpoint.state_dict[name].shape), tuple(expected[name].shape)
        if found != wanted:
            raise InputError(f"{source}: {name} has shape {found}", expected=str(wanted))
    # assign=True takes the tensors themselves; the clone keeps the checkpoint's own from being trained.
    model.load_state_dict({name: tensor.clone() for name, tensor in checkpoint.state_dict.items()}, assign=True)
    model.requires_grad_(True)
    return model.eval()
