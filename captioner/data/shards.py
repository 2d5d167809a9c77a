"""The pictures of a shard in its order, read once from front to back: a tar archive or a Parquet file, here or remote.

A member that is broken is in the stream with its reason; so is, as its last entry, an archive that is damaged or cut
off after some pictures. A shard with nothing to be had is an error.
"""

import contextlib
import errno
import logging
import os
import shutil
import tarfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import IO

import numpy as np

from captioner.data import parquet_files, tar_files
from captioner.data.image_formats import has_image_suffix
from captioner.data.image_mode import ImageMode
from captioner.data.images import MAX_FILE_BYTES, decode_image
from captioner.data.listing import SHARD_SUFFIXES, require_pyarrow
from captioner.data.listing import is_shard as is_local_shard
from captioner.errors import InputError
from captioner.runtime.files import atomic_write
from captioner.runtime.quantities import bytes_text
from captioner.runtime.storage import find, is_remote, open_bytes

log = logging.getLogger(__name__)

FETCHED = ".captioner-fetched"  # in a folder of copies that is ours


@dataclass(slots=True)
class Member:
    """A picture of a shard, or why there is none."""

    id: str  # WebDataset's key (the name up to its first dot), or what a Parquet row's key or id says
    file_name: str  # from the shard's own name on: 00000.tar/000000012.jpg, 00000.parquet/12
    data: bytes = b""
    error: str = ""


def is_shard(path: str) -> bool:
    """Whether a name means a shard: a file of this machine by its content, an address by its ending."""
    return path.lower().endswith(SHARD_SUFFIXES) if is_remote(path) else is_local_shard(path)


def is_parquet(path: str) -> bool:
    """Whether a shard is a Parquet file, else a tar archive: a file of this machine by its content."""
    return path.lower().endswith(parquet_files.SUFFIX) if is_remote(path) else parquet_files.is_parquet(path)


def name_of(path: str) -> str:
    """A shard's own name, without its folder."""
    return path.replace(os.sep, "/").rstrip("/").rpartition("/")[2]


def read_members(path: str) -> Iterator[Member]:
    """The pictures of a shard, with broken ones in their places. Memory: a picture, of Parquet some dozen.

    Raises:
        InputError: the shard cannot be read. What was read before is no result then: nothing is wrong with the shard.
    """
    count = 0
    try:
        with open_bytes(path) as stream:
            for member in _reader_of(path)(stream, name_of(path)):
                count += 1
                yield member
    except (OSError, tarfile.TarError, EOFError) as error:
        damaged = not isinstance(error, OSError) or error.errno == errno.EBADMSG
        reason = (error.strerror if isinstance(error, OSError) else None) or str(error)
        if not (damaged and count):
            raise InputError(f"{path}: {(damaged and _no_shard(path)) or f'cannot be read ({reason})'}") from error
        yield Member("", name_of(path), error=f"damaged or cut off after {count} pictures ({reason})")


@contextlib.contextmanager
def fetched(names: Sequence[str], folder: str) -> Iterator[list[str]]:
    """Files on this machine for what is named: addresses (with * and ? too) are copied into `folder` first.

    Copies are removed when the block is done; if it fails they stay, and are not fetched again.

    Raises:
        InputError: one cannot be fetched, or two are called alike.
    """
    if not any(map(is_remote, names)):
        yield list(names)
        return
    mark = os.path.join(folder, FETCHED)
    if os.path.lexists(folder) and not os.path.isfile(mark):
        raise InputError(f"{folder}: is there already, but not from caption-prepro", remedy="move it away")
    there: dict[str, str] = {}  # local file → where it comes from
    for name in names:
        for found in find(name) if is_remote(name) else [name]:
            target = os.path.join(folder, name_of(found)) if is_remote(found) else found
            if target in there:
                raise InputError(f"{found}: {there[target]} is called so, too", remedy="prepare them one by one")
            there[target] = found
    if any(map(is_parquet, there.values())):
        require_pyarrow()
    os.makedirs(folder, exist_ok=True)
    with atomic_write(mark):
        pass
    for target, name in there.items():
        if target != name and not os.path.exists(target):
            log.info("fetching %s", name)
            try:
                with open_bytes(name) as stream, atomic_write(target) as copy:
                    shutil.copyfileobj(stream, copy, 2**20)
            except OSError as error:
                raise InputError(f"{name}: cannot be read ({error.strerror or error})") from error
    yield list(there)
    with contextlib.suppress(OSError):
        for target in [*(target for target, name in there.items() if target != name), mark]:
            os.unlink(target)
        os.rmdir(folder)  # unless somebody else has put something there


def decode(member: Member, image_mode: ImageMode) -> np.ndarray | str:
    """uint8 (3, 256, 256), or the reason why there is none."""
    if member.error:
        return member.error
    if not member.data:
        return "is empty"
    try:
        return decode_image(member.data, image_mode=image_mode)
    except InputError as error:
        return str(error)


def _reader_of(path: str) -> Callable[[IO[bytes], str], Iterator[Member]]:
    return _read_parquet if is_parquet(path) else _read_tar


def _no_shard(path: str) -> str:
    with contextlib.suppress(OSError), open_bytes(path) as stream:
        return tar_files.why_no_shard(stream.read(6))
    return ""


def _read_tar(stream: IO[bytes], shard: str) -> Iterator[Member]:
    with tarfile.open(fileobj=stream, mode="r|", tarinfo=tar_files.StrictMember) as archive:
        for found in archive:
            archive.members.clear()  # type: ignore[attr-defined]  # tarfile keeps all it has seen
            name = tar_files.name_in(found.name)
            if found.isdir() or not has_image_suffix(name):
                continue
            folder, slash, last = name.rpartition("/")
            member = Member(folder + slash + last.partition(".")[0], f"{shard}/{name}")
            if not found.isreg():
                member.error = f"is a link to {found.linkname}" if found.linkname else "is no file"
            elif found.size > MAX_FILE_BYTES:
                member.error = _too_large(found.size)
            else:
                content = archive.extractfile(found)
                assert content  # a regular file
                member.data = content.read()
            yield member


def _read_parquet(stream: IO[bytes], shard: str) -> Iterator[Member]:
    for number, (key, data, _) in enumerate(parquet_files.read_rows(stream)):
        member = Member(key, f"{shard}/{number}")
        if isinstance(data, str):
            member.error = data
        elif len(data) > MAX_FILE_BYTES:
            member.error = _too_large(len(data))
        else:
            member.data = data
        yield member


def _too_large(size: int) -> str:
    return f"holds {bytes_text(size)}; expected at most {bytes_text(MAX_FILE_BYTES)}"
