"""The shape of a model."""

import dataclasses
from dataclasses import dataclass

from captioner.data.image_mode import IMAGE_MODES, ImageMode
from captioner.errors import InputError
from captioner.model.choices import (
    CNN_LAYERS,
    DECODERS,
    GRIDS,
    PIXELS,
    VGG16_FC_WIDTH,
    VGG16_WIDTHS,
    CnnLayer,
    DecoderKind,
    Pixels,
)

CHOICES = {
    "cnn_layer": CNN_LAYERS,
    "cnn_pixels": PIXELS,
    "image_mode": IMAGE_MODES,
    "decoder": DECODERS,
}
# Fields that version 1 of the checkpoint format did not have; its models have their default values.
OF_ATTENTION = ("decoder", "attention_heads", "drop_prob_words", "drop_prob_features")

OF_PIXELS = ("pixel_mean", "pixel_std")


@dataclass(frozen=True)
class ModelConfig:
    """Everything needed to rebuild a model; saved with its weights.

    `image_mode` says what becomes of pictures that are no squares. `attention_heads` and the two dropouts after it, of
    the embedded words and of the grid, are the attending decoder's; `drop_prob_lm` is the dropout before the output
    layer of either decoder. `pixel_mean` and `pixel_std`, of red, green and blue in grey levels, belong to the pixels
    "data".
    """

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
    image_mode: ImageMode = "squash"
    decoder: DecoderKind = "lstm"
    attention_heads: int = 8
    drop_prob_words: float = 0.3
    drop_prob_features: float = 0.2
    pixel_mean: tuple[float, ...] | None = None
    pixel_std: tuple[float, ...] | None = None

    @property
    def format_version(self) -> int:
        """The first version of the checkpoint format whose readers know this model."""
        plain = self.decoder == "lstm" and self.image_mode == "squash" and self.cnn_pixels != "data"
        return 1 if plain else 2

    def to_dict(self) -> dict:
        """Plain types only, for the checkpoint; without what only other decoders have, for older readers' sake."""
        values = {**dataclasses.asdict(self), "conv_widths": list(self.conv_widths)}
        if self.image_mode == "squash":
            del values["image_mode"]  # what files without it mean, those of older versions too
        for name in OF_PIXELS:
            values[name] = list(values[name] or ())
            if self.cnn_pixels != "data":
                del values[name]
        return {name: value for name, value in values.items() if self.decoder != "lstm" or name not in OF_ATTENTION}

    @classmethod
    def from_dict(cls, values: dict, source: str) -> "ModelConfig":
        """Rebuild from `to_dict`'s result read from the file `source`.

        Raises:
            InputError: a field is missing, unknown or of the wrong kind.
        """
        values = {"image_mode": "squash", **dict.fromkeys(OF_PIXELS), **values}
        fields = {field.name: field for field in dataclasses.fields(cls)}
        if "decoder" not in values:
            values = {**{name: fields[name].default for name in OF_ATTENTION}, **values}
        unknown, missing = sorted(map(str, values.keys() - fields.keys())), sorted(fields.keys() - values.keys())
        if unknown or missing:
            problem = f"unknown {unknown}" if unknown else f"missing {missing}"
            raise InputError(f"{source}: its model config has {problem}", remedy="was it written by another version?")
        for name, choices in CHOICES.items():
            if values[name] not in choices:
                raise InputError(f"{source}: {name} is {values[name]!r}", expected=" or ".join(choices))
        for name in (
            "vocab_size",
            "max_length",
            "encoding_size",
            "rnn_size",
            "num_layers",
            "fc_width",
            "attention_heads",
        ):
            if type(values[name]) is not int or values[name] < 1:
                raise InputError(f"{source}: {name} is {values[name]!r}", expected="a positive whole number")
        widths = values["conv_widths"]
        if (
            not isinstance(widths, list)
            or len(widths) != len(VGG16_WIDTHS)
            or any(type(w) is not int or w < 1 for w in widths)
        ):
            raise InputError(
                f"{source}: conv_widths is {widths!r}", expected=f"{len(VGG16_WIDTHS)} positive whole numbers"
            )
        triples = {name: tuple(values[name]) for name in OF_PIXELS if isinstance(values[name], list)}
        config = cls(**{**values, **triples, "conv_widths": tuple(widths)})
        config.require_sound(f"{source}: ")
        return config

    def require_sound(self, where: str = "") -> None:
        """Refuse what no model can be.

        Raises:
            InputError: two fields contradict each other, or a probability is none; the message begins with `where`.
        """
        for name in ("drop_prob_lm", "drop_prob_words", "drop_prob_features"):
            value = getattr(self, name)
            if not isinstance(value, int | float) or not 0 <= value < 1:
                raise InputError(f"{where}{name} is {value!r}", expected="at least 0 and below 1")
        for name in OF_PIXELS:
            value, needed = getattr(self, name), self.cnn_pixels == "data"
            if (value is not None) is not needed or (needed and not _are_grey_levels(value, name == "pixel_std")):
                expected = "three numbers up to 255" if needed else f"none for pixels {self.cnn_pixels}"
                raise InputError(f"{where}{name} is {value!r}", expected=expected)
        if self.decoder == "lstm":
            if self.cnn_layer == "conv5_3":
                raise InputError(
                    f"{where}decoder lstm sees one vector, conv5_3 is a grid of 14×14",
                    remedy="choose --cnn_layer pool5, the mean of such a grid, or --decoder attention",
                )
            return
        if self.cnn_layer not in GRIDS:
            raise InputError(
                f"{where}decoder attention looks at a grid, not at {self.cnn_layer}",
                remedy="choose --cnn_layer pool5 or conv5_3",
            )
        if self.num_layers != 1:
            raise InputError(f"{where}decoder attention has two LSTMs of one layer", remedy="leave --num_layers at 1")
        if self.rnn_size % self.attention_heads:
            raise InputError(
                f"{where}rnn_size {self.rnn_size} is no multiple of the {self.attention_heads} attention heads"
            )


def _are_grey_levels(value: object, positive: bool) -> bool:
    if not isinstance(value, tuple) or len(value) != 3 or any(type(number) not in (int, float) for number in value):
        return False
    return all(0 <= number <= 255 and (number > 0 or not positive) for number in value)
