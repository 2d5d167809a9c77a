"""Mean and standard deviation of pixels, channel by channel, and the mean picture."""

from pathlib import Path

import numpy as np
from PIL import Image, PngImagePlugin

from captioner.data.crops import IMAGE_SIZE
from captioner.runtime.files import atomic_write
from captioner.runtime.outputs import require_output

_MARK = "mean image of caption-prepro"  # in the file, so that nobody else's is replaced


class PixelStatistics:
    """Adds pictures up; exact, in whatever order they come."""

    def __init__(self) -> None:
        self._count = 0
        self._sums = np.zeros((3, IMAGE_SIZE, IMAGE_SIZE), np.uint64)
        self._squares = np.zeros(3, np.uint64)

    def add(self, pixels: np.ndarray) -> None:
        """Take a picture into account, uint8 (3, 256, 256)."""
        self._count += 1
        self._sums += pixels
        rows = pixels.reshape(3, -1).astype(np.uint64)
        self._squares += np.einsum("ij,ij->i", rows, rows)

    def mean_and_deviation(self) -> tuple[np.ndarray, np.ndarray]:
        """Of red, green and blue, in grey levels 0 to 255: float64 (3,) each. There must be a picture."""
        count = self._count * IMAGE_SIZE**2
        mean = self._sums.sum((1, 2)) / count
        return mean, np.sqrt(np.maximum(0.0, self._squares / count - mean**2))

    def mean_image(self) -> np.ndarray:
        """uint8 (3, 256, 256). There must be a picture."""
        return np.rint(self._sums / self._count).astype(np.uint8)

    def figures(self) -> dict[str, list[float]]:
        """Mean and standard deviation for a report; empty without pictures."""
        if not self._count:
            return {}
        mean, deviation = self.mean_and_deviation()
        return {"mean": mean.round(3).tolist(), "standard_deviation": deviation.round(3).tolist()}


def write_mean_image(path: str | Path, pixels: PixelStatistics) -> None:
    """Write the mean picture as PNG; where there is one already, it must be an earlier one.

    Raises:
        InputError: something else is there, or the file cannot be written.
    """
    require_output(path, ["mean image"])
    info = PngImagePlugin.PngInfo()
    info.add_text("Software", _MARK)
    with atomic_write(path, pictures=True) as stream:
        Image.fromarray(pixels.mean_image().transpose(1, 2, 0)).save(stream, "PNG", pnginfo=info)
