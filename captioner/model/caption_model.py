"""The whole model, as training, validation, captioning and the tests call it: pixels → encodings → loss.

Letters: N images, M captions, D words of the longest, F width of the CNN feature, E encoding.
"""

from typing import Protocol

import torch
from torch import Tensor, nn

from captioner.data.batch import FeatureInputs, KnownCaptions, PixelInputs
from captioner.data.crops import crop
from captioner.errors import InputError
from captioner.kernels import output_loss
from captioner.model.accuracy import hits
from captioner.model.attention_decoder import AttentionDecoder
from captioner.model.config import ModelConfig
from captioner.model.decoder import Decoder
from captioner.model.encoder import CONVS_BEFORE_POOL, Encoder, Normalise


class CaptionModel(nn.Module):
    """Encoder and decoder built from a `ModelConfig`; `state_dict` keys are `encoder.*` and `decoder.*`."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.normalise = Normalise(config.cnn_pixels, config.pixel_mean, config.pixel_std)
        attends = config.decoder == "attention"
        self.encoder = Encoder(
            config.cnn_layer,
            config.conv_widths,
            config.fc_width,
            config.encoding_size,
            grid_drop_prob=config.drop_prob_features if attends else None,
        )
        self.decoder = make_decoder(config)

    def forward(
        self, inputs: PixelInputs | FeatureInputs, captions: KnownCaptions, label_smoothing: float = 0.0
    ) -> tuple[Tensor, int]:
        """The loss of captions given their images; arguments as `encode` and `loss_sum`, result as `loss_sum`."""
        return self.loss_sum(self.encode(inputs), captions.image_of_caption, captions.labels, label_smoothing)

    def encode(self, inputs: PixelInputs | FeatureInputs) -> Tensor:
        """What the decoder sees of N images, given as pixels or as what the CNN, or most of it, made of them earlier.

        Returns:
            (N, E), in the type of the projection's weights: float32 even where the CNN computes in another.
        """
        if isinstance(inputs, FeatureInputs):
            return self.encode_features(inputs.features)
        return self.encode_features(self.cnn_features(inputs.images, inputs.offsets))

    def encode_features(self, features: Tensor) -> Tensor:
        """Encodings (N, E) of what `cnn_features` or `last_block_inputs` gave, of any floating-point type."""
        if features.ndim == 4:
            features = self.encoder.last_block(features)
        return self.encoder.project(features)

    def loss_sum(
        self, encodings: Tensor, image_of_caption: Tensor, labels: Tensor, label_smoothing: float = 0.0
    ) -> tuple[Tensor, int]:
        """−log p (natural) of captions given their images, summed over words and ENDs.

        Args:
            encodings: of `encode`, one row per image; images may have any number of captions.
            image_of_caption: int64 (M,), the row of `encodings` that each caption describes; best on the CPU.
            labels: int64 (M, D) word ids, 0-padded; best on the CPU. Words after a 0 are targets too, as in the
                original's LanguageModelCriterion; the first 0 is the END target, further ones are none.
            label_smoothing: part of each target's probability that is spread over all words and END; in training.

        Returns:
            The sum as a scalar, float32 or wider, and the number of targets it is over.
        """
        output = self.decoder.output_of(encodings, image_of_caption, labels)
        return output_loss(*output, label_smoothing), len(output[-1])

    def loss_and_hits(self, encodings: Tensor, image_of_caption: Tensor, labels: Tensor) -> tuple[Tensor, int, Tensor]:
        """As `loss_sum`, and int64 (2,): how many targets were the likeliest word, and among the five likeliest."""
        output = self.decoder.output_of(encodings, image_of_caption, labels)
        return output_loss(*output), len(output[-1]), hits(*output)

    def cnn_features(self, images: Tensor, offsets: Tensor | None = None) -> Tensor:
        """Pixels to CNN feature: what a CNN that is not trained need compute only once per image and crop.

        Args:
            images: uint8 (N, 3, 256, 256) RGB.
            offsets: int64 (N, 2), first row and column of each crop; None is the centre.

        Returns:
            (N, F) in the CNN's dtype.
        """
        return self.encoder.cnn(self.pixels(images, offsets))

    def last_block(self, images: Tensor, offsets: Tensor | None = None) -> Tensor:
        """The last convolution block's output, of which `encoder.head` makes the CNN feature.

        Args:
            images: as for `cnn_features`.

        Returns:
            (N, C, S, S) in the CNN's dtype.
        """
        return self.encoder.features(self.pixels(images, offsets))

    def pixels(self, images: Tensor, offsets: Tensor | None = None) -> Tensor:
        """What the CNN sees of pictures.

        Args:
            images, offsets: as for `cnn_features`.

        Returns:
            (N, 3, 224, 224), normalised, in the CNN's dtype.
        """
        return self.normalise(crop(images, offsets)).to(self.encoder.input_dtype)

    def last_block_inputs(self, images: Tensor, offsets: Tensor | None = None) -> Tensor:
        """Pixels to what the last convolution block sees: what is computed only once if no more than it is trained.

        Args:
            images, offsets: as for `cnn_features`.

        Returns:
            (N, 14, 14, C) in the CNN's dtype.
        """
        return self.encoder.before_last_block(self.pixels(images, offsets))

    def language_model_parameters(self) -> list[nn.Parameter]:
        """What captions train from the first iteration: the decoder and the encoder's projection."""
        return [*self.decoder.parameters(), *self.encoder.embed.parameters()]

    def cnn_parameters(self, from_block: int = 1) -> list[nn.Parameter]:
        """The ImageNet weights from a convolution block (1-5) on, trained only when fine-tuning."""
        first = sum(2 * convs + 1 for convs in CONVS_BEFORE_POOL[: from_block - 1])  # conv + ReLU each, then a pool
        modules = [self.encoder.features[first:], *self.encoder.cnn_modules()[1:]]
        return [p for module in modules for p in module.parameters()]


def make_decoder(config: ModelConfig) -> Decoder | AttentionDecoder:
    """A new language model of that shape."""
    sizes = (config.vocab_size, config.encoding_size, config.rnn_size)
    if config.decoder == "attention":
        return AttentionDecoder(*sizes, config.attention_heads, config.drop_prob_lm, config.drop_prob_words)
    return Decoder(*sizes, config.num_layers, config.drop_prob_lm)


class Weights(Protocol):
    """What a model is rebuilt from: a `Checkpoint`, which stands beside this file, not below it."""

    config: ModelConfig
    state_dict: dict[str, Tensor]


def build_model(checkpoint: Weights, source: str = "checkpoint") -> CaptionModel:
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
