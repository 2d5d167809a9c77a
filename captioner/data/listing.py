"""The pictures of a folder, in the order in which people count them."""

import logging
import os
import re
from pathlib import Path

from captioner.data import parquet_files, tar_files
from captioner.data.image_formats import has_image_suffix, starts_like_image
from captioner.data.parquet_files import count_rows, is_parquet
from captioner.data.tar_files import is_tar, list_members
from captioner.errors import InputError

log = logging.getLogger(__name__)

SHARD_SUFFIXES = (tar_files.SUFFIX, parquet_files.SUFFIX)
_LONG_SEARCH = 20_000  # files
_ADDRESS = re.compile(r"https?://", re.IGNORECASE)


def is_address(name: str) -> bool:
    """Whether a picture is to be fetched."""
    return _ADDRESS.match(name) is not None


def natural_key(name: str) -> list[tuple[int, int, str]]:
    """Sort key that puts img2 before img10."""
    parts = re.split(r"([0-9]+)", name.lower())
    return [(0, int(part), "") if part.isdecimal() and part.isascii() else (1, 0, part) for part in parts] + [
        (2, 0, name)
    ]


def list_images(folder: str | Path, recursive: bool = False) -> list[Path]:
    """The pictures of a folder in natural order (img2 before img10).

    Listed are files that start like a picture, whatever they are called, and everything that is called like a
    picture, so that a damaged one is not passed over in silence. Hidden folders and the companions that macOS
    writes ("._photo.jpg") are left out; linked folders are not entered.

    Raises:
        InputError: the folder is missing or cannot be read.
    """
    folder = Path(folder)
    found: list[Path] = []

    def refuse(error: OSError) -> None:
        if Path(error.filename) == folder:
            raise InputError(f"{folder}: cannot be read ({error.strerror})", remedy="name a folder of pictures")

    for current, subfolders, names in os.walk(folder, onerror=refuse):
        found += [Path(current, name) for name in names if _is_listed(os.path.join(current, name))]
        if recursive:
            subfolders[:] = [name for name in subfolders if not name.startswith(".")]
        else:
            found += [Path(current, name) for name in subfolders if has_image_suffix(name)]
            subfolders.clear()
    return sorted(found, key=lambda path: natural_key(path.relative_to(folder).as_posix()))


def find_in_subfolders(folder: str | Path) -> Path | None:
    """A picture that only a recursive listing of the folder would find, as soon as one is met; not looked for long."""
    looked_at = 0
    for current, subfolders, names in os.walk(folder):
        looked_at += len(names)
        subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
        if looked_at > _LONG_SEARCH:
            return None
        if Path(current) != Path(folder):
            for name in names:
                if has_image_suffix(name) and not name.startswith("._"):
                    return Path(current, name)
    return None


def _is_listed(path: str) -> bool:
    name = os.path.basename(path)
    if name.startswith(".") and name.endswith(".tmp"):  # a picture that is being written, or was by a killed process
        return False
    return not name.startswith("._") and (has_image_suffix(name) or starts_like_image(path))


def is_shard(path: str | os.PathLike[str]) -> bool:
    """Whether a file of this machine holds many pictures, by its content: a tar archive or a Parquet file."""
    return is_tar(path) or is_parquet(path)


def require_pyarrow() -> None:
    """Refuse Parquet files, before any work, where they cannot be read or written: nothing is wrong with them.

    Raises:
        InputError: pyarrow is missing.
    """
    try:
        import pyarrow.parquet  # noqa: F401
    except ImportError as error:
        raise InputError(parquet_files.NEEDS_PYARROW, remedy=parquet_files.INSTALL) from error


def list_shard(path: str) -> list[str]:
    """The pictures in a shard, in its order, each named as if the shard were a folder.

    Raises:
        InputError: the shard cannot be read.
    """
    try:
        if is_parquet(path):
            return [f"{path}/{number}" for number in range(count_rows(path))]
        members = list_members(path)
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror or error})") from error
    if "" in members:
        log.warning("%s: is damaged or cut off after byte %s; what is before is taken", path, f"{members[''][0]:,}")
    return [f"{path}/{name}" for name in members if has_image_suffix(name)]
