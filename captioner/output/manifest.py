"""What of a folder's content this program wrote: a list in the folder itself, never the files' names alone.

A file is ours if the list has it and it still is what was written: by its size and its first bytes. A name goes into
the list before its file is written, so that a killed run leaves nothing that would look like somebody else's.
"""

import hashlib
import json
import logging
import os
import re
from collections.abc import Iterable
from pathlib import Path

from captioner.errors import InputError
from captioner.runtime.files import atomic_write, cannot_write, read_small

log = logging.getLogger(__name__)

NAME = ".captioner-files"
_NAMES = re.compile(r"(imgs/)?(?!\.)[^/\\]+")  # nothing outside of the folder, whatever the list says
_FIRST_BYTES = 4096


class Manifest:
    """The list of a folder, which must exist.

    Args:
        overwrite: whether the user lets files of others be replaced.

    Raises:
        InputError: the list cannot be read, or is none.
    """

    def __init__(self, folder: Path, overwrite: bool = False) -> None:
        self.folder, self.overwrite = folder, overwrite
        self._path = folder / NAME
        self._known: dict[str, str | None] = {}  # name → mark; None: was about to be written
        try:
            lines = read_small(self._path).splitlines() if os.path.lexists(self._path) else []
        except OSError as error:
            raise InputError(f"{self._path}: cannot be read ({error.strerror or error})") from error
        if lines and not lines[0].startswith(b"["):
            raise InputError(f"{self._path}: is no list of this program", remedy="move it away")
        for line in lines:
            try:
                name, mark = json.loads(line)
            except (
                ValueError,
                TypeError,
                RecursionError,
            ):  # the line that a killed run was writing; what it names is refused
                continue
            if isinstance(name, str) and _NAMES.fullmatch(name):
                self._known[name] = mark if isinstance(mark, str) else None

    def is_ours(self, name: str) -> bool:
        """Whether there is no such file, or we wrote it and nobody has changed it since."""
        path = self.folder / name
        if not os.path.lexists(path):
            return True
        if name not in self._known or not path.is_file():
            return False
        return self._known[name] in (None, _mark(path))

    def names(self) -> list[str]:
        """What the list has."""
        return list(self._known)

    def require_ours(self, names: Iterable[str]) -> None:
        """Refuse to replace what is not ours.

        Raises:
            InputError: naming the first file that is somebody else's.
        """
        for name in names:
            if not self.overwrite and not self.is_ours(name):
                raise InputError(
                    f"{self.folder / name}: exists, and was not written by this program",
                    remedy="choose another folder, or say --overwrite 1",
                )

    def about_to_write(self, names: Iterable[str]) -> None:
        """To be called before files are written.

        Raises:
            InputError: the list cannot be written.
        """
        new = [name for name in names if self._known.get(name, "") is not None]
        self._known.update(dict.fromkeys(new))
        try:
            with self._path.open("a", encoding="utf-8", errors="backslashreplace") as stream:
                stream.writelines(json.dumps([name, None]) + "\n" for name in new)
        except OSError as error:
            raise cannot_write(self._path, error) from error

    def finish(self, names: Iterable[str]) -> None:
        """Keep `names` alone: what else was ours, as pictures of an earlier run, is removed.

        Raises:
            InputError: the list cannot be written.
        """
        kept = dict.fromkeys(names)
        for name in self._known.keys() - kept.keys():
            path = self.folder / name
            try:
                if os.path.lexists(path) and self.is_ours(name):
                    path.unlink()
            except OSError as error:
                log.warning("%s: an earlier run's file stays (%s)", path, error.strerror or error)
        self._known = {name: _mark(self.folder / name) for name in kept if (self.folder / name).is_file()}
        with atomic_write(self._path, "w") as stream:
            stream.writelines(json.dumps([name, mark]) + "\n" for name, mark in self._known.items())


def _mark(path: Path) -> str:
    with path.open("rb") as stream:
        first = stream.read(_FIRST_BYTES)
        size = os.fstat(stream.fileno()).st_size
    return f"{size} {hashlib.blake2b(first, digest_size=10).hexdigest()}"
