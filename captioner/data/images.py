"""Any image file → (3, 256, 256) uint8 RGB.

The content decides what a file is, never its name. EXIF orientation is applied, transparency is laid over
white, grey is replicated, and only the first frame of an animation counts. Everything becomes a square: squashed
as in the original, or its middle square, or whole with a border, with an antialiased bilinear filter (Pillow's); a
256×256 picture comes through untouched.
"""

import contextlib
import io
import os
import stat
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image, ImageFile, UnidentifiedImageError

from captioner.data.crops import IMAGE_SIZE
from captioner.data.image_formats import SAME_FORMAT, describe_unknown, known_formats, usual_formats
from captioner.data.image_mode import ImageMode
from captioner.data.parquet_files import read_row
from captioner.data.tar_files import read_member
from captioner.errors import InputError
from captioner.runtime.quantities import bytes_text
from captioner.runtime.regular_files import open_regular

# Refused beyond these: a file that is no photo, or one that unpacks to gigabytes.
MAX_FILE_BYTES = 512 * 2**20
MAX_PIXELS = 178_000_000

READING_RULES = 2  # to be raised when the same file would give other pixels: partial datasets are not continued then

# JPEGs whose shorter side is at least twice this are decoded at 1/2, 1/4 or 1/8 (a DCT property), but never
# below this: beyond twice the final size the filter makes the loss invisible (0.2 grey levels on average; an eighth
# of 12 megapixels instead of a quarter would save a seventh of the time, but costs 0.6, and up to 1.4).
_DRAFT_SIDE = 2 * IMAGE_SIZE

_BORDER = (124, 117, 104)  # of padded pictures: ImageNet's mean, next to nothing for a CNN once it is subtracted

_REDUCED_PIXELS = 40_000_000  # beyond this other formats are made smaller in the same way

# EXIF orientation → what makes it upright (Exif 2.32, tag 0x0112).
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_EXIF_ORIENTATION = 0x0112


def read_image(path: str | Path, image_mode: ImageMode = "squash") -> np.ndarray:
    """Read any picture as uint8 RGB of shape (3, 256, 256), C-contiguous.

    Args:
        image_mode: "squash" changes the aspect, "crop" keeps the middle square, "pad" adds a border of ImageNet's mean.

    Raises:
        InputError: the file cannot be used, with the reason.
    """
    data = read_file(path)
    try:
        return decode_image(data, image_mode=image_mode)
    except InputError as error:
        raise InputError(f"{path}: {error.problem}", expected=error.expected, remedy=error.remedy) from error


def read_file(path: str | Path) -> bytes:
    """The bytes of a regular file of sensible size, also of one inside a tar archive or Parquet file (see `tar_files`,
    `parquet_files`); pipes, devices and folders are refused unopened.

    Raises:
        InputError: with the reason.
    """
    try:
        # Looked at before it is opened: to open a device can do things, to open a pipe waits for a writer.
        status = os.stat(path)
        if not stat.S_ISREG(status.st_mode):
            raise InputError(f"{path}: is {_kind_of_file(status.st_mode)}, not a picture")
        if status.st_size > MAX_FILE_BYTES:
            raise InputError(
                f"{path}: holds {bytes_text(status.st_size)}", expected=f"at most {bytes_text(MAX_FILE_BYTES)}"
            )
        with open_regular(path) as stream:
            data = stream.read(status.st_size)  # no more, even if it grows
    except (FileNotFoundError, NotADirectoryError):
        data = _read_from_archive(path)
    except (OSError, ValueError) as error:  # ValueError: a null character in the name
        reason = getattr(error, "strerror", None) or str(error)
        raise InputError(f"{path}: cannot be read ({reason})") from error
    if not data:
        raise InputError(f"{path}: is empty")
    return data


def _read_from_archive(path: str | Path) -> bytes:
    """A file that is none by itself: inside a shard, or missing."""
    try:
        data = read_member(str(path), MAX_FILE_BYTES)
        if data is None:
            data = read_row(str(path), MAX_FILE_BYTES)
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror or error})") from error
    if data is None:
        reason = "is a link to a file that does not exist" if os.path.islink(path) else "no such file"
        raise InputError(f"{path}: {reason}") from None
    return data


def decode_image(data: bytes, max_pixels: int = MAX_PIXELS, image_mode: ImageMode = "squash") -> np.ndarray:
    """Decode the bytes of a picture file, of `max_pixels` at most, as uint8 RGB of shape (3, 256, 256).

    Raises:
        InputError: they cannot be decoded, with the reason.
    """
    with _opened(data, max_pixels) as image:
        return _decode(image, data, image_mode)


def square(image: Image.Image, image_mode: ImageMode = "squash") -> np.ndarray:
    """A picture that Pillow has opened or made as uint8 RGB of shape (3, 256, 256); `image` itself stays as it is.

    Raises:
        InputError: it is too large, or its file is damaged.
    """
    with _decoder_errors():
        _require_sensible_size(image)
        return _decode(image, None, image_mode)


def decode_for_display(data: bytes, longest_side: int) -> Image.Image:
    """Decode the bytes of a picture file as people want to see it: upright, "RGB" or "L", its own aspect, and no side
    longer than `longest_side` pixels.

    Raises:
        InputError: they cannot be decoded, with the reason.
    """
    with _opened(data) as image:
        orientation = image.getexif().get(_EXIF_ORIENTATION) if _may_have_exif(image) else None
        scale = min(1.0, longest_side / max(image.size))
        image.draft(
            None, (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
        )  # JPEG: decodes less
        picture = _flatten(image)
        picture.thumbnail((longest_side, longest_side))
        upright = _UPRIGHT.get(orientation) if isinstance(orientation, int) else None
        return picture if upright is None else picture.transpose(upright)


def format_of(path: str | Path) -> str:
    """What the content of a picture file is: "JPEG", "PNG", ..

    Raises:
        InputError: it is no picture.
    """
    with _opened(read_file(path)) as image:
        return SAME_FORMAT.get(str(image.format), str(image.format))


def misnamed(path: Path) -> str | None:
    """What the content of a readable picture is ("JPEG"), if its name says something else."""
    if not path.suffix:
        return None
    expected = usual_formats(path.suffix)
    try:
        found = format_of(path)
    except InputError:
        return None
    return None if found in expected else found


@contextlib.contextmanager
def _opened(data: bytes, max_pixels: int = MAX_PIXELS) -> Iterator[ImageFile.ImageFile]:
    """The picture in `data`, not too large; whatever goes wrong with it in the block becomes an InputError."""
    with _decoder_errors():
        try:
            image = Image.open(io.BytesIO(data), formats=known_formats())
        except UnidentifiedImageError:
            raise InputError(describe_unknown(data)) from None
        with image:
            _require_sensible_size(image, max_pixels)
            yield image


def _require_sensible_size(image: Image.Image, max_pixels: int = MAX_PIXELS) -> None:
    if image.width * image.height > max_pixels:
        raise InputError(
            f"{image.format or 'a picture'} of {image.width}×{image.height} pixels is too large",
            expected=f"at most {max_pixels:,} pixels",
        )


@contextlib.contextmanager
def _decoder_errors() -> Iterator[None]:
    """Whatever goes wrong with a picture in the block becomes an InputError."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # damaged metadata and the like: either the pixels come or an error
            yield
    except InputError:
        raise
    except MemoryError:
        raise InputError("needs more memory than there is") from None
    except Exception as error:  # foreign decoders on damaged bytes raise anything: struct.error, KeyError, ..
        raise InputError(_describe_failure(error)) from error


def _decode(image: Image.Image, data: bytes | None, image_mode: ImageMode) -> np.ndarray:
    """`data` is the file's; without it nothing is done to `image` that would change it for its owner."""
    width, height = image.size
    orientation = image.getexif().get(_EXIF_ORIENTATION) if _may_have_exif(image) else None
    pixels = None
    if data is not None and image.format in ("JPEG", "MPO"):
        least = _least_size(width, height)
        if image.mode in ("RGB", "L") and image.size != (IMAGE_SIZE, IMAGE_SIZE):
            pixels = _decode_jpeg_fast(data, image.mode, least)
        if pixels is None:
            image.draft(None, least)
    if pixels is None:
        flat = _flatten(image)
        factor = min(flat.size) // _DRAFT_SIDE
        if factor > 1 and flat.width * flat.height > _REDUCED_PIXELS:
            flat = flat.reduce(factor)  # averages squares, as a JPEG's draft does; saves a gigabyte
        pixels = np.atleast_3d(np.asarray(flat)).transpose(2, 0, 1)
    pixels = _made_square(pixels, image_mode)
    upright = _UPRIGHT.get(orientation) if isinstance(orientation, int) else None
    if upright is not None:
        # The picture is a square now, and turning it is cheap.
        turned = Image.fromarray(np.ascontiguousarray(pixels.transpose(1, 2, 0))).transpose(upright)
        pixels = np.asarray(turned).transpose(2, 0, 1)
    return np.ascontiguousarray(pixels)


def _may_have_exif(image: Image.Image) -> bool:
    """Looking is slow where there is none: JPEGs without an Exif segment are the common case."""
    return image.format not in ("JPEG", "MPO") or "exif" in image.info


def _least_size(width: int, height: int) -> tuple[int, int]:
    """Width and height that a JPEG is to be decoded at, at least: its own, or a half, a quarter or an eighth."""
    reduction = next((factor for factor in (8, 4, 2) if min(width, height) >= factor * _DRAFT_SIDE), 1)
    return width // reduction, height // reduction


def _decode_jpeg_fast(data: bytes, mode: str, size: tuple[int, int]) -> np.ndarray | None:
    """A JPEG of `mode` "RGB" or "L" as uint8 (1 or 3, height, width); None: let Pillow judge the file.

    The same library as Pillow's and the same pixels, without Pillow's detour over four bytes a pixel.
    """
    try:
        import simplejpeg

        width, height = size
        colours = "RGB" if mode == "RGB" else "GRAY"
        pixels = simplejpeg.decode_jpeg(data, colorspace=colours, min_width=width, min_height=height)
    except (ValueError, ImportError):  # damaged in some way, or a platform for which simplejpeg has no wheel
        return None
    return pixels.transpose(2, 0, 1)


def _made_square(pixels: np.ndarray, image_mode: ImageMode) -> np.ndarray:
    """uint8 (1 or 3, height, width) → (3, 256, 256)."""
    height, width = pixels.shape[1:]
    if image_mode == "pad" and height != width:
        scale = IMAGE_SIZE / max(height, width)
        inner = _resized(pixels, max(1, round(height * scale)), max(1, round(width * scale)))
        top, left = (IMAGE_SIZE - inner.shape[1]) // 2, (IMAGE_SIZE - inner.shape[2]) // 2
        padded = np.empty((3, IMAGE_SIZE, IMAGE_SIZE), np.uint8)
        padded[:] = np.array(_BORDER, np.uint8).reshape(3, 1, 1)
        padded[:, top : top + inner.shape[1], left : left + inner.shape[2]] = inner
        return padded
    if image_mode == "crop":
        side = min(height, width)
        top, left = (height - side) // 2, (width - side) // 2
        pixels = pixels[:, top : top + side, left : left + side]
    return np.broadcast_to(_resized(pixels, IMAGE_SIZE, IMAGE_SIZE), (3, IMAGE_SIZE, IMAGE_SIZE))


def _resized(pixels: np.ndarray, height: int, width: int) -> np.ndarray:
    """torch's antialiased filter is Pillow's, in SIMD."""
    if pixels.shape[1:] == (height, width):
        return pixels
    import torch
    from torch.nn.functional import interpolate

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the array is read-only, but nothing writes to it
        batch = torch.from_numpy(pixels)[None]
    return interpolate(batch, (height, width), mode="bilinear", antialias=True, align_corners=False)[0].numpy()


def _flatten(image: Image.Image) -> Image.Image:
    """Any mode → "L" or "RGB", with transparency over white."""
    if image.mode in ("I;16", "I;16L", "I;16B", "I", "F"):
        return _eight_bits(image)
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        foreground = image.convert("RGBA")
        background = Image.new("RGBA", image.size, (255, 255, 255, 255))
        return Image.alpha_composite(background, foreground).convert("RGB")
    if image.mode in ("L", "RGB"):
        image.load()  # while its file is open
        return image
    return image.convert("L" if image.mode == "1" else "RGB")


def _eight_bits(image: Image.Image) -> Image.Image:
    """Grey of more than 8 bits → "L" (Pillow would clip at 255).

    Integers of 16 bits keep their high byte. Floats and 32-bit integers have no agreed white: up to 1 means
    0..1 for floats, up to 255 means 0..255, up to 65535 means 16 bits, beyond that the brightest is white.
    """
    values = np.asarray(image)
    if values.dtype.kind == "f":
        values = np.nan_to_num(values, nan=0.0, posinf=0.0, neginf=0.0)
    brightest = values.max()
    if values.dtype.itemsize == 2 or (image.format in ("PNG", "PPM") and image.mode == "I"):
        white = 65535.0
    elif values.dtype.kind == "f" and brightest <= 1:
        white = 1.0
    else:
        white = next((limit for limit in (255.0, 65535.0) if brightest <= limit), float(brightest))
    scaled = np.clip(values.astype(np.float32) * np.float32(255 / white), 0, 255)
    return Image.fromarray(np.rint(scaled).astype(np.uint8))


def _kind_of_file(mode: int) -> str:
    for is_kind, name in (
        (stat.S_ISDIR, "a folder"),
        (stat.S_ISFIFO, "a named pipe"),
        (stat.S_ISSOCK, "a socket"),
        (stat.S_ISCHR, "a device"),
        (stat.S_ISBLK, "a device"),
    ):
        if is_kind(mode):
            return name
    return "no regular file"


def _describe_failure(error: Exception) -> str:
    if isinstance(error, Image.DecompressionBombError):
        return f"is too large: more than {MAX_PIXELS:,} pixels"
    reason = str(error)
    if isinstance(error, SyntaxError | ValueError | OSError) and reason and "0x" not in reason:
        return f"is damaged ({reason})"
    return f"is damaged ({type(error).__name__} while decoding)"
