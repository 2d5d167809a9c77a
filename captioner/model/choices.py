"""What a model can be chosen to be, for the shape of models, for training's options and for the commands.

cnn_layer   the image feature: both hidden fully connected layers of VGG16, or its last convolution, pooled to 7×7 cells
            or as it is, 14×14 cells
cnn_pixels  the convention that the CNN was trained with: grey levels minus ImageNet's mean, or standardised, by
            ImageNet's figures or by those of the training pictures themselves
decoder     the original's language model, which sees the image once, or one that looks at it for every word
"""

from typing import Literal, get_args

CnnLayer = Literal["fc7", "pool5", "conv5_3"]
Pixels = Literal["caffe", "torchvision", "data"]
DecoderKind = Literal["lstm", "attention"]

CNN_LAYERS: tuple[CnnLayer, ...] = get_args(CnnLayer)
GRIDS: dict[CnnLayer, int] = {"pool5": 7, "conv5_3": 14}  # cells in a row, for a language model that looks at them
PIXELS: tuple[Pixels, ...] = get_args(Pixels)
DECODERS: tuple[DecoderKind, ...] = get_args(DecoderKind)

# Output channels of its 13 convolutions, and the width of its two hidden fully connected layers.
VGG16_WIDTHS = (64, 64, 128, 128, 256, 256, 256, 512, 512, 512, 512, 512, 512)
VGG16_FC_WIDTH = 4096
