"""What attention costs: a training iteration beside the plain LSTM's, and decoding beside its bare matrix products.

Sizes as in the benchmarks `lm_train` and `search`: 16 images with 5 captions each, features given, rnn 512, encoding
512, 9,567 words; grids of 7×7×512; 16 words per caption when decoding, without early END.
"""

from functools import partial

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from bench.coco_shaped import CAPTIONS, V, random_captions
from bench.lm_train import IMAGES, WIDTH, our_iteration
from bench.search import WORDS, decode, waited
from bench.timing import dtypes, interleave, milliseconds, ratio
from captioner.kernels import can_pack
from captioner.model.attention_decoder import AttentionDecoder
from captioner.runtime.memory import keep_freed_memory
from captioner.search import SearchOptions

CELLS = 49


def run() -> None:
    """Print two Markdown tables."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    keep_freed_memory()
    training(device)
    searching(device)


def training(device: torch.device) -> None:
    """ms per iteration of both language models, and their ratio."""
    torch.manual_seed(0)
    labels = torch.from_numpy(random_captions(np.random.default_rng(0), IMAGES * CAPTIONS).astype(np.int64))
    vectors, grids = torch.rand(IMAGES, WIDTH, device=device), torch.rand(IMAGES, CELLS, WIDTH, device=device)
    print(f"Training iteration, {len(labels)} captions on {device} ({torch.get_num_threads()} threads)\n")
    print("| precision | LSTM, ms | attention, ms | ratio |\n|---|---|---|---|")
    for dtype in dtypes(device):
        seconds = interleave(
            {
                "lstm": our_iteration(vectors, labels, dtype),
                "attention": our_iteration(grids, labels, dtype, decoder="attention"),
            }
        )
        print(
            f"| {str(dtype).removeprefix('torch.')} | {milliseconds(seconds['lstm'])} "
            f"| {milliseconds(seconds['attention'])} | {ratio(seconds['attention'], seconds['lstm'])} |"
        )


def searching(device: torch.device) -> None:
    """ms of the products, ms of the search, and the ratio."""
    print(f"\nDecoding {WORDS} words on {device} ({torch.get_num_threads()} threads)\n")
    print("| precision | images | beam | products alone, ms | search, ms | ratio |\n|---|---|---|---|---|---|")
    for dtype in dtypes(device):
        decoder = make_decoder(device, dtype)
        for num_images, beam_size in ((16, 1), (16, 3), (64, 3)):
            grids = torch.randn(num_images, CELLS, WIDTH, device=device)
            seconds = interleave(
                {
                    "products": partial(waited(device, bare_products), decoder, grids, beam_size),
                    "search": partial(waited(device, decode), decoder, grids, SearchOptions(beam_size=beam_size)),
                }
            )
            print(
                f"| {str(dtype).removeprefix('torch.')} | {num_images} | {beam_size} "
                f"| {milliseconds(seconds['products'])} | {milliseconds(seconds['search'])} "
                f"| {ratio(seconds['search'], seconds['products'])} |"
            )


def make_decoder(device: torch.device, dtype: torch.dtype) -> AttentionDecoder:
    """A decoder with random weights that never says END."""
    torch.manual_seed(0)
    decoder = AttentionDecoder(V, WIDTH, WIDTH).eval()
    with torch.no_grad():
        decoder.output_bias[-1] = -30
    decoder.to(device, dtype)
    if dtype == torch.bfloat16 and can_pack(device):  # as caption-eval does
        decoder.pack()
    return decoder


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
