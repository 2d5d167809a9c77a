"""Lists of addresses → what is to be fetched, and where to.

A line is a URL, or URL<tab>path, or URL<tab>path<tab>checksum ("sha256:..", "md5:..").
"""

import re
import urllib.parse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from captioner.errors import InputError
from captioner.runtime.files import read_small

_CHECKSUMS = ("sha256", "md5")
REPORT = "failed.tsv"  # of the files that could not be fetched, in their folder
PART, NOTE = ".part", ".part.json"  # what a file is called until it is complete, and a note on it


@dataclass(frozen=True)
class Item:
    """One file to fetch; `path` is relative to the folder."""

    url: str
    path: str
    checksum: str = ""


def read_lists(paths: Sequence[Path], numbered: bool = False) -> list[Item]:
    """The items of all lists, each with a path of its own."""
    taken: dict[str, Item] = {}
    items = [item for path in paths for item in read_list(path, taken, path.stem if len(paths) > 1 else "", numbered)]
    for item in items:
        clash = next((item.path + end for end in (PART, NOTE) if (item.path + end).lower() in taken), None)
        if item.path.lower() == REPORT or clash:
            raise InputError(f"{clash or item.path}: caption-download writes a file of this name itself")
    return items


def read_list(path: Path, taken: dict[str, Item] | None = None, into: str = "", numbered: bool = False) -> list[Item]:
    """The items of a list; empty lines and lines that begin with # don't count.

    Args:
        taken: paths that other lists have, in lower case; this list's are added.
        into: the folder of items without a path.
        numbered: number those items instead of naming them by their addresses.

    Raises:
        InputError: naming the line at fault.
    """
    try:
        lines = read_small(path).decode("utf-8-sig").splitlines()
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror or error})") from error
    except UnicodeDecodeError:
        raise InputError(f"{path}: is not UTF-8 text", expected="one URL per line") from None
    items: list[Item] = []
    taken = {} if taken is None else taken
    named: set[str] = set()  # addresses without a path
    for number, line in enumerate(lines, start=1):
        fields = line.strip().split("\t")
        if not fields[0] or fields[0].startswith("#"):
            continue
        item = _parse_item(fields, f"{path}: line {number}")
        if len(fields) == 1:
            if item.url in named:
                continue
            named.add(item.url)
            name = f"{len(named):06}{PurePosixPath(item.path).suffix or '.jpg'}" if numbered else item.path
            item = Item(item.url, _free_name(PurePosixPath(into, name), item.url, taken))
        other = taken.setdefault(item.path.lower(), item)  # lower: some file systems don't tell A from a
        if other is not item and other != item:
            raise InputError(f"{path}: line {number}: {item.path} is the path of another line too")
        if other is item:
            items.append(item)
    if not items:
        raise InputError(f"{path}: names no files", expected="one URL per line")
    return items


def _parse_item(fields: list[str], source: str) -> Item:
    url = fields[0]
    try:
        parts = urllib.parse.urlsplit(url)
        parts.port  # noqa: B018  (parsed only when asked for)
    except ValueError as error:
        raise InputError(f"{source}: {url!r} is no URL ({error})") from None
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise InputError(f"{source}: {url!r} is no address to download from", expected="http://.. or https://..")
    if len(fields) > 1:
        path = fields[1].strip()
    else:
        name = urllib.parse.unquote(PurePosixPath(parts.path).name)
        path = re.sub(r'[\\/:*?"<>|\0]', "_", name) or "index"  # what some file system does not take
    pure = PurePosixPath(path.replace("\\", "/"))
    if not path or pure.is_absolute() or ".." in pure.parts or ":" in pure.parts[0] or "\0" in path:
        raise InputError(f"{source}: {path!r} is no path inside the folder")
    checksum = fields[2].strip().lower() if len(fields) > 2 else ""
    if checksum and checksum.partition(":")[0] not in _CHECKSUMS:
        raise InputError(f"{source}: {checksum!r} is no checksum", expected="sha256:.. or md5:..")
    return Item(url, str(pure), checksum)


def _free_name(path: PurePosixPath, url: str, taken: dict[str, Item]) -> str:
    """The path; numbered if another URL ends alike."""
    free, number = path, 1
    while free.as_posix().lower() in taken and taken[free.as_posix().lower()].url != url:
        number += 1
        free = path.with_name(f"{path.stem}_{number}{path.suffix}")
    return free.as_posix()
