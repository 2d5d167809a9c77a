"""Mean and standard deviation of pixels, channel by channel."""

import numpy as np


class PixelStatistics:
    """Adds pictures up; exact, in whatever order they come."""

    def __init__(self) -> None:
        self._count = 0
        self._sums = np.zeros(3, np.uint64)
        self._squares = np.zeros(3, np.uint64)

    def add(self, pixels: np.ndarray) -> None:
        """Take a picture into account, uint8 (3, height, width)."""
        rows = pixels.reshape(3, -1)
        histogram = np.stack([np.bincount(row, minlength=256) for row in rows]).astype(np.uint64)  # (3, 256)
        levels = np.arange(256, dtype=np.uint64)
        self._count += rows.shape[1]
        self._sums += histogram @ levels
        self._squares += histogram @ levels**2

    def mean_and_deviation(self) -> tuple[np.ndarray, np.ndarray]:
        """Of red, green and blue, in grey levels 0 to 255: float64 (3,) each."""
        mean = self._sums / self._count
        return mean, np.sqrt(np.maximum(0.0, self._squares / self._count - mean**2))

    def figures(self) -> dict[str, list[float]]:
        """The same for a report; empty without pictures."""
        if not self._count:
            return {}
        mean, deviation = self.mean_and_deviation()
        return {"mean": mean.round(3).tolist(), "standard_deviation": deviation.round(3).tolist()}
