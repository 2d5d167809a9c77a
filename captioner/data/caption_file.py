"""The captions of many pictures in a temporary file: in memory they would take more room than all else."""

import json
import tempfile
from array import array
from collections.abc import Iterator, Sequence
from pathlib import Path

from captioner.data.tokenizers import tokenise
from captioner.runtime.files import cannot_write


class CaptionFile:
    """Captions as they were written, picture after picture; each picture takes 8 bytes of memory.

    Args:
        folder: where the file lies (default: the system's folder for such files); it has no name, and vanishes
            with the process.

    Attributes:
        num_captions: of all pictures together.

    Raises:
        InputError: the disk is full, or the folder cannot be written.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self.num_captions = 0
        self._folder = folder or Path(tempfile.gettempdir())
        self._starts = array("q")
        self._end = 0
        try:
            self._file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115
        except OSError as error:
            raise cannot_write(self._folder, error) from error

    def append(self, captions: Sequence[str]) -> None:
        """Add the captions of the next picture."""
        line = json.dumps(captions).encode() + b"\n"
        try:
            self._file.seek(self._end)
            self._file.write(line)
        except OSError as error:
            raise cannot_write(self._folder, error) from error
        self._starts.append(self._end)
        self._end += len(line)
        self.num_captions += len(captions)

    def close(self) -> None:
        """Give the room on the disk back."""
        self._file.close()

    def __len__(self) -> int:
        return len(self._starts)

    def __getitem__(self, index: int) -> list[str]:
        try:
            self._file.seek(self._starts[index])
            return json.loads(self._file.readline())
        except OSError as error:  # what is still to be written comes first
            raise cannot_write(self._folder, error) from error


class Tokenised:
    """The words of each caption of some pictures, split anew whenever they are gone through.

    Args:
        captions: of all pictures.
        indices: which pictures, in which order.
    """

    def __init__(self, captions: CaptionFile, indices: Sequence[int], tokenizer: str) -> None:
        self._captions = captions
        self._indices = indices
        self._tokenizer = tokenizer

    def __iter__(self) -> Iterator[list[list[str]]]:
        for index in self._indices:
            yield [tokenise(caption, self._tokenizer) for caption in self._captions[index]]
