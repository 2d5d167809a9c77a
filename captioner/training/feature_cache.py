"""CNN features of a whole dataset, computed once and kept on disk for training with a frozen CNN.

The file's name carries a digest of all that the features depend on: CNN weights, pixels of the data set, crops and
number format. Another run with the same ingredients shares it; a change of any of them asks for another file, so that a
stale one is never used.
"""

import copy
import hashlib
import json
import logging
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from captioner.data.batch import PixelInputs
from captioner.data.batches import dataset_batches
from captioner.data.dataset import Dataset
from captioner.data.images import CENTRE_OFFSET, MAX_CROP_OFFSET
from captioner.errors import InputError
from captioner.model.caption_model import CaptionModel
from captioner.runtime.files import atomic_write
from captioner.runtime.precision import prepare_for_inference

log = logging.getLogger(__name__)

BATCH_SIZE = 16
SAMPLED_IMAGES = 1000


def crop_offsets(count: int) -> list[tuple[int, int]]:
    """First row and column of each cached crop: the centre, then the corners, then a fixed pseudo-random series."""
    far = MAX_CROP_OFFSET
    offsets = [(CENTRE_OFFSET, CENTRE_OFFSET), (0, 0), (far, far), (0, far), (far, 0)]
    rng = np.random.default_rng(0)
    while len(offsets) < count:
        row, column = rng.integers(0, far + 1, size=2)
        offsets.append((int(row), int(column)))
    return offsets[:count]


def cached_type(model: CaptionModel) -> np.dtype:
    """float32; float16 for grids, which have 49 times as many numbers: they keep three digits, up to 65,504."""
    return np.dtype(np.float16 if model.config.decoder == "attention" else np.float32)


def cached_features(
    model: CaptionModel,
    dataset: Dataset,
    folder: Path,
    *,
    crops: int,
    device: torch.device,
    dtype: torch.dtype,
    num_workers: int,
) -> np.ndarray:
    """The CNN features of every image, from the cache file if it is there, else computed and written.

    Args:
        folder: where cache files live.
        crops: how many crops per image; the first is the centre.
        dtype: the number format the CNN computes in.

    Returns:
        float32 (images, crops, F) or float16 (images, crops, G, C), memory-mapped, read-only.

    Raises:
        InputError: the cache cannot be written, or holds something else than its name says.
    """
    key, kind = _digest(model, dataset, crops, dtype), cached_type(model)
    grid = "-grid" if model.config.decoder == "attention" else ""
    path = folder / f"features-{model.config.cnn_layer}{grid}-{key}.npy"
    shape = (len(dataset.info), crops, *model.encoder.feature_shape)
    if path.exists():
        log.info("features: using %s", path)
    else:
        log.info("features: computing %d images × %d crop(s) into %s", shape[0], crops, path)
        _compute(path, shape, model, dataset, device, dtype, num_workers)
    try:
        features = np.load(path, mmap_mode="r")
    except (ValueError, OSError, EOFError) as error:
        raise InputError(f"{path}: not a feature cache, or a damaged one", remedy="delete it and run again") from error
    if features.shape != shape or features.dtype != kind:
        raise InputError(
            f"{path}: holds {features.dtype} {features.shape}", expected=f"{kind} {shape}", remedy="delete it"
        )
    return features


@torch.inference_mode()
def _compute(
    path: Path,
    shape: tuple[int, ...],
    model: CaptionModel,
    dataset: Dataset,
    device: torch.device,
    dtype: torch.dtype,
    num_workers: int,
) -> None:
    model = copy.deepcopy(model).to(device).eval()
    for module in model.encoder.cnn_modules():
        prepare_for_inference(module, dtype)
    offsets = crop_offsets(shape[1])
    positions = (range(first, min(first + BATCH_SIZE, shape[0])) for first in range(0, shape[0], BATCH_SIZE))
    batches = dataset_batches(dataset, np.arange(shape[0]), positions, num_workers)
    with atomic_write(path) as stream, tqdm(total=shape[0], desc="features", unit="images", disable=None) as bar:
        kind = cached_type(model)
        header = {"descr": kind.str, "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(stream, header)
        for batch in batches:
            assert isinstance(batch.inputs, PixelInputs)
            images = batch.inputs.images.to(device)
            rows = []
            for offset in offsets:
                chosen = torch.tensor([offset], device=device).expand(len(images), 2)
                rows.append(model.cnn_features(images, chosen).float().cpu())
            stream.write(torch.stack(rows, dim=1).numpy().astype(kind, copy=False).tobytes())
            bar.update(len(images))


def _digest(model: CaptionModel, dataset: Dataset, crops: int, dtype: torch.dtype) -> str:
    digest = hashlib.blake2b(digest_size=10)
    config = model.config
    recipe = [config.cnn_layer, config.cnn_pixels, crop_offsets(crops), str(dtype), len(dataset.info)]
    digest.update(json.dumps(recipe).encode())
    for module in model.encoder.cnn_modules():
        for name, tensor in module.state_dict().items():
            digest.update(name.encode())
            digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    # Reading all of COCO's pixels to name a file would outlast an epoch; a spread sample tells data sets apart.
    step = max(1, len(dataset.info) // SAMPLED_IMAGES)
    for index in range(0, len(dataset.info), step):
        digest.update(np.ascontiguousarray(dataset.images[index]).tobytes())
    return digest.hexdigest()
