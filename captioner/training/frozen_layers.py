"""The layers of a CNN that are not trained at present, in half precision.

Autocast keeps the half-precision copies of weights that are trained, but casts those of frozen ones at every batch: all
of VGG16. Here they are cast once. The numbers are the same.
"""

import copy

import torch

from captioner.data.batch import FeatureInputs, PixelInputs
from captioner.model.caption_model import CaptionModel
from captioner.runtime.precision import prepare_for_inference


class FrozenLayers:
    """What comes before the first layer that is trained: pixels → what that layer sees.

    Args:
        model: whose CNN is copied as it is now.
        last_block: whether the last convolution block and all after it are trained; else nothing of the CNN is.
        dtype: of autocast.
    """

    def __init__(self, model: CaptionModel, *, last_block: bool, dtype: torch.dtype) -> None:
        self.last_block = last_block
        self._model = copy.deepcopy(model, {id(model.decoder): model.decoder})  # the decoder is not copied
        self._model.encoder.eval()  # nor made one that is not trained
        for module in self._model.encoder.cnn_modules():
            prepare_for_inference(module, dtype)

    @torch.no_grad()
    def __call__(self, inputs: PixelInputs) -> FeatureInputs:
        see = self._model.last_block_inputs if self.last_block else self._model.cnn_features
        return FeatureInputs(see(inputs.images, inputs.offsets))
