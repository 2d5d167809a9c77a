"""CNN features of a whole dataset, computed once and kept on disk: those of a frozen CNN, or what its last block sees.

The file's name carries a digest of all that the features depend on: CNN weights, pixels of the data set, crops and
number format. Another run with the same ingredients shares it; a change of any of them asks for another file, so that a
stale one is never used.

The file is a .npy of the values. Where they are uint8, a second .npy follows in the same file: the scale of each
channel. Features are not negative; the square root brings the few large ones nearer to the many small ones, so that 256
steps are enough: a value is off by at most half a step of its root.

Letters: N images, V views (crops, and crops of mirrored images), C channels.
"""

import copy
import dataclasses
import hashlib
import io
import json
import logging
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from captioner.data.batch import PixelInputs
from captioner.data.batches import dataset_batches
from captioner.data.cached_features import CachedFeatures
from captioner.data.crops import CENTRE_OFFSET, MAX_CROP_OFFSET
from captioner.data.dataset import Dataset
from captioner.data.pixel_digest import pixel_digest
from captioner.errors import InputError
from captioner.model.caption_model import CaptionModel
from captioner.model.encoder import LAST_BLOCK
from captioner.runtime.files import resumable_write
from captioner.runtime.precision import prepare_for_inference
from captioner.training.options import CacheType

log = logging.getLogger(__name__)

BATCH_SIZE = 16
SCALE_IMAGES = 64  # whose largest values say what 255 means
ABOVE_SAMPLED = 1.2  # roots of other images may be so much larger than theirs before they are cut off


@dataclass(frozen=True)
class CacheForm:
    """What is kept of each image.

    Attributes:
        crops: how many; the first is the centre.
        mirrored: whether each crop of the mirrored image is kept, too.
        last_block: keep what the last convolution block sees, for training it; else the CNN's features.
        kind: number format of the file; auto: float32, float16 for grids, which have many times more numbers (it
            keeps three digits, up to 65,504).
    """

    crops: int
    mirrored: bool = False
    last_block: bool = False
    kind: CacheType = "auto"

    @property
    def views(self) -> int:
        """V."""
        return self.crops * (2 if self.mirrored else 1)

    def shape(self, model: CaptionModel) -> tuple[int, ...]:
        """Of the features of one view; C is the last."""
        return model.encoder.last_block_shape if self.last_block else model.encoder.feature_shape

    def dtype(self, model: CaptionModel) -> np.dtype:
        """Of the file."""
        if self.kind != "auto":
            return np.dtype(self.kind)
        return np.dtype(np.float32 if len(self.shape(model)) == 1 else np.float16)

    def bytes_per_image(self, model: CaptionModel) -> int:
        """On disk."""
        return self.views * math.prod(self.shape(model)) * self.dtype(model).itemsize

    def file_name(self, model: CaptionModel, digest: str) -> str:
        """For people, but for the digest."""
        if self.last_block:
            return f"features-block5-{digest}.npy"
        grid = "-grid" if len(self.shape(model)) > 1 else ""
        return f"features-{model.config.cnn_layer}{grid}-{digest}.npy"


def crop_offsets(count: int) -> list[tuple[int, int]]:
    """First row and column of each cached crop: the centre, then the corners, then a fixed pseudo-random series."""
    far = MAX_CROP_OFFSET
    offsets = [(CENTRE_OFFSET, CENTRE_OFFSET), (0, 0), (far, far), (0, far), (far, 0)]
    rng = np.random.default_rng(0)
    while len(offsets) < count:
        row, column = rng.integers(0, far + 1, size=2)
        offsets.append((int(row), int(column)))
    return offsets[:count]


def cached_features(
    model: CaptionModel,
    dataset: Dataset,
    folder: Path,
    form: CacheForm,
    *,
    device: torch.device,
    dtype: torch.dtype,
    num_workers: int,
) -> CachedFeatures:
    """The features of every image, from the cache file if it is there, else computed and written.

    Args:
        folder: where cache files live.
        dtype: the number format the CNN computes in.

    Returns:
        Memory-mapped, read-only.

    Raises:
        InputError: the cache cannot be written, or holds something else than its name says.
    """
    path = folder / form.file_name(model, _digest(model, dataset, form, dtype))
    shape, kind = (len(dataset.info), form.views, *form.shape(model)), form.dtype(model)
    if path.exists():
        log.info("features: using %s", path)
    else:
        log.info("features: computing %d images × %d view(s) into %s", shape[0], shape[1], path)
        _compute(path, model, dataset, form, device, dtype, num_workers)
    values, scale = open_cache(path, shape, kind)
    return CachedFeatures(values, scale, form.crops)


def open_cache(path: Path, shape: tuple[int, ...], kind: np.dtype) -> tuple[np.ndarray, np.ndarray | None]:
    """The values in a cache file, memory-mapped, and their scales if they are uint8.

    Raises:
        InputError: it holds something else.
    """
    try:
        values = np.load(path, mmap_mode="r")
        if not isinstance(values, np.ndarray):
            raise ValueError("an archive")
        scale = _read_scale(path, values) if kind == np.uint8 else None
    except Exception as error:  # NumPy reads the header as Python: a damaged one raises many kinds
        raise InputError(f"{path}: not a feature cache, or a damaged one", remedy="delete it and run again") from error
    if values.shape != shape or values.dtype != kind:
        raise InputError(f"{path}: holds {values.dtype} {values.shape}", expected=f"{kind} {shape}", remedy="delete it")
    return values, scale


def stand_in_features(images: int, form: CacheForm, model: CaptionModel) -> CachedFeatures:
    """What looks like cached features of so many images, and takes no memory."""
    one = np.random.default_rng(0).random((1, 1, *form.shape(model)), np.float32)
    shape = (images, form.views, *one.shape[2:])
    if form.dtype(model) != np.uint8:
        return CachedFeatures(np.broadcast_to(one.astype(form.dtype(model)), shape), None, form.crops)
    scale = np.full(shape[-1], 1 / 255, np.float32)
    return CachedFeatures(np.broadcast_to(_to_bytes(one, scale), shape), scale, form.crops)


@torch.inference_mode()
def _compute(
    path: Path,
    model: CaptionModel,
    dataset: Dataset,
    form: CacheForm,
    device: torch.device,
    dtype: torch.dtype,
    num_workers: int,
) -> None:
    model = copy.deepcopy(model).to(device).eval()
    for module in model.encoder.cnn_modules():
        prepare_for_inference(module, dtype)
    count, kind, shape = len(dataset.info), form.dtype(model), (form.views, *form.shape(model))
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": kind.str, "fortran_order": False, "shape": (count, *shape)})
    scale = None
    if kind == np.uint8:
        few = np.arange(0, count, math.ceil(count / SCALE_IMAGES))
        one_view = dataclasses.replace(form, crops=1, mirrored=False)
        scale = _scale_of(list(_views(model, dataset, few, one_view, device, num_workers)))
    with (
        resumable_write(path) as stream,
        tqdm(total=count, desc="features", unit="images", disable=None) as bar,
    ):
        done = _whole_batches(stream, header.getvalue(), form.bytes_per_image(model))
        if done:
            log.info("features: %d of %d images were done before", done, count)
            bar.update(done)
        for views in _views(model, dataset, np.arange(done, count), form, device, num_workers):
            values = views.numpy()
            stream.write((values.astype(kind, copy=False) if scale is None else _to_bytes(values, scale)).tobytes())
            bar.update(len(values))
        if scale is not None:
            np.lib.format.write_array(stream, scale, version=(1, 0))


def _whole_batches(stream: IO[bytes], header: bytes, bytes_per_image: int) -> int:
    """How many images of whole batches an earlier attempt has written; the stream is cut to the header and them."""
    written = stream.tell()
    stream.seek(0)
    is_ours = stream.read(len(header)) == header
    images = (written - len(header)) // bytes_per_image // BATCH_SIZE * BATCH_SIZE if is_ours else 0
    if images:
        stream.truncate(len(header) + images * bytes_per_image)
    else:
        stream.truncate(0)
        stream.write(header)
    return images


def _views(
    model: CaptionModel,
    dataset: Dataset,
    indices: np.ndarray,
    form: CacheForm,
    device: torch.device,
    num_workers: int,
) -> Iterator[Tensor]:
    """float32 (N, V, ..), batch by batch, on the CPU."""
    compute = model.last_block_inputs if form.last_block else model.cnn_features
    positions = (range(first, min(first + BATCH_SIZE, len(indices))) for first in range(0, len(indices), BATCH_SIZE))
    for batch in dataset_batches(dataset, indices, positions, num_workers):
        assert isinstance(batch.inputs, PixelInputs)
        images = batch.inputs.images.to(device)
        views = []
        for seen in (images, images.flip(3)) if form.mirrored else (images,):
            for offset in crop_offsets(form.crops):
                offsets = torch.tensor([offset], device=device).expand(len(images), 2)
                views.append(compute(seen, offsets).float().cpu())
        yield torch.stack(views, dim=1)


def _scale_of(sampled: list[Tensor]) -> np.ndarray:
    """float32 (C,): what uint8 values are multiplied by to give roots, by the largest of some images' features."""
    largest = torch.stack([views.flatten(0, -2).amax(0) for views in sampled]).amax(0).sqrt().numpy()
    # A channel that these images hardly show may be shown by others.
    least = float(largest.mean()) / 2 or 1.0
    return (np.maximum(largest, least) * (ABOVE_SAMPLED / 255)).astype(np.float32)


def _to_bytes(values: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """uint8: roots, rounded to multiples of the scale; those above 255 are cut off."""
    return np.rint(np.sqrt(values) / scale).clip(0, 255).astype(np.uint8)


def _read_scale(path: Path, values: np.ndarray) -> np.ndarray:
    """The second array of the file.

    Raises:
        ValueError: there is none of that size.
    """
    with open(path, "rb") as stream:
        stream.seek(values.offset + values.nbytes if isinstance(values, np.memmap) else 0)
        scale = np.lib.format.read_array(stream, allow_pickle=False)
    if scale.shape != values.shape[-1:] or scale.dtype != np.float32:
        raise ValueError("the scales are missing")
    return scale


def _digest(model: CaptionModel, dataset: Dataset, form: CacheForm, dtype: torch.dtype) -> str:
    digest = hashlib.blake2b(digest_size=10)
    config = model.config
    recipe: list[object] = [
        config.cnn_layer,
        config.cnn_pixels,
        crop_offsets(form.crops),
        str(dtype),
        len(dataset.info),
    ]
    recipe += [config.pixel_mean, config.pixel_std] if config.pixel_mean else []
    if (form.mirrored, form.last_block, form.kind) != (False, False, "auto"):
        recipe += [form.mirrored, form.last_block, form.dtype(model).name]  # older files have none of it in their names
    digest.update(json.dumps(recipe).encode())
    # What the last block sees does not depend on that block, which is being trained.
    modules = [model.encoder.features[:LAST_BLOCK]] if form.last_block else model.encoder.cnn_modules()
    for module in modules:
        for name, tensor in module.state_dict().items():
            digest.update(name.encode())
            digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    digest.update(pixel_digest(dataset).encode())
    return digest.hexdigest()
