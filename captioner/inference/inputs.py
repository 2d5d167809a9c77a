"""What people name when they want captions: photos, folders, patterns, lists on stdin, addresses."""

import glob
import logging
import os
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO

from captioner.data.address_lists import Item
from captioner.data.download import Limits, download
from captioner.data.listing import is_address, is_shard, list_images, list_shard, natural_key, require_pyarrow
from captioner.data.parquet_files import is_parquet
from captioner.errors import InputError
from captioner.inference.sources import FileSource, open_folder

log = logging.getLogger(__name__)

STDIN = "-"
# Of a picture at an address: one more attempt, this long without a byte, this long in all, this large.
_LIMITS = Limits(retries=1, timeout=15.0, max_bytes=64 * 2**20, max_seconds=60.0)
_CONNECTIONS = 8


def open_inputs(names: Sequence[str], recursive: bool, limit: int, stdin: IO[bytes]) -> FileSource:
    """The pictures that names stand for, in their order, each once; ids count from "1".

    Args:
        names: files, tar archives and Parquet files of pictures, folders (their pictures in natural order), patterns
            (a shell that leaves "*.jpg" as it is needs no help), "-" for a list on stdin, http and https addresses.
        recursive: folders' subfolders too.
        limit: the first so many of them; −1: all.
        stdin: paths or addresses, one a line or separated by NUL.

    Returns:
        The pictures. The file name of a lone folder's picture is relative to it, else it is the path as named.

    Raises:
        InputError: a name stands for nothing, or there is no picture.
    """
    if len(names) == 1 and os.path.isdir(names[0]):
        return open_folder(names[0], recursive, limit)
    found: dict[str, str] = {}  # the file itself, or the address → what it is called
    repeated = 0
    for name in _expanded(names, recursive, stdin):
        key = name if is_address(name) else os.path.realpath(name)
        repeated += key in found
        found.setdefault(key, name)
    if repeated:
        log.info("%d pictures are named more than once and taken once", repeated)
    if not found:
        reason = "the list on stdin is empty" if STDIN in names else "see the lines above"
        raise InputError(f"no pictures to caption: {reason}")
    chosen = list(found.values())[: None if limit < 0 else limit]
    return _with_fetched(chosen)


def _expanded(names: Sequence[str], recursive: bool, stdin: IO[bytes]) -> Iterator[str]:
    for name in names:
        if name == STDIN:
            data = stdin.read()
            lines = data.split(b"\0") if b"\0" in data else data.splitlines()
            # What a list names is taken as it is: one line that is wrong must not end the run of the others.
            yield from (os.fsdecode(line.strip(b"\r\n")) for line in lines if line.strip())
        elif is_address(name):
            yield name
        elif os.path.isdir(name):
            yield from _of_folder(name, recursive)
        elif is_shard(name):
            yield from _of_shard(name, alone=len(names) == 1)
        elif os.path.lexists(name):
            yield name
        elif glob.has_magic(name):
            matches = sorted(glob.glob(name, recursive=True), key=natural_key)
            if not matches:
                raise InputError(f"{name}: no file matches this pattern")
            for match in matches:
                if os.path.isdir(match):
                    yield from _of_folder(match, recursive)
                elif is_shard(match):
                    yield from _of_shard(match, alone=len(matches) == 1)
                else:
                    yield match
        else:
            raise InputError(f"{name}: no such file or folder", remedy="check the path; caption-eval --help shows more")


def _of_folder(name: str, recursive: bool) -> list[str]:
    paths = list_images(name, recursive)
    if not paths:
        log.warning("%s: no image files in this folder%s", name, "" if recursive else " (--recursive looks deeper)")
    return [str(path) for path in paths]


def _of_shard(name: str, alone: bool) -> list[str]:
    """The pictures in a shard; one of which nothing can be read costs nothing else."""
    if is_parquet(name):
        require_pyarrow()
    try:
        return list_shard(name)
    except InputError as error:
        if alone:
            raise
        log.warning("skipped %s", error)
        return []


def _with_fetched(names: Sequence[str]) -> FileSource:
    """The files, and the fetched ones, which are removed when the source is."""
    addresses = [name for name in names if is_address(name)]
    folder = tempfile.TemporaryDirectory(prefix="captioner-") if addresses else None
    fetched: dict[str, Path] = {}
    if folder:
        items = [Item(address, str(number)) for number, address in enumerate(addresses)]
        failed = {item.url for item, _ in download(items, Path(folder.name), _CONNECTIONS, _LIMITS)}
        fetched = {item.url: Path(folder.name, item.path) for item in items if item.url not in failed}
        names = [name for name in names if name not in failed]
        if not names:
            raise InputError("none of the addresses gave a picture", remedy="see the lines above")
    files = [
        (fetched.get(name, Path(name)), {"id": str(number), "file_path": _called(name)})
        for number, name in enumerate(names, start=1)
    ]
    return FileSource(files, keep=folder)


def _called(name: str) -> str:
    return name if is_address(name) else Path(name).as_posix()
