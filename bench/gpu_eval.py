"""Captioning on a GPU: end to end from a dataset h5 at beam 3 beside the CNN alone; decoding beside its products."""

import os
import tempfile
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from bench import search
from bench.coco_shaped import V, make_dataset
from bench.timing import interleave, ratio
from captioner.data.batches import dataset_batches, shares
from captioner.data.dataset import Dataset
from captioner.inference.captioner import Captioner
from captioner.inference.run import Totals, evaluate
from captioner.model.caption_model import CaptionModel
from captioner.model.config import ModelConfig
from captioner.runtime.memory import keep_freed_memory
from captioner.runtime.precision import inference_dtype
from captioner.search import SearchOptions

BATCHES = (16, 64, 256)
ROUNDS = 5


def run() -> None:
    """Print the tables; needs a GPU, and 4 GB of temporary files."""
    if not torch.cuda.is_available():
        print("bench gpu_eval: needs a CUDA GPU; there is none here")
        return
    measure(torch.device("cuda"), ModelConfig(V), num_images=20_000, batches=BATCHES)
    print()
    search.run()


def measure(device: torch.device, config: ModelConfig, *, num_images: int, batches: tuple[int, ...]) -> None:
    """Print images/s end to end and of the CNN alone, by precision and batch size; a quarter of the images is used."""
    keep_freed_memory()
    workers = min(8, os.cpu_count() or 1)
    print("| precision | batch | CNN alone, images/s | end to end, images/s | share (target 0.60) |")
    print("|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        dataset = make_dataset(Path(folder), num_images)
        for dtype in sorted({torch.float32, inference_dtype("auto", device)}, key=str):
            torch.manual_seed(0)
            model = CaptionModel(config)
            with torch.no_grad():
                model.decoder.output.bias[-1] = -30  # captions of full length, as in bench search
            captioner = Captioner([model], dataset.vocab, device, dtype)
            for size in batches:
                count = len(dataset.split_indices("test"))
                contenders = {
                    "cnn": partial(encode_resident, captioner, resident_pixels(captioner, dataset, size), count),
                    "all": partial(caption_all, captioner, dataset, size, workers),
                }
                seconds = interleave(contenders, ROUNDS)
                print(
                    f"| {str(dtype).removeprefix('torch.')} | {size} | {_rate(count, seconds['cnn'])} "
                    f"| {_rate(count, seconds['all'])} | {ratio(seconds['cnn'], seconds['all'])} |",
                    flush=True,
                )


@torch.inference_mode()
def encode_resident(captioner: Captioner, pixels: Tensor, count: int) -> None:
    """The CNN over `count` pictures, from a batch of pixels that are on the device already."""
    for start in range(0, count, len(pixels)):
        features = captioner.models[0].cnn_features(pixels[: count - start])
    features.sum().item()


def resident_pixels(captioner: Captioner, dataset: Dataset, batch_size: int) -> Tensor:
    """uint8 (batch_size or fewer, 3, 256, 256) on the device."""
    indices = dataset.split_indices("test")[:batch_size]
    return torch.stack([torch.from_numpy(dataset.images[int(i)].copy()) for i in indices]).to(captioner.device)


def caption_all(captioner: Captioner, dataset: Dataset, batch_size: int, num_workers: int) -> None:
    """What caption-eval does with the test split, but for writing results."""
    indices = dataset.split_indices("test")
    batches = dataset_batches(dataset, indices, shares(len(indices), batch_size, 0, 1), num_workers)
    totals = Totals()
    for evaluated in evaluate(captioner, batches, SearchOptions(beam_size=3)):
        totals.add(evaluated)
    assert totals.num_captioned == len(indices)


def _rate(count: int, seconds: list[float]) -> str:
    rates = sorted(count / value for value in seconds)
    return f"{rates[len(rates) // 2]:.0f} ({rates[0]:.0f}-{rates[-1]:.0f})"
