"""Captions as text files beside their photos."""

import logging
from pathlib import Path
from typing import Literal

from captioner.data.image_formats import has_image_suffix
from captioner.errors import InputError
from captioner.runtime.files import atomic_write, read_small, require_replaceable

log = logging.getLogger(__name__)

LONGEST_EXTENSION = 50

Existing = Literal["keep", "replace", "append", "prepend"]


class Sidecars:
    """photo.jpg → photo.txt, with one caption in it.

    Args:
        extension: of the text files, with its dot.
        prefix, suffix: written before and after each caption, as they are.
        existing: what becomes of a text file that is there: it is kept, replaced, or the caption becomes its last or
            first line, unless it is one of its lines already. A file without text does not count.

    Raises:
        InputError: the extension is none.
    """

    def __init__(
        self, extension: str = ".txt", prefix: str = "", suffix: str = "", existing: Existing = "keep"
    ) -> None:
        self.extension = extension if extension.startswith(".") else f".{extension}"
        odd = set("/\\") & set(self.extension) or not self.extension.isprintable() or self.extension.endswith(".")
        if odd or len(self.extension) > LONGEST_EXTENSION or has_image_suffix(f"a{self.extension}"):
            raise InputError(f"--txt_extension {extension!r}", expected="an ending of text files, as .txt or .caption")
        self.prefix, self.suffix, self.existing = prefix, suffix, existing
        self._photo_of: dict[Path, Path] = {}  # of each file written in this run

    def path_of(self, photo: Path) -> Path:
        """The text file of a photo."""
        return photo.with_suffix(self.extension)

    def is_captioned(self, photo: Path) -> bool:
        """Whether the photo's text file is there, with text in it."""
        try:
            return read_small(self.path_of(photo)).strip() != b""
        except OSError:
            return False

    def write(self, photo: Path, caption: str) -> None:
        """Write the caption of a photo. What stays as it is, because it is there or another photo's, is logged.

        Raises:
            InputError: the file cannot be written.
        """
        path = self.path_of(photo)
        owner = self._photo_of.setdefault(path, photo)
        if owner != photo:
            log.warning("%s gets no text file: %s is that of %s", photo, path.name, owner.name)
            return
        lines = [f"{self.prefix}{caption}{self.suffix}"]
        if self.is_captioned(photo) and self.existing != "replace":
            if self.existing == "keep":
                log.warning("kept %s, which exists (--overwrite 1 replaces it)", path)
                return
            try:
                there = read_small(path).decode("utf-8").splitlines()
            except (OSError, UnicodeDecodeError) as error:
                log.warning("kept %s, which is no UTF-8 text (%s)", path, error)
                return
            if lines[0] in there:
                return
            lines = [*there, *lines] if self.existing == "append" else [*lines, *there]
        try:
            require_replaceable(path)
        except InputError as error:  # a picture that is called so, or an input: whatever the user said
            log.warning("kept %s", error)
            return
        with atomic_write(path, "w", encoding="utf-8") as stream:
            stream.write("\n".join(lines) + "\n")
