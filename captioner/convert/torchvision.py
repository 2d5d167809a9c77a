"""ImageNet weights for the encoder: torchvision's files, its download, Caffe's file, or none."""

import logging
import re
import sys
import urllib.error
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from captioner.convert.caffe import read_caffemodel
from captioner.errors import InputError
from captioner.model.checkpoint import load_plain
from captioner.model.choices import PIXELS, CnnLayer, Pixels
from captioner.model.encoder import CONV_NAMES, FC_NAMES, LAST_GRID, VGG16_FC_WIDTH, VGG16_WIDTHS

log = logging.getLogger(__name__)

# VGG16_Weights.IMAGENET1K_V1 of torchvision; the name ends with the first digits of its SHA-256.
IMAGENET_URL = "https://download.pytorch.org/models/vgg16-397923af.pth"

CLASSES_NAME = "classifier.6"  # the 1000 ImageNet classes, of no use here

# Where our own .pth says which pixels its weights want. torch keeps this attribute of a state_dict through saving and
# strict loading, so that torchvision still reads the file.
PIXELS_KEY = "pixels"

Arrays = Mapping[str, Tensor]


@dataclass(frozen=True)
class CnnWeights:
    """Checked weights of a VGG16.

    Attributes:
        state: float32 by the encoder's parameter names: `features.N.*` and, for fc7, `classifier.{0,3}.*`. Empty for
            "random".
        conv_widths: output channels of the 13 convolutions.
        fc_width: width of fc6 and fc7; None without them.
        pixels: the convention the weights were trained with.
    """

    state: dict[str, Tensor]
    conv_widths: tuple[int, ...]
    fc_width: int | None
    pixels: Pixels


def read_cnn_weights(source: str, cnn_layer: CnnLayer, pixels: Pixels | None = None) -> CnnWeights:
    """Read ImageNet weights; the widths come from the file.

    Args:
        source: a torchvision .pth (whole or convolutions only), a .caffemodel, "imagenet" (torchvision's download) or
            "random" (VGG16's widths, no weights).
        cnn_layer: "fc7" wants fc6 and fc7, "pool5" leaves them out.
        pixels: the convention, where the user knows better than the file. Otherwise: "caffe" for .caffemodel, for
            what caption-convert made of one, and for files with convolutions only (torchvision's own such file, the
            VGG16 "features" weights, wants Caffe's); "torchvision" for whole .pth files.

    Raises:
        InputError: no such file, not such weights, damaged, incomplete for `cnn_layer`, or no network.
    """
    if source == "random":
        return CnnWeights({}, VGG16_WIDTHS, VGG16_FC_WIDTH, pixels or "caffe")
    path = _download() if source == "imagenet" else Path(source)
    if path.suffix.lower() == ".caffemodel":
        arrays = read_caffemodel(path, wanted_fc=cnn_layer == "fc7")
        tensors = {name: torch.from_numpy(array) for name, array in arrays.items()}
        return _check(str(path), tensors, cnn_layer, pixels or "caffe")
    state, known = _read_pth(path, pixels)
    return _check(str(path), state, cnn_layer, pixels or known)


def _read_pth(path: Path, told: Pixels | None) -> tuple[Arrays, Pixels]:
    content = load_plain(path)
    if not isinstance(content, Mapping) or not all(isinstance(value, Tensor) for value in content.values()):
        ours = isinstance(content, Mapping) and "config" in content
        remedy = "use --start_from to continue from a captioner model" if ours else ""
        raise InputError(f"{path}: not a torchvision state_dict of tensors", remedy=remedy)
    bias = content.get(f"{FC_NAMES[0]}.bias")
    if bias is not None and bias.isnan().all():  # torchvision's "features" file: a classifier that holds nothing
        content = {name: value for name, value in content.items() if not name.startswith("classifier.")}
    known = _recorded_pixels(content)
    if known is None:
        known = "torchvision" if f"{FC_NAMES[0]}.weight" in content else "caffe"
        if told is None:
            log.info("%s: taking its weights for ones of %s pixels (--cnn_pixels says otherwise)", path, known)
    return content, known


def _recorded_pixels(state: Arrays) -> Pixels | None:
    metadata: Any = getattr(state, "_metadata", None)
    module = metadata.get("") if isinstance(metadata, dict) else None
    pixels = module.get(PIXELS_KEY) if isinstance(module, dict) else None
    return pixels if pixels in PIXELS else None


def _check(source: str, state: Arrays, cnn_layer: CnnLayer, pixels: Pixels) -> CnnWeights:
    wanted = CONV_NAMES + (FC_NAMES if cnn_layer == "fc7" else ())
    known = {f"{name}.{kind}" for name in (*CONV_NAMES, *FC_NAMES, CLASSES_NAME) for kind in ("weight", "bias")}
    unknown = sorted(state.keys() - known)
    if unknown:
        raise InputError(
            f"{source}: entry {unknown[0]} is not one of VGG16's",
            expected="torchvision's vgg16 (without batch normalisation)",
        )
    if cnn_layer == "fc7" and not any(name.startswith("classifier.") for name in state):
        raise InputError(
            f"{source}: holds the convolutions only, and the fc7 head needs fc6 and fc7 too",
            remedy="use --cnn_layer pool5, or a file with the classifier",
        )
    checked: dict[str, Tensor] = {}
    inputs, widths = 3, []
    for name in wanted:
        missing = [kind for kind in ("weight", "bias") if f"{name}.{kind}" not in state]
        if missing:
            raise InputError(f"{source}: {name}.{missing[0]} is missing", remedy="the file is incomplete")
        weight, bias = state[f"{name}.weight"], state[f"{name}.bias"]
        if name in CONV_NAMES:
            kernel: tuple[int, ...] = (inputs, 3, 3)
        else:
            kernel = (inputs * LAST_GRID**2,) if name == FC_NAMES[0] else (inputs,)
        if weight.shape[1:] != kernel or bias.shape != weight.shape[:1]:
            raise InputError(
                f"{source}: {name} has weights {tuple(weight.shape)} and biases {tuple(bias.shape)}",
                expected=f"({', '.join(['OUT', *map(str, kernel)])}) and (OUT)",
            )
        for kind, values in (("weight", weight), ("bias", bias)):
            if not _finite(values):
                raise InputError(
                    f"{source}: {name}.{kind} holds values that are not finite numbers",
                    remedy="the weights are damaged; take another file",
                )
            checked[f"{name}.{kind}"] = values.float()
        inputs = len(bias)
        widths.append(inputs)
    fc_width = widths[-1] if cnn_layer == "fc7" else None
    if cnn_layer == "fc7" and widths[-2] != widths[-1]:
        raise InputError(f"{source}: fc6 has {widths[-2]} outputs and fc7 {widths[-1]}", expected="equal widths")
    return CnnWeights(checked, tuple(widths[: len(CONV_NAMES)]), fc_width, pixels)


def _finite(values: Tensor) -> bool:
    # By its extremes: torch.isfinite would take as much memory again as fc6, the bulk of VGG16.
    if not values.is_floating_point() or not values.numel():
        return False
    return all(bool(extreme.isfinite()) for extreme in values.aminmax())


def _download() -> Path:
    """torchvision's VGG16 in torch's cache, fetched if it is not there.

    Raises:
        InputError: no network; says which file to put where.
    """
    url = IMAGENET_URL
    path = Path(torch.hub.get_dir()) / "checkpoints" / url.rpartition("/")[2]
    if path.exists():
        return path
    by_hand = f"put {url} at {path}, or name a local file with --cnn_model"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        log.info("fetching %s", url)
        # torch renames only after checking the digits in the name.
        prefix = re.search(r"-([0-9a-f]{8,})\.", path.name)
        torch.hub.download_url_to_file(url, str(path), prefix[1] if prefix else None, progress=sys.stderr.isatty())
    except (urllib.error.URLError, OSError, RuntimeError) as error:  # RuntimeError: another checksum
        raise InputError(f"{url}: the download failed ({error})", remedy=by_hand) from error
    return path
