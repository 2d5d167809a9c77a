"""Decoding against the bare matrix products of the same shapes and precision.

rnn 512, encoding 512, 9,567 words, 16 words per caption, no early END, features given.
"""

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from bench.timing import dtypes, interleave, milliseconds, ratio
from captioner.kernels import can_pack
from captioner.model.attention_decoder import AttentionDecoder
from captioner.model.decoder import Decoder
from captioner.search import SearchOptions, search

V, WIDTH, WORDS = 9567, 512, 16


def run() -> None:
    """Print a Markdown table."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    compare(device, lambda: Decoder(V, WIDTH, WIDTH), (WIDTH,), ((16, 1), (16, 3), (64, 1), (64, 3)), bare_products)


def compare(
    device: torch.device,
    make_decoder: Callable[[], Decoder | AttentionDecoder],
    feature_shape: tuple[int, ...],
    sizes: Sequence[tuple[int, int]],
    bare_products: Callable,
) -> None:
    """Print a Markdown table: ms of the products, ms of the search, and the ratio.

    Args:
        make_decoder: makes a decoder with random weights.
        feature_shape: of one image.
        sizes: pairs of images at once and beams.
        bare_products: (decoder, features, beam_size): the search without anything but its matrix products.
    """
    print(f"Decoding {WORDS} words on {device} ({torch.get_num_threads()} threads)\n")
    print("| precision | images | beam | products alone, ms | search, ms | ratio |\n|---|---|---|---|---|---|")
    for dtype in dtypes(device):
        torch.manual_seed(0)
        decoder = ready(make_decoder(), device, dtype)
        for num_images, beam_size in sizes:
            features = torch.randn(num_images, *feature_shape, device=device)
            seconds = interleave(
                {
                    "products": partial(waited(device, bare_products), decoder, features, beam_size),
                    "search": partial(waited(device, decode), decoder, features, SearchOptions(beam_size=beam_size)),
                }
            )
            print(
                f"| {str(dtype).removeprefix('torch.')} | {num_images} | {beam_size} "
                f"| {milliseconds(seconds['products'])} | {milliseconds(seconds['search'])} "
                f"| {ratio(seconds['search'], seconds['products'])} |"
            )


def ready(decoder: Decoder | AttentionDecoder, device: torch.device, dtype: torch.dtype) -> Decoder | AttentionDecoder:
    """As caption-eval would use it, but that it never says END."""
    decoder.eval()
    bias = decoder.output_bias if isinstance(decoder, AttentionDecoder) else decoder.output.bias
    with torch.no_grad():
        bias[-1] = -30
    decoder.to(device, dtype)
    if dtype == torch.bfloat16 and can_pack(device):
        decoder.pack()
    return decoder


def decode(decoder: Decoder | AttentionDecoder, features: Tensor, options: SearchOptions) -> object:
    with torch.inference_mode():
        state = decoder.start(features)
        return search(decoder.step, state, num_images=len(features), vocab_size=V, max_length=WORDS, options=options)


@torch.inference_mode()
def bare_products(decoder: Decoder, features: Tensor, beam_size: int) -> None:
    """torch's linear layers of the steps: one row per image for the image and for START, then one per beam."""
    lstm, output = decoder.lstm, decoder.output
    first = features.to(output.weight.dtype)
    later = first.repeat(beam_size, 1)
    for t in range(WORDS + 1):
        rows = first if t < 2 else later
        F.linear(rows, lstm.weight_ih_l0, lstm.bias_ih_l0)
        F.linear(rows, lstm.weight_hh_l0, lstm.bias_hh_l0)
        if t > 0:
            F.linear(rows, output.weight, output.bias)


def waited(device: torch.device, work: Callable) -> Callable:
    """`work`, returning only when the device has done it."""

    def finished(*args: object) -> None:
        work(*args)
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    return finished
