"""Captions as text files beside their photos."""

import logging
from pathlib import Path

from captioner.errors import InputError
from captioner.runtime.files import atomic_write
from captioner.runtime.outputs import require_replaceable

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
        try:
            require_replaceable(path)
        except InputError as error:  # a picture that is called so, or an input: whatever the user said
            log.warning("kept %s", error)
            return
        with atomic_write(path, "w", encoding="utf-8") as stream:
            stream.write(caption + "\n")
