"""What attention costs: a training iteration beside the plain LSTM's, and decoding beside its bare matrix products.

Sizes as in the benchmarks `lm_train` and `search`: 16 images with 5 captions each, features given, rnn 512, encoding
512, 9,567 words; grids of 7×7×512 and 14×14×512; 16 words per caption when decoding, without early END.
"""

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from bench.coco_shaped import CAPTIONS, V, random_captions
from bench.lm_train import IMAGES, WIDTH, our_iteration
from bench.search import WORDS, compare
from bench.timing import dtypes, interleave, milliseconds, ratio
from captioner.model.attention_decoder import AttentionDecoder
from captioner.model.choices import GRIDS, CnnLayer
from captioner.runtime.memory import keep_freed_memory


def run() -> None:
    """Print two Markdown tables for each size of the grid."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    keep_freed_memory()
    sizes = ((16, 1), (16, 3), (64, 3))
    for layer, side in GRIDS.items():
        print(f"\nGrids of {side}×{side}\n")
        training(device, layer)
        print()
        compare(device, lambda: AttentionDecoder(V, WIDTH, WIDTH), (side * side, WIDTH), sizes, bare_products)


def training(device: torch.device, layer: CnnLayer) -> None:
    """ms per iteration of both language models, and their ratio."""
    torch.manual_seed(0)
    labels = torch.from_numpy(random_captions(np.random.default_rng(0), IMAGES * CAPTIONS).astype(np.int64))
    vectors = torch.rand(IMAGES, WIDTH, device=device)
    grids = torch.rand(IMAGES, GRIDS[layer] ** 2, WIDTH, device=device)
    print(f"Training iteration, {len(labels)} captions on {device} ({torch.get_num_threads()} threads)\n")
    print("| precision | LSTM, ms | attention, ms | ratio |\n|---|---|---|---|")
    for dtype in dtypes(device):
        seconds = interleave(
            {
                "lstm": our_iteration(vectors, labels, dtype),
                "attention": our_iteration(grids, labels, dtype, decoder="attention", cnn_layer=layer),
            }
        )
        print(
            f"| {str(dtype).removeprefix('torch.')} | {milliseconds(seconds['lstm'])} "
            f"| {milliseconds(seconds['attention'])} | {ratio(seconds['attention'], seconds['lstm'])} |"
        )


@torch.inference_mode()
def bare_products(decoder: AttentionDecoder, grids: Tensor, beam_size: int) -> None:
    """All matrix products of the search: of the grids once; of the steps for one row per image, then one per beam."""
    grids = grids.to(decoder.embedding.weight.dtype)
    weights = dict(decoder._weights())
    mean_weight, mean_bias = weights.pop("mean")
    F.linear(grids, decoder.key.weight)
    F.linear(grids, decoder.value.weight, decoder.value.bias)
    F.linear(grids.mean(1), mean_weight, mean_bias)
    keys = grids.unflatten(2, (decoder.heads, -1)).transpose(1, 2)  # (N, A, G, d), and the values alike
    inputs = {
        beams: (grids[:, :beams].reshape(-1, WIDTH), grids[:, : 2 * beams].reshape(-1, 2 * WIDTH))
        for beams in (1, beam_size)
    }
    for t in range(WORDS):
        beams = 1 if t == 0 else beam_size
        rows, wide = inputs[beams]
        for weight, bias in weights.values():
            F.linear(rows if weight.shape[1] == WIDTH else wide, weight, bias)
        queries = keys[:, :, :beams]
        (queries @ keys.transpose(2, 3)) @ keys
