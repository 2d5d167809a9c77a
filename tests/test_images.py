import io
import json
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from hostile import encoded, exif, make_hostile_folder, photo
from PIL import Image, ImageOps

from captioner.data.crops import crop
from captioner.data.images import decode_for_display, decode_image, read_image
from captioner.data.listing import list_images
from captioner.errors import InputError


def pillow_bilinear(picture: Image.Image) -> np.ndarray:
    return np.asarray(picture.convert("RGB").resize((256, 256), Image.Resampling.BILINEAR)).transpose(2, 0, 1)


def difference(first: np.ndarray, second: np.ndarray) -> float:
    return float(np.abs(first.astype(int) - second.astype(int)).mean())


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, bool]]:
    folder = tmp_path_factory.mktemp("hostile")
    return folder, make_hostile_folder(folder)


def test_each_hostile_file_is_read_or_refused_with_a_reason(hostile: tuple[Path, dict[str, bool]]) -> None:
    folder, expected = hostile
    for name, usable in expected.items():
        began = time.monotonic()
        if usable:
            pixels = read_image(folder / name)
            assert (pixels.shape, pixels.dtype) == ((3, 256, 256), np.uint8), name
            assert pixels.flags.c_contiguous
        else:
            with pytest.raises(InputError) as caught:
                read_image(folder / name)
            message = str(caught.value)
            assert str(folder / name) in message and len(message) > len(str(folder / name)) + 5
            assert "0x" not in message, "an address would differ from run to run"
        assert time.monotonic() - began < 20, name


def test_every_hostile_file_is_listed(hostile: tuple[Path, dict[str, bool]]) -> None:
    folder, expected = hostile
    assert {path.name for path in list_images(folder)} == set(expected)


@pytest.mark.parametrize("size", [(400, 300), (300, 400)])
@pytest.mark.parametrize("turned", [1, 6])
def test_crop_keeps_the_middle_and_pad_keeps_all(size: tuple[int, int], turned: int) -> None:
    """Against Pillow, upright first and then cut or framed."""
    picture = photo(*size)
    data = encoded(picture, "PNG", exif=exif(turned))
    upright = ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB")
    width, height = upright.size
    box = ((width - 300) // 2, (height - 300) // 2, (width + 300) // 2, (height + 300) // 2)
    assert difference(decode_image(data, image_mode="crop"), pillow_bilinear(upright.crop(box))) < 0.6
    inner = upright.resize((256 * width // 400, 256 * height // 400), Image.Resampling.BILINEAR)
    padded = Image.new("RGB", (256, 256), (124, 117, 104))
    padded.paste(inner, ((256 - inner.width) // 2, (256 - inner.height) // 2))
    assert difference(decode_image(data, image_mode="pad"), np.asarray(padded).transpose(2, 0, 1)) < 0.6
    grey = encoded(picture.convert("L"), "PNG")
    assert decode_image(grey, image_mode="pad").shape == (3, 256, 256)


def test_stored_size_comes_through_untouched() -> None:
    noise = np.random.default_rng(0).integers(0, 256, (256, 256, 3), dtype=np.uint8)
    assert np.array_equal(decode_image(encoded(Image.fromarray(noise), "PNG")).transpose(1, 2, 0), noise)
    jpeg = encoded(Image.fromarray(noise), "JPEG", quality=95)
    assert np.array_equal(decode_image(jpeg).transpose(1, 2, 0), np.asarray(Image.open(io.BytesIO(jpeg))))


@pytest.mark.parametrize("size", [(500, 375), (100, 180), (1023, 300), (2100, 1500), (4000, 3000)])
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_jpegs_are_within_a_grey_level_of_pillow(size: tuple[int, int], mode: str) -> None:
    jpeg = encoded(photo(*size).convert(mode), "JPEG", quality=85)
    assert difference(decode_image(jpeg), pillow_bilinear(Image.open(io.BytesIO(jpeg)))) < 0.5


@pytest.mark.parametrize("size", [(500, 375), (1025, 1024), (2051, 2047), (4099, 4111)])
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_the_fast_decoder_gives_pillows_pixels(
    size: tuple[int, int], mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    jpeg = encoded(photo(*size).convert(mode), "JPEG", quality=85)
    fast = decode_image(jpeg)
    monkeypatch.setitem(sys.modules, "simplejpeg", None)  # as on a platform that has no wheel of it
    assert np.array_equal(decode_image(jpeg), fast)


def test_photos_are_within_a_grey_level_of_pillow(shared: Path) -> None:
    photos = sorted((shared / "data/flickr8k_originals/images").iterdir())[:10]
    assert np.mean([difference(read_image(path), pillow_bilinear(Image.open(path))) for path in photos]) < 0.2


def test_distance_to_the_original_scaling(reference: Path) -> None:
    """torch/image averages areas when shrinking and aligns corners when enlarging; Pillow uses a triangle and
    aligns edges. The distance is pinned, so that a change of filter does not go unseen."""
    theirs = np.load(reference / "resize.npz")
    limits = {"in_1_240x320": 0.4, "in_2_410x300": 0.5, "in_3_100x180": 0.9, "in_4_256x512": 0.1}
    for name in theirs:
        assert difference(read_image(reference / "resize" / f"{name}.png"), theirs[name]) < limits[name]


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("size", [(320, 240), (2400, 1800)])
@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_exif_orientation(orientation: int, size: tuple[int, int], kind: str) -> None:
    data = encoded(photo(*size), kind, exif=exif(orientation))
    upright = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
    assert difference(decode_image(data), pillow_bilinear(upright)) < 0.5


def test_transparency_over_white() -> None:
    assert decode_image(encoded(Image.new("RGBA", (40, 30), (200, 0, 0, 0)), "PNG")).min() == 255
    half = decode_image(encoded(Image.new("RGBA", (40, 30), (200, 0, 0, 128)), "PNG"))
    assert np.abs(half[:, 0, 0].astype(int) - [227, 127, 127]).max() <= 1
    palette = Image.new("P", (8, 8), 0)
    palette.putpalette([10, 20, 30, 40, 50, 60])
    assert decode_image(encoded(palette, "PNG", transparency=0)).min() == 255
    assert decode_image(encoded(palette, "GIF", transparency=0)).min() == 255


def test_sixteen_bits_keep_their_range() -> None:
    ramp = np.tile(np.linspace(0, 65535, 256).astype(np.uint16), (256, 1))
    pixels = decode_image(encoded(Image.fromarray(ramp), "PNG"))
    assert np.abs(pixels[0, 0].astype(int) - np.arange(256)).max() <= 1
    assert np.array_equal(pixels[0], pixels[2])


def test_floats_and_first_frames() -> None:
    ramp = np.tile(np.linspace(0, 1, 256, dtype=np.float32), (256, 1))
    assert np.abs(decode_image(encoded(Image.fromarray(ramp), "TIFF"))[1, 9].astype(int) - np.arange(256)).max() <= 1
    first, second = Image.new("RGB", (9, 9), (255, 0, 0)), Image.new("RGB", (9, 9), (0, 0, 255))
    animated = encoded(first, "GIF", save_all=True, append_images=[second])
    assert decode_image(animated)[:, 100, 100].tolist() == [255, 0, 0]


def test_heic_needs_its_extra() -> None:
    try:
        import pillow_heif
    except ImportError:
        with pytest.raises(InputError, match=r"captioner\[heic\]"):
            decode_image(b"\0\0\0\x18ftypheic" + bytes(100))
    else:
        buffer = io.BytesIO()
        pillow_heif.from_pillow(photo()).save(buffer)
        assert difference(decode_image(buffer.getvalue()), pillow_bilinear(photo())) < 8


def test_pictures_for_display_keep_their_aspect(hostile: tuple[Path, dict[str, bool]]) -> None:
    folder, expected = hostile
    for name in (
        "plain.jpg",
        "one_row.jpg",
        "tiny.jpg",
        "twelve_megapixels.jpg",
        "orientation6.jpg",
        "grey16.png",
        "ascii.pgm",
        "la.png",
    ):
        picture = decode_for_display((folder / name).read_bytes(), 200)
        picture.tobytes()  # read, and not only promised
        assert picture.mode in ("RGB", "L") and max(picture.size) <= 200 and min(picture.size) >= 1
    assert decode_for_display((folder / "orientation6.jpg").read_bytes(), 200).size == (150, 200)
    with pytest.raises(InputError):
        decode_for_display((folder / "cut_half.jpg").read_bytes(), 200)


def test_a_folder_in_natural_order(tmp_path: Path) -> None:
    jpeg = encoded(photo(20, 20), "JPEG")
    for name in ("img10.jpg", "img2.jpg", "IMG1.JPG", "sub/img3.jpg", ".thumbs/a.jpg", "._img2.jpg", "b", "notes.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"text" if name == "notes.txt" else jpeg)
    (tmp_path / "sub" / "deeper.png").mkdir()
    flat = [path.relative_to(tmp_path).as_posix() for path in list_images(tmp_path)]
    assert flat == ["b", "IMG1.JPG", "img2.jpg", "img10.jpg"]
    deep = [path.relative_to(tmp_path).as_posix() for path in list_images(tmp_path, recursive=True)]
    assert deep == ["b", "IMG1.JPG", "img2.jpg", "img10.jpg", "sub/img3.jpg"]
    with pytest.raises(InputError, match="nowhere"):
        list_images(tmp_path / "nowhere")


def test_crops() -> None:
    images = torch.randint(0, 256, (5, 3, 256, 256), dtype=torch.uint8)
    assert torch.equal(crop(images), images[:, :, 15:239, 15:239])
    offsets = torch.tensor([[0, 0], [31, 31], [0, 31], [7, 19], [15, 15]])
    cropped = crop(images, offsets)
    assert (cropped.shape, cropped.dtype) == ((5, 3, 224, 224), torch.uint8)
    for index, (row, column) in enumerate(offsets.tolist()):
        assert torch.equal(cropped[index], images[index, :, row : row + 224, column : column + 224])


def test_centre_crop_is_the_originals(reference: Path) -> None:
    theirs = json.loads((reference / "prepro.json").read_text())
    for name, entry in zip(theirs["files"], theirs["prepro"], strict=True):
        pixels = torch.from_numpy(read_image(reference / name))[None]
        mean = crop(pixels)[0].double().mean((1, 2))
        for channel, shift in enumerate((123.68, 116.779, 103.939)):
            assert float(mean[channel]) - shift == pytest.approx(entry["channels"][channel]["mean"], abs=1e-3), name
