"""The shape of a model."""

import dataclasses
from dataclasses import dataclass

from captioner.errors import InputError
from captioner.model.encoder import VGG16_FC_WIDTH, VGG16_WIDTHS, CnnLayer, Pixels


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
