"""A folder of some seventy files as mean as those that people have: readable ones in odd forms, and the rest.

`make_hostile_folder` returns for each file name whether it is a picture that can be used.
"""

import io
import os
import socket
import struct
import zlib
from pathlib import Path

import numpy as np
from PIL import Image


def photo(width: int = 320, height: int = 240, seed: int = 0) -> Image.Image:
    """Smooth colours with a bright corner at the top left, so that turning it shows."""
    rng = np.random.default_rng(seed)
    small = Image.fromarray(rng.integers(0, 256, (6, 8, 3), dtype=np.uint8).astype(np.uint8))
    picture = small.resize((width, height), Image.Resampling.BICUBIC)
    picture.paste((255, 255, 0), (0, 0, max(1, width // 4), max(1, height // 4)))
    return picture


def encoded(picture: Image.Image, kind: str, **options: object) -> bytes:
    stream = io.BytesIO()
    picture.save(stream, kind, **options)
    return stream.getvalue()


def png_chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width: int, height: int, rows: bytes, depth: int = 8, colour: int = 2) -> bytes:
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + png_chunk(b"IHDR", header)
        + png_chunk(b"IDAT", zlib.compress(rows, 9))
        + png_chunk(b"IEND", b"")
    )


def exif(orientation: int) -> Image.Exif:
    data = Image.Exif()
    data[0x0112] = orientation
    return data


def _good() -> dict[str, bytes]:
    base = photo()
    jpeg = encoded(base, "JPEG", quality=90)
    grey16 = np.linspace(0, 65535, 64 * 48, dtype=np.uint16).reshape(48, 64)
    rgb16 = b"".join(b"\0" + row.tobytes() for row in np.full((5, 7, 3), 40000, ">u2"))
    palette = base.convert("P", palette=Image.Palette.ADAPTIVE)
    frames = [photo(seed=seed).convert("P") for seed in range(3)]
    files = {
        "plain.jpg": jpeg,
        "progressive.jpg": encoded(base, "JPEG", progressive=True),
        "grey.jpg": encoded(base.convert("L"), "JPEG"),
        "cmyk.jpg": encoded(base.convert("CMYK"), "JPEG"),
        "twelve_megapixels.jpg": encoded(photo(4000, 3000), "JPEG", quality=60),
        "tiny.jpg": encoded(photo(1, 1), "JPEG"),
        "one_row.jpg": encoded(photo(3000, 1), "JPEG"),
        "subsampled.jpg": encoded(base, "JPEG", subsampling=2),
        "trailing_garbage.jpg": jpeg + b"\0garbage" * 100,
        "broken_exif.jpg": jpeg[:2] + b"\xff\xe1\x00\x10Exif\0\0MM\0*\xff\xff\xff\xff" + jpeg[2:],
        "uppercase.JPG": jpeg,
        "no_extension": jpeg,
        "jpeg_called.png": jpeg,
        "gif_called.jpg": encoded(base.convert("P"), "GIF"),
        "png_called.txt": encoded(base, "PNG"),
        "dots.in.name..jpg": jpeg,
        "space and 'quotes' \"both\".jpg": jpeg,
        "-dash.jpg": jpeg,
        "$(touch hacked);`x`.jpg": jpeg,
        "ünïcödé_照片_🐶.jpg": jpeg,
        "newline\nin name.jpg": jpeg,
        "percent%20%s.jpg": jpeg,
        "a" * 240 + ".jpg": jpeg,
        "rgb.png": encoded(base, "PNG"),
        "rgba.png": encoded(base.convert("RGBA"), "PNG"),
        "transparent.png": encoded(Image.new("RGBA", (50, 40), (200, 0, 0, 0)), "PNG"),
        "la.png": encoded(base.convert("LA"), "PNG"),
        "palette.png": encoded(palette, "PNG"),
        "palette_transparent.png": encoded(palette, "PNG", transparency=3),
        "one_bit.png": encoded(base.convert("1"), "PNG"),
        "grey16.png": encoded(Image.fromarray(grey16), "PNG"),
        "rgb16.png": png(7, 5, rgb16, depth=16),
        "interlaced.png": _interlaced_png(),
        "stored256.png": encoded(photo(256, 256), "PNG"),
        "photo.webp": encoded(base, "WEBP", quality=80),
        "lossless_alpha.webp": encoded(base.convert("RGBA"), "WEBP", lossless=True),
        "photo.bmp": encoded(base, "BMP"),
        "photo.tiff": encoded(base, "TIFF", compression="tiff_lzw"),
        "grey16.tif": encoded(Image.fromarray(grey16), "TIFF"),
        "float.tif": encoded(Image.fromarray(np.linspace(0, 1, 600, dtype=np.float32).reshape(20, 30)), "TIFF"),
        "cmyk.tif": encoded(base.convert("CMYK"), "TIFF"),
        "animated.gif": encoded(frames[0], "GIF", save_all=True, append_images=frames[1:]),
        "photo.ppm": encoded(base, "PPM"),
        "ascii.pgm": b"P2 4 2 255\n" + b" ".join(str(30 * i).encode() for i in range(8)),
    }
    for orientation in range(2, 9):
        files[f"orientation{orientation}.jpg"] = encoded(base, "JPEG", exif=exif(orientation))
    files["orientation_nonsense.jpg"] = encoded(base, "JPEG", exif=exif(77))
    files["orientation6.png"] = encoded(base, "PNG", exif=exif(6))
    return files


def _interlaced_png() -> bytes:
    """Adam7 of a 1×1 picture: one pass with one pixel."""
    data = png(1, 1, b"\0\x10\x80\xf0")
    header = struct.pack(">IIBBBBB", 1, 1, 8, 2, 0, 0, 1)
    return data[:8] + png_chunk(b"IHDR", header) + data[8 + 25 :]


def _bad() -> dict[str, bytes]:
    jpeg = encoded(photo(), "JPEG", quality=90)
    flat_png = encoded(photo(), "PNG")
    return {
        "empty.jpg": b"",
        "zeros.jpg": bytes(5000),
        "cut_half.jpg": jpeg[: len(jpeg) // 2],
        "cut_header.jpg": jpeg[:30],
        "only_start.jpg": jpeg[:3],
        "cut.png": flat_png[: len(flat_png) // 2],
        "bad_checksum.png": flat_png[:60] + bytes([flat_png[60] ^ 255]) + flat_png[61:],
        "cut.webp": encoded(photo(), "WEBP")[:200],
        "cut.gif": encoded(photo().convert("P"), "GIF")[:300],
        "cut.bmp": encoded(photo(), "BMP")[:1000],
        "cut.tiff": encoded(photo(), "TIFF")[:100],
        "cut.ppm": encoded(photo(), "PPM")[:1000],
        "text.jpg": b"this is no picture\n",
        "page.jpg": b"<!DOCTYPE html><html><body>404 Not Found</body></html>",
        "drawing.png": b'<?xml version="1.0"?><svg xmlns="http://www.w3.org/2000/svg"/>',
        "paper.jpg": b"%PDF-1.7\n" + bytes(100),
        "script.jpg": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n",
        "archive.png": b"PK\x03\x04" + bytes(50),
        "noise.jpg": np.random.default_rng(1).bytes(4000),
        "bomb.png": png(50_000, 50_000, bytes(1000), depth=1, colour=0),
        "bomb.gif": b"GIF89a"
        + struct.pack("<HH", 65535, 65535)
        + b"\x80\0\0"
        + bytes(6)
        + b",\0\0\0\0\xff\xff\xff\xff\0\2\2D\1\0;",
        "no_pixels.ppm": b"P6 0 0 255\n",
        "huge_header.ppm": b"P6 99999999999 99999999999 255\n",
    }


def make_hostile_folder(folder: Path) -> dict[str, bool]:
    """Fill `folder`; returns {file name: can it be used}."""
    folder.mkdir(parents=True, exist_ok=True)
    expected = {}
    for usable, files in ((True, _good()), (False, _bad())):
        for name, data in files.items():
            (folder / name).write_bytes(data)
            expected[name] = usable
    (folder / "folder.jpg").mkdir()
    os.mkfifo(folder / "pipe.jpg")
    os.symlink("/dev/zero", folder / "endless.jpg")
    os.symlink("nowhere.jpg", folder / "broken_link.jpg")
    os.symlink("loop.jpg", folder / "loop.jpg")
    os.symlink("plain.jpg", folder / "link.jpg")
    with open(folder / "sparse.jpg", "wb") as stream:
        stream.truncate(20 * 2**30)
    listener = socket.socket(socket.AF_UNIX)
    here = os.getcwd()
    try:
        os.chdir(folder)  # the path of a socket may have some 100 characters only
        listener.bind("socket.jpg")
    finally:
        os.chdir(here)
        listener.close()
    expected |= dict.fromkeys(
        ["folder.jpg", "pipe.jpg", "endless.jpg", "broken_link.jpg", "loop.jpg", "sparse.jpg", "socket.jpg"], False
    )
    expected["link.jpg"] = True
    return expected
