"""A picture in whatever form a program has it → (3, 256, 256) uint8 RGB."""

import os
import threading
from collections.abc import Iterable
from pathlib import Path
from typing import TypeAlias, TypeGuard

import numpy as np
from PIL import Image, ImageFile

from captioner.data.image_mode import ImageMode
from captioner.data.images import decode_image, read_image, square
from captioner.errors import InputError

# A file's name; a file's content; what Pillow has opened; or pixels, uint8 (height, width, 3) RGB, (height, width, 4)
# RGBA or (height, width) grey.
ImageLike: TypeAlias = str | os.PathLike[str] | bytes | np.ndarray | Image.Image

# Pillow reads a file when its pixels are first asked for, which two threads must not do to one picture at a time.
_reading = threading.Lock()


def is_image_like(value: object) -> TypeGuard[ImageLike]:
    """Whether this is one picture, not several."""
    return isinstance(value, str | os.PathLike | bytes | bytearray | memoryview | np.ndarray | Image.Image)


def as_list(value: ImageLike | Iterable[ImageLike]) -> list[ImageLike]:
    """One picture or several as a list.

    Raises:
        InputError: it is neither.
    """
    if is_image_like(value):
        return [value]
    if isinstance(value, Iterable):
        return list(value)  # type: ignore[arg-type]  # bytes are Iterable, but one picture
    raise InputError(f"{type(value).__name__} is no picture", expected="a path, bytes, an array or a Pillow image")


def file_name_of(picture: ImageLike) -> str:
    """The path as it was given; "" for what is in memory."""
    return str(Path(picture)) if isinstance(picture, str | os.PathLike) else ""


def read_image_like(picture: ImageLike, image_mode: ImageMode = "squash") -> np.ndarray:
    """Any picture as uint8 RGB of shape (3, 256, 256), C-contiguous; `image_mode` as of `images.read_image`.

    Raises:
        InputError: it cannot be used, with the reason; the message begins with the file's name where it is a file.
    """
    if isinstance(picture, str | os.PathLike):
        return read_image(Path(picture), image_mode)
    if isinstance(picture, bytes | bytearray | memoryview):
        if not picture:
            raise InputError("is empty")
        return decode_image(bytes(picture), image_mode=image_mode)
    if isinstance(picture, np.ndarray):
        return square(_from_array(picture), image_mode)
    if isinstance(picture, ImageFile.ImageFile):
        with _reading:
            return square(picture, image_mode)
    if isinstance(picture, Image.Image):
        return square(picture, image_mode)
    raise InputError(f"{type(picture).__name__} is no picture", expected="a path, bytes, an array or a Pillow image")


def _from_array(pixels: np.ndarray) -> Image.Image:
    known = pixels.ndim == 2 or (pixels.ndim == 3 and pixels.shape[2] in (3, 4))
    if pixels.dtype != np.uint8 or not known or not pixels.size:
        raise InputError(
            f"array of {pixels.dtype} with shape {pixels.shape}",
            expected="uint8 of shape (height, width, 3), (height, width, 4) or (height, width)",
        )
    return Image.fromarray(np.ascontiguousarray(pixels))
