"""Captions as text files beside their photos."""

import logging
from pathlib import Path

from captioner.runtime.files import atomic_write

log = logging.getLogger(__name__)


class Sidecars:
    """photo.jpg → photo.txt.

    Args:
        overwrite: replace files that exist.
    """

    def __init__(self, overwrite: bool = False) -> None:
        self.overwrite = overwrite

    def write(self, photo: Path, caption: str) -> None:
        """Write the caption of a photo, unless its text file exists and is to stay.

        Raises:
            InputError: the file cannot be written.
        """
        path = photo.with_suffix(".txt")
        if path.exists() and not self.overwrite:
            log.warning("kept %s, which exists (--overwrite 1 replaces it)", path)
            return
        with atomic_write(path, "w", encoding="utf-8") as stream:
            stream.write(caption + "\n")
