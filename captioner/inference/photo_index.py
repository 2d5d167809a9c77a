"""CNN features and likely words of photos, kept on disk, so that a folder is looked at once and searched often.

A photo is known by its content; its place, size and time only spare reading it. Rows are stored in shards, which are
written whole and never changed; index.json comes last and says what is where. Every row has a check sum of its numbers
and of which photo they are of: neither a changed bit in a shard nor one in index.json gives another photo's caption.

Letters: P photos, F numbers of a photo's CNN features, V words.
"""

import hashlib
import json
import logging
import os
import zlib
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from captioner.data.checked_rows import check_sums, map_array, row_type
from captioner.data.images import read_file
from captioner.errors import InputError
from captioner.runtime.files import atomic_write, read_json, require_writable_folder
from captioner.runtime.locks import sole_run

log = logging.getLogger(__name__)

LARGEST = 65504.0  # that half precision holds
PHOTOS_OF_A_SHARD = 256  # as many are lost at most when an indexing is killed

_FORMAT = 2  # of these files; 1 had no check sums

Place: TypeAlias = tuple[int, int]  # shard, and row in it


class PhotoIndex:
    """The store of one CNN; its photos may lie anywhere.

    Args:
        folder: the store's; made if needed.
        model: digest of the language model: features are shared by all with this CNN, likely words are not.
        sizes: F and V + 1.
        words_of: features (P, F) float16 → (P, V+1) float16, how likely each word and END are in a caption.

    Raises:
        InputError: the folder cannot be written, or is damaged.
    """

    def __init__(
        self, folder: Path, model: str, sizes: tuple[int, int], words_of: Callable[[np.ndarray], np.ndarray]
    ) -> None:
        self.folder = require_writable_folder(folder, "what is known about photos")
        self._model, self._words_of = model, words_of
        self._num_features, self._num_words = sizes
        self._loaded: dict[Path, np.ndarray] = {}
        self._read()

    def _read(self) -> None:
        """What index.json says; an absent one says nothing."""
        path = self.folder / "index.json"
        remedy = f"delete the folder {self.folder}"
        content = read_json(path, "what is known about photos", remedy) if os.path.lexists(path) else {}
        try:
            if content.get("format") != _FORMAT:
                content = {}
            self.num_shards: int = content.get("shards", 0)
            self._rows: dict[str, Place] = {key: (shard, row) for key, (shard, row) in content.get("rows", {}).items()}
            self._places: dict[str, list[Any]] = content.get("places", {})
            sound = type(self.num_shards) is int and all(
                type(shard) is int
                and type(row) is int
                and 0 <= shard < self.num_shards
                and 0 <= row < PHOTOS_OF_A_SHARD
                for shard, row in self._rows.values()
            )
            sound = sound and all([type(value) for value in one] == [int, int, str] for one in self._places.values())
            self._photo_at = {place: digest for digest, place in self._rows.items()}
            sound = sound and len(self._photo_at) == len(self._rows)
        except (ValueError, TypeError, AttributeError):
            sound = False
        if not sound:
            raise InputError(f"{path}: is damaged", remedy=remedy)

    def find(self, path: Path) -> Place | None:
        """Where a photo's row is; None for one that is new, or gone."""
        try:
            place, state = _state(path)
        except OSError:
            return None
        size, modified, digest = self._places.get(place, (None, None, ""))
        return self._rows.get(digest) if [size, modified] == state else None

    def update(
        self, paths: Sequence[Path], encode: Callable[[Sequence[int]], Iterable[tuple[int, np.ndarray]]]
    ) -> None:
        """Bring in what is new among these files; those that cannot be read are left out.

        Args:
            encode: positions in `paths` → position and features (F,) of each that can be decoded, in any order.
        """
        if all(self.find(path) for path in paths):
            return
        with sole_run(self.folder / ".lock", f"the index of photos in {self.folder}"):
            self._read()  # another process may have been at it
            digests = {
                i: digest for i, path in enumerate(paths) if not self.find(path) and (digest := self._note(path))
            }
            wanted: dict[str, int] = {}
            for position, digest in digests.items():
                if digest not in self._rows:
                    wanted.setdefault(digest, position)  # a photo that is there twice is looked at once
            waiting: list[tuple[str, np.ndarray]] = []
            for position, features in encode(list(wanted.values())):
                waiting.append((digests[position], np.minimum(features, LARGEST).astype(np.float16)))
                if len(waiting) == PHOTOS_OF_A_SHARD:
                    self._add(waiting)
                    waiting = []
            self._add(waiting)

    def _note(self, path: Path) -> str:
        """Note where a photo lies; returns the digest of its content, "" where it cannot be read."""
        try:
            place, state = _state(path)
            digest = hashlib.blake2b(read_file(path), digest_size=16).hexdigest()
        except (OSError, InputError):
            return ""
        self._places[place] = [*state, digest]
        return digest

    def _add(self, photos: Sequence[tuple[str, np.ndarray]]) -> None:
        if photos:
            if self.num_shards == 0:  # what lies here is of another format, or of an index that was lost
                for path in self.folder.glob("*.npy"):
                    path.unlink(missing_ok=True)
            digests, features = [digest for digest, _ in photos], np.stack([row for _, row in photos])
            self._store(self._features_file(self.num_shards), features, digests)
            self._store(self._words_file(self.num_shards), self._words_of(features), digests)
            places = [(self.num_shards, row) for row in range(len(photos))]
            self._rows |= dict(zip(digests, places, strict=True))
            self._photo_at |= dict(zip(places, digests, strict=True))
            self.num_shards += 1
        content = {"format": _FORMAT, "shards": self.num_shards, "rows": self._rows, "places": self._places}
        with atomic_write(self.folder / "index.json", "w", encoding="utf-8") as stream:
            json.dump(content, stream)

    def words(self, places: Sequence[Place]) -> np.ndarray:
        """How likely words are in captions of these photos: float16 (P, V+1).

        Where another language model has brought photos in, likely words are made up for here, from their features.
        """
        shards, rows = np.array(places).T
        words = np.empty((len(places), self._num_words), np.float16)
        for shard in map(int, np.unique(shards)):
            if not self._words_file(shard).exists():
                of_shard = sorted(place for place in self._photo_at if place[0] == shard)
                digests, features = [self._photo_at[place] for place in of_shard], self.features(of_shard)
                self._store(self._words_file(shard), self._words_of(features), digests)
            chosen = np.flatnonzero(shards == shard)
            words[chosen] = self._rows_of(self._words_file(shard), shard, rows[chosen].tolist(), self._num_words)
        return words

    def features(self, places: Sequence[Place]) -> np.ndarray:
        """float16 (P, F)."""
        return np.concatenate(
            [self._rows_of(self._features_file(shard), shard, [row], self._num_features) for shard, row in places]
        )

    def _features_file(self, shard: int) -> Path:
        return self.folder / f"features-{shard:05}.npy"

    def _words_file(self, shard: int) -> Path:
        return self.folder / f"words-{self._model}-{shard:05}.npy"

    def _store(self, path: Path, values: np.ndarray, digests: Sequence[str]) -> None:
        rows = np.empty(len(values), row_type("<f2", values.shape[1:]))
        rows["values"], rows["sum"] = values, check_sums(values, map(_number_of, digests))
        with atomic_write(path) as stream:
            np.save(stream, rows)

    def _rows_of(self, path: Path, shard: int, rows: Sequence[int], width: int) -> np.ndarray:
        """Some rows of a shard, of so many numbers each.

        Raises:
            InputError: it does not have them, or others than were written.
        """
        stored = self._load(path, width)
        if max(rows) >= len(stored):
            raise self._damaged(path, "too short")
        values: np.ndarray = stored["values"][rows]
        found = check_sums(values, (_number_of(self._photo_at[shard, row]) for row in rows))
        for row in np.array(rows)[found != stored["sum"][rows]][:1]:
            raise self._damaged(path, f"the check sum of row {row} differs")
        return values

    def _load(self, path: Path, width: int) -> np.ndarray:
        if path not in self._loaded:
            try:
                values = map_array(path)
                sound = (
                    isinstance(values, np.ndarray) and values.dtype == row_type("<f2", (width,)) and values.ndim == 1
                )
                if not sound or len(values) > PHOTOS_OF_A_SHARD:
                    raise ValueError(f"no rows of {width} numbers in half precision")
            except Exception as error:  # NumPy reads the header as Python: a damaged one raises many kinds
                raise self._damaged(path, error) from error
            self._loaded[path] = values
        return self._loaded[path]

    def _damaged(self, path: Path, why: object) -> InputError:
        return InputError(f"{path}: is damaged ({why})", remedy=f"delete the folder {self.folder}")


def _number_of(digest: str) -> int:
    """Of the photo that a row is of."""
    return zlib.crc32(digest.encode())


def _state(path: Path) -> tuple[str, list[int]]:
    """The file's place, and what changes when its content does."""
    found = path.stat()
    return os.path.abspath(path), [found.st_size, found.st_mtime_ns]
