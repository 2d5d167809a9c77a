"""The formats of pictures: by name, by first bytes, and what a file seems to be that is in none of them."""

import contextlib
import os
import re
import stat

from PIL import Image

# No EPS (runs Ghostscript), no formats without a signature of their own (TGA, raw), no vector graphics.
_FORMATS = ("JPEG", "MPO", "PNG", "WEBP", "BMP", "DIB", "TIFF", "GIF", "PPM", "AVIF", "JPEG2000", "ICO", "HEIF")
_SUFFIXES = frozenset(
    ".jpg .jpeg .jpe .jfif .png .apng .webp .bmp .dib .tif .tiff .gif .ppm .pgm .pbm .pnm .avif .jp2 .j2k .ico"
    " .heic .heif".split()
)
SAME_FORMAT = {"MPO": "JPEG", "DIB": "BMP", "AVIF": "HEIF"}  # kinds that share their endings
_SIGNATURES = re.compile(
    rb"\xff\xd8\xff|\x89PNG\r\n\x1a\n|RIFF....WEBP|BM....\0\0\0\0|II\*\0|MM\0\*|II\+\0|MM\0\+|GIF8[79]a|P[1-6]\s"
    rb"|....ftyp(?:avif|avis|hei[cfxms]|hev[cx]|mif1|msf1)|\0\0\0\x0cjP  |\xff\x4f\xff\x51|\0\0\x01\0[^\0]\0",
    re.DOTALL,
)
_SIGNATURE_BYTES = 16


def usual_formats(suffix: str) -> set[str]:
    """The formats that a file name's ending stands for; empty if it stands for none."""
    _register_heif()
    Image.init()
    name = Image.registered_extensions().get(suffix.lower())
    return {SAME_FORMAT.get(name, name)} if name else set()


def has_image_suffix(name: str) -> bool:
    """Whether a file is called like a picture."""
    return os.path.splitext(name)[1].lower() in _SUFFIXES


def starts_like_image(path: str) -> bool:
    """Whether the first bytes of a regular file are those of a picture; False where they cannot be read."""
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):
            return False
        with open(path, "rb") as stream:
            return _SIGNATURES.match(stream.read(_SIGNATURE_BYTES)) is not None
    except OSError:
        return False


def known_formats() -> list[str]:
    """Names of the formats that pictures may have, by Pillow; it knows them from now on."""
    _register_heif()
    Image.init()
    return [name for name in _FORMATS if name in Image.OPEN]


def describe_unknown(data: bytes) -> str:
    """What a file that no decoder knows seems to be."""
    start = data[:512].lstrip()
    lowered = start.lower()
    if re.match(rb"....ftyp(?:hei|hev|mif1|msf1)", data[:12], re.DOTALL):
        return 'is a HEIC picture, which needs: pip install "captioner[heic]"'
    if lowered.startswith((b"<!doctype html", b"<html")):
        return "is a web page, not a picture"
    if lowered.startswith(b"<svg") or (lowered.startswith(b"<?xml") and b"<svg" in lowered):
        return "is an SVG drawing, which is not supported"
    if start.startswith((b"%PDF", b"%!PS")):
        return "is a PDF or PostScript document, not a picture"
    if start.startswith((b"PK\x03\x04", b"\x1f\x8b", b"7z\xbc\xaf", b"Rar!")):
        return "is an archive, not a picture"
    if _SIGNATURES.match(data[:_SIGNATURE_BYTES]):
        return "starts like a picture, but its header is damaged"
    if not start.strip(b"\0"):
        return "holds only zeros or blanks"
    if all(byte >= 0x20 or byte in b"\t\n\r\f" for byte in start):
        return "is text, not a picture"
    return "is not a picture in a known format"


_heif_registered = False


def _register_heif() -> None:
    """HEIC needs the extra package `pillow-heif`; without it such files are refused with that hint."""
    global _heif_registered
    if not _heif_registered:
        _heif_registered = True
        with contextlib.suppress(ImportError):
            import pillow_heif

            pillow_heif.register_heif_opener()
