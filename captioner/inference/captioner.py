"""One model, or several, ready to compute on a device."""

import copy
import threading
from collections.abc import Sequence

import torch
from torch import Tensor

from captioner.data.batch import Batch, PixelInputs
from captioner.data.vocabulary import Vocab
from captioner.inference.lookahead import Seen
from captioner.kernels import Int8Convolutions, arithmetic, can_pack, prove_for_search
from captioner.model.caption_model import CaptionModel
from captioner.runtime.pieces import Pieces
from captioner.runtime.precision import keep_float32, prepare_for_inference


class Captioner:
    """One model, or several that average their probabilities, ready to encode images and to say words, on a device.

    Threads may share it if they compute by turns, which costs nothing, for one batch occupies the device anyway.

    Args:
        models: with the same vocabulary and maximal length.
        vocab: theirs.
        dtype: number format of the CNN and of the search's products; sums and probabilities are float32. Other than
            float32 converts the CNN in place. The loss of given captions is computed in the decoder's own format.

    Attributes:
        pieces: that batches pass through in, where the memory has been too small for whole ones.
        arithmetic: what it computes with, for people: see `kernels.arithmetic`.
    """

    def __init__(self, models: Sequence[CaptionModel], vocab: Vocab, device: torch.device, dtype: torch.dtype) -> None:
        self.models, self.vocab, self.device = list(models), vocab, device
        self.turn = threading.RLock()  # held by the thread that computes
        self.pieces = Pieces(remedy="free the GPU from other programs, or use the CPU with --gpuid -1")
        self.max_length = min(model.config.max_length for model in models)
        for model in self.models:
            model.to(device).eval()
            for module in model.encoder.cnn_modules():
                prepare_for_inference(module, dtype)
        self.decoders = [model.decoder for model in self.models]
        if dtype != torch.float32:
            self.decoders = [copy.deepcopy(decoder).to(dtype) for decoder in self.decoders]
        if dtype == torch.bfloat16 and can_pack(device):
            for decoder in self.decoders:
                decoder.pack()
        keep_float32(dtype)
        prove_for_search(device)
        int8 = any(isinstance(model.encoder.features, Int8Convolutions) for model in self.models)
        self.arithmetic = arithmetic(dtype, device, int8=int8)

    def encode(self, batch: Batch) -> list[Tensor]:
        """What each model's decoder sees of the images, one row per image."""
        return [model.encode(batch.inputs) for model in self.models]

    def see(self, batch: Batch, with_grid: bool) -> Seen:
        """What all models see of a batch, wherever it lies; with the grid only of pixels."""
        moved = batch.to(self.device)
        if not with_grid:
            return Seen(self.encode(moved))
        assert isinstance(moved.inputs, PixelInputs)
        first, *others = self.models
        grid = first.last_block(moved.inputs.images, moved.inputs.offsets)
        encodings = [first.encode_features(first.encoder.head(grid)), *(model.encode(moved.inputs) for model in others)]
        return Seen(encodings, grid)
