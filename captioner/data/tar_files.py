"""Files inside tar archives, named as if the archive were a folder: shards/00000.tar/000000012.jpg.

An archive is gone through once for where its members lie; after that each is read without unpacking the others.
Errors are OSErrors, as of other files, with a reason to read.
"""

import errno
import functools
import os
import tarfile
from pathlib import PurePosixPath

SUFFIX = ".tar"
_MAGIC_OFFSET, _MAGIC = 257, b"ustar"  # POSIX and GNU
_COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd"}
_cuts: dict[tuple[str, int, int], int | None] = {}  # by path, time and size, of the archives that were gone through


def is_tar(path: str | os.PathLike[str]) -> bool:
    """Whether a file is an uncompressed tar archive, by its first bytes."""
    if not os.path.isfile(path):  # to open a pipe would wait for a writer
        return False
    try:
        with open(path, "rb") as stream:
            stream.seek(_MAGIC_OFFSET)
            return stream.read(len(_MAGIC)) == _MAGIC
    except OSError:
        return False


def why_no_shard(start: bytes) -> str:
    """What a file is instead of a shard, by its first bytes (six will do); nothing if they do not tell."""
    if not start:
        return "is empty"
    program = next((name for magic, name in _COMPRESSED.items() if start.startswith(magic)), None)
    return f"is compressed with {program}: decompress it first" if program else ""


class StrictMember(tarfile.TarInfo):
    """Python takes a damaged header, or a file that ends without an end mark, for an archive's end; this does not."""

    @classmethod
    def fromtarfile(cls, tarfile_: tarfile.TarFile) -> "StrictMember":
        """The next member.

        Raises:
            tarfile.ReadError: there is neither one nor the end mark.
        """
        try:
            found = super().fromtarfile(tarfile_)
        except tarfile.EOFHeaderError:  # type: ignore[attr-defined]
            raise  # the mark
        except tarfile.HeaderError as error:
            raise tarfile.ReadError(str(error)) from error
        except (ValueError, OverflowError) as error:  # numbers of extended headers
            raise tarfile.ReadError(f"a damaged header ({error})") from error
        if found.size < 0:  # Python would go back in the archive, and round and round
            raise tarfile.ReadError("a file of negative size")
        return found


def name_in(archive_member: str) -> str:
    """A member's name as a path inside the archive: `tar cf a.tar .` writes ./photo.jpg, others /photo.jpg."""
    return str(PurePosixPath(archive_member.lstrip("/")))


def list_members(path: str) -> dict[str, tuple[int, int]]:
    """Name → first byte and number of bytes of every regular file in an archive, in its order.

    An archive that is cut off has the members before the cut, and under "" the place of the cut.
    """
    status = os.stat(path)
    return _list_members(path, status.st_mtime_ns, status.st_size)


def cut_off_at(path: str) -> int | None:
    """The byte from which on an archive is damaged or missing; None: it is whole."""
    status = os.stat(path)
    state = path, status.st_mtime_ns, status.st_size
    if state not in _cuts:
        list_members(path)
    return _cuts[state]


@functools.lru_cache(4)
def _list_members(path: str, mtime: int, size: int) -> dict[str, tuple[int, int]]:
    found: dict[str, tuple[int, int]] = {}
    end = 0
    try:
        with tarfile.open(path, "r:", tarinfo=StrictMember) as archive:
            for member in archive:
                end = member.offset_data + member.size
                if end > size:
                    found[""] = size, 0
                    break
                if member.isreg() and not member.issparse():
                    found[name_in(member.name)] = member.offset_data, member.size
                elif member.islnk() and name_in(member.linkname) in found:
                    found[name_in(member.name)] = found[name_in(member.linkname)]
    except tarfile.TarError as error:
        if not found:
            raise OSError(errno.EIO, f"damaged tar archive: {error}") from None
        found[""] = end, 0
    _cuts[path, mtime, size] = found[""][0] if "" in found else None
    return found


def read_member(path: str, most: int) -> bytes | None:
    """The bytes of a file inside an archive; None where `path` names none.

    Raises:
        OSError: the archive is damaged or cannot be read, or the file holds more than `most` bytes.
    """
    archive = _archive_of(path)
    if archive is None:
        return None
    place = list_members(archive).get(path[len(archive) + 1 :].replace(os.sep, "/"))
    if place is None:
        return None
    first, count = place
    if count > most:
        raise OSError(errno.EFBIG, f"holds {count:,} bytes, more than {most:,}")
    with open(archive, "rb") as stream:
        stream.seek(first)
        return stream.read(count)


def _archive_of(path: str) -> str | None:
    parent = os.path.dirname(path)
    while parent and parent != os.path.dirname(parent):
        if os.path.isfile(parent):
            return parent if is_tar(parent) else None
        if os.path.isdir(parent):
            return None
        parent = os.path.dirname(parent)
    return None
