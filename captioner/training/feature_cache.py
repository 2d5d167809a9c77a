"""CNN features of a whole dataset, computed once and kept on disk: those of a frozen CNN, or what its last block sees.

The file's name carries a digest of all that the features depend on: CNN weights, pixels of the data set, crops and
number format. Another run with the same ingredients shares it; a change of any of them asks for another file, so that a
stale one is never used.

The file is a .npy of (N, V) rows, each with its check sum, which is looked at whenever a row is read. Where they are
uint8, a second .npy follows in the same file: the scale of each channel, a row with its check sum, too. Features are
not negative; the square root brings the few large ones nearer to the many small ones, so that 256 steps are enough: a
value is off by at most half a step of its root.

Several processes share the work, see `shared_work`.

Letters: N images, V views (crops, and crops of mirrored images), C channels.
"""

import copy
import dataclasses
import hashlib
import io
import json
import logging
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np
import torch
from torch import Tensor

from captioner.data.batch import Batch, PixelInputs
from captioner.data.batches import dataset_batches, pinned_ahead
from captioner.data.cached_features import CachedFeatures, place_numbers
from captioner.data.checked_rows import check_sums, map_array, row_type
from captioner.data.crops import CENTRE_OFFSET, MAX_CROP_OFFSET
from captioner.data.dataset import Dataset
from captioner.data.pixel_digest import pixel_digest
from captioner.errors import InputError
from captioner.model.caption_model import CaptionModel
from captioner.model.encoder import LAST_BLOCK
from captioner.runtime.pieces import Pieces
from captioner.runtime.precision import prepare_for_inference
from captioner.runtime.processes import Processes
from captioner.runtime.transfers import upload
from captioner.training.options import CacheType
from captioner.training.shared_work import Records, forget_parts, write_together

log = logging.getLogger(__name__)

FORMAT = 2  # of these files; 1 had no check sums
BATCH_SIZE, GPU_BATCH_SIZE = 16, 128
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
        """Of the numbers in the file."""
        if self.kind != "auto":
            return np.dtype(self.kind)
        return np.dtype(np.float32 if len(self.shape(model)) == 1 else np.float16)

    def row_type(self, model: CaptionModel) -> np.dtype[np.void]:
        """Of the file's rows: the features of one view, and their check sum."""
        return row_type(self.dtype(model), self.shape(model))

    def bytes_per_image(self, model: CaptionModel) -> int:
        """On disk."""
        return self.views * self.row_type(model).itemsize

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
    processes: Processes,
    stop_signal: Callable[[], int],
) -> CachedFeatures:
    """The features of every image, from the cache file if it is there, else computed by all processes and written.

    Args:
        folder: where cache files live; one that all processes share.
        dtype: the number format the CNN computes in.
        stop_signal: the number of the signal that asked to stop, 0 if none has.

    Returns:
        Memory-mapped, read-only.

    Raises:
        InputError: the cache cannot be written, or holds something else than its name says.
        Stopped: a process was asked to stop while they computed.
    """
    name, is_there = "", False
    if processes.is_main:  # its digest takes all pixels of the data set
        name = form.file_name(model, _digest(model, dataset, form, dtype))
        is_there = (folder / name).exists()
    name, is_there = processes.gather((name, is_there), patient=True)[0]
    path = folder / name
    if not is_there:
        log.info("features: computing %d images × %d view(s) into %s", len(dataset.info), form.views, path)
        _compute(path, model, dataset, form, device, dtype, num_workers, processes, stop_signal)
    elif processes.is_main:
        log.info("features: using %s", path)
        forget_parts(path)
    if not path.exists():
        raise InputError(f"{path}: was written by another machine", expected="a folder that all machines share")
    return open_cache(path, (len(dataset.info), form.views), form.row_type(model), form.crops)


def open_cache(path: Path, shape: tuple[int, int], kind: np.dtype[np.void], crops: int) -> CachedFeatures:
    """What a cache file holds, memory-mapped.

    Args:
        shape: (N, V).
        kind: of its rows.

    Raises:
        InputError: it holds something else.
    """
    try:
        rows = map_array(path)
        if not isinstance(rows, np.memmap):
            raise ValueError("an archive")
        scale = None
        if kind["values"].base == np.uint8:
            with open(path, "rb") as stream:
                stream.seek(rows.offset + rows.nbytes)
                scale = _read_scale(stream, kind["values"].shape[-1])
    except Exception as error:  # NumPy reads the header as Python: a damaged one raises many kinds
        raise InputError(f"{path}: not a feature cache, or a damaged one", remedy="delete it and run again") from error
    if rows.shape != shape or rows.dtype != kind:
        raise InputError(f"{path}: holds {rows.dtype} {rows.shape}", expected=f"{kind} {shape}", remedy="delete it")
    return CachedFeatures(rows["values"], scale, crops, rows["sum"], path)


def stand_in_features(images: int, form: CacheForm, model: CaptionModel) -> CachedFeatures:
    """What looks like cached features of so many images, and takes no memory."""
    one = np.random.default_rng(0).random((1, 1, *form.shape(model)), np.float32)
    shape = (images, form.views, *one.shape[2:])
    if form.dtype(model) != np.uint8:
        return CachedFeatures(np.broadcast_to(one.astype(form.dtype(model)), shape), None, form.crops)
    scale = np.full(shape[-1], 1 / 255, np.float32)
    return CachedFeatures(np.broadcast_to(_to_bytes(one, scale), shape), scale, form.crops)


def _compute(
    path: Path,
    model: CaptionModel,
    dataset: Dataset,
    form: CacheForm,
    device: torch.device,
    dtype: torch.dtype,
    num_workers: int,
    processes: Processes,
    stop_signal: Callable[[], int],
) -> None:
    model = copy.deepcopy(model).to(device).eval()
    for module in model.encoder.cnn_modules():
        prepare_for_inference(module, dtype)
    count, num_views, of_row = len(dataset.info), form.views, form.row_type(model)
    kind, shape = of_row["values"].base, of_row["values"].shape
    header = io.BytesIO()
    described = np.lib.format.dtype_to_descr(of_row)
    np.lib.format.write_array_header_1_0(
        header, {"descr": described, "fortran_order": False, "shape": (count, num_views)}
    )
    views = Views(model, dataset, form, device, num_workers)

    def make_trailer() -> bytes:
        if kind != np.uint8:
            return b""
        one_view = Views(model, dataset, dataclasses.replace(form, crops=1, mirrored=False), device, num_workers)
        sampled, target = one_view.of(np.arange(0, count, math.ceil(count / SCALE_IMAGES))), io.BytesIO()
        _write_scale(target, _scale_of(list(sampled)))
        return target.getvalue()

    def compute(images: range, trailer: bytes) -> Iterator[bytes]:
        scale, first = None, images.start
        if trailer:
            try:
                scale = _read_scale(io.BytesIO(trailer), shape[-1])
            except Exception as error:  # as in open_cache
                remedy = f"delete the folder .{path.name}.parts beside it"
                raise InputError(f"{path}: what is done of it is damaged", remedy=remedy) from error
        for batch in views.of(np.arange(images.start, images.stop)):
            values = batch.numpy()
            rows = np.empty(values.shape[:2], of_row)
            rows["values"] = values.astype(kind, copy=False) if scale is None else _to_bytes(values, scale)
            places = place_numbers(first + np.arange(len(rows))[:, None], np.arange(num_views), num_views)
            rows["sum"] = check_sums(rows["values"].reshape(-1, *shape), places.ravel().tolist()).reshape(places.shape)
            first += len(rows)
            yield rows.tobytes()

    records = Records(header.getvalue(), count, form.bytes_per_image(model), views.batch_size)
    write_together(path, records, make_trailer, compute, processes, stop_signal, "features")


class Views:
    """What a CNN makes of images, crop by crop; in smaller pieces where the memory is too small for a batch.

    Args:
        model: on the device, in the format to compute in.
    """

    def __init__(
        self, model: CaptionModel, dataset: Dataset, form: CacheForm, device: torch.device, num_workers: int
    ) -> None:
        self.model, self.dataset, self.form, self.device = model, dataset, form, device
        self.num_workers = num_workers
        self.batch_size = GPU_BATCH_SIZE if device.type == "cuda" else BATCH_SIZE
        self.pieces = Pieces(remedy="free memory from other programs, or compute on the CPU with --gpuid -1")
        self.offsets = [upload(torch.tensor([offset]), device) for offset in crop_offsets(form.crops)]

    def of(self, indices: np.ndarray) -> Iterator[Tensor]:
        """float32 (N, V, ..) of these images of the data set, batch by batch, on the CPU.

        Raises:
            InputError: the memory is too small even for one image at a time.
        """
        starts = range(0, len(indices), self.batch_size)
        positions = (range(first, min(first + self.batch_size, len(indices))) for first in starts)
        batches = dataset_batches(self.dataset, indices, positions, self.num_workers)
        for batch in pinned_ahead(batches) if self.device.type == "cuda" else batches:
            done: list[Tensor] = []
            while not done:  # once more, in smaller pieces, where the memory was too small
                with self.pieces.of(batch) as pieces:
                    done = [self._of_piece(piece) for piece in pieces]
            yield torch.cat(done)

    @torch.inference_mode()
    def _of_piece(self, piece: Batch) -> Tensor:
        inputs = piece.to(self.device).inputs
        assert isinstance(inputs, PixelInputs)
        images = inputs.images
        compute = self.model.last_block_inputs if self.form.last_block else self.model.cnn_features
        views = [
            compute(seen, offset.expand(len(images), 2)).float()
            for seen in ((images, images.flip(3)) if self.form.mirrored else (images,))
            for offset in self.offsets
        ]
        return torch.stack(views, dim=1).cpu()


def _scale_of(sampled: list[Tensor]) -> np.ndarray:
    """float32 (C,): what uint8 values are multiplied by to give roots, by the largest of some images' features."""
    largest = torch.stack([views.flatten(0, -2).amax(0) for views in sampled]).amax(0).sqrt().numpy()
    # A channel that these images hardly show may be shown by others.
    least = float(largest.mean()) / 2 or 1.0
    return (np.maximum(largest, least) * (ABOVE_SAMPLED / 255)).astype(np.float32)


def _to_bytes(values: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """uint8: roots, rounded to multiples of the scale; those above 255 are cut off."""
    return np.rint(np.sqrt(values) / scale).clip(0, 255).astype(np.uint8)


def _write_scale(stream: IO[bytes], scale: np.ndarray) -> None:
    """As a .npy file."""
    row = np.empty(1, row_type(scale.dtype, scale.shape))
    row["values"], row["sum"] = scale, check_sums(scale[None], [0])
    np.lib.format.write_array(stream, row, version=(1, 0))


def _read_scale(stream: IO[bytes], channels: int) -> np.ndarray:
    """The array that the stream stands at: float32 (C,).

    Raises:
        ValueError: there is none of that size, or it is damaged; NumPy raises many other kinds.
    """
    row = np.lib.format.read_array(stream, allow_pickle=False)
    if row.shape != (1,) or row.dtype != row_type("<f4", (channels,)):
        raise ValueError("the scales are missing")
    if check_sums(row["values"], [0]) != row["sum"]:
        raise ValueError("the check sum of the scales differs")
    scale: np.ndarray = row["values"][0]
    return scale


def _digest(model: CaptionModel, dataset: Dataset, form: CacheForm, dtype: torch.dtype) -> str:
    digest = hashlib.blake2b(digest_size=10)
    config = model.config
    recipe: list[object] = [
        config.cnn_layer,
        config.cnn_pixels,
        crop_offsets(form.crops),
        config.pixel_mean,
        config.pixel_std,
        str(dtype),
        len(dataset.info),
        form.mirrored,
        form.last_block,
        form.dtype(model).name,
        FORMAT,
    ]
    digest.update(json.dumps(recipe).encode())
    # What the last block sees does not depend on that block, which is being trained.
    modules = [model.encoder.features[:LAST_BLOCK]] if form.last_block else model.encoder.cnn_modules()
    for module in modules:
        for name, tensor in module.state_dict().items():
            digest.update(name.encode())
            digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    digest.update(pixel_digest(dataset).encode())
    return digest.hexdigest()
