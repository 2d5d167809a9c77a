"""Nothing of anybody's is lost: what an output of a command may replace.

Never an input of the same command, under whatever name it goes there, never a device or a folder, and an existing file
only if this program wrote it, which is told by what is in it, or if the user says --overwrite 1.
"""

import os
import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from captioner.errors import InputError
from captioner.runtime.files import forget_inputs, protect, protect_stdin, require_replaceable

_HEAD, _TAIL = 2**16, 2**16
# What files of ours begin with, and what stands somewhere in their first or last 64 kB.
_MARKS: tuple[tuple[str, bytes, tuple[bytes, ...]], ...] = (
    ("captions", rb'\[?\s*\{"image_id": ', (b'"file_name": ', b'"logprob": ')),
    ("captions", rb"image_id,file_name,caption,logprob,confidence\b", ()),
    ("captions", rb"\[\]\s*$", ()),
    ("scores", rb'\{\s*"(?:Bleu_1|METEOR|ROUGE_L|CIDEr|SPICE|intervals)": ', (b'"intervals": ', b'"diversity": ')),
    ("scores", rb'\{\s*"R@1": ', (b'"median_rank": ',)),
    ("check", rb'\{\s*"readable": \d+,\s*"unreadable": ', ()),
    ("dataset", rb'\{"ix_to_word": ', (b'"tokenizer": ', b'"fingerprint": "')),
    ("dataset", rb"\x89HDF\r\n\x1a\n", (b"fingerprint",)),
    ("mean image", rb"\x89PNG\r\n", (b"tEXtSoftware\0mean image of caption-prepro",)),
    ("page", rb"<!DOCTYPE html>", (b'<meta name="generator" content="captioner">',)),
    ("model", rb'.{8}\{"__metadata__": \{"format": "captioner"', ()),
)

_MODEL_WORDS = ((b"format_version", b"state_dict"), (b"_metadata", b"pixels"))  # of checkpoints, of weights alone

ARRAYS_MARK = b"arrays of caption-convert"  # the comment of archives of arrays, .npz

_outputs: dict[str, "Output"] = {}  # by the running command's options that name a file to write
_overwrite = False


@dataclass(frozen=True)
class Output:
    """A file to write, and what it may replace besides empty files, as `kind_of` calls it; none named: all of ours."""

    path: str
    kinds: tuple[str, ...] = ()


def begin(inputs: Iterable[str] = (), outputs: Mapping[str, Output] | None = None, overwrite: bool = False) -> None:
    """Take note of a command's files, before anything is read.

    Args:
        inputs: what it is to read, existing or not.
        outputs: by option; None: no command runs any more.
        overwrite: whether the user lets them replace foreign files.
    """
    global _overwrite
    forget_inputs()
    _outputs.clear()
    _outputs.update(outputs or {})
    _overwrite = overwrite
    if outputs is not None:
        protect_stdin()
    for path in inputs:
        protect(path)


def check_outputs() -> None:
    """Refuse the outputs given to `begin` that would replace what they must not.

    Raises:
        InputError: naming the option and the file.
    """
    seen: dict[str, str] = {}
    for option, output in _outputs.items():
        try:
            require_output(output.path, output.kinds)
        except InputError as error:
            raise InputError(f"{option}: {error}") from None
        place = os.path.realpath(output.path)
        if place in seen:
            raise InputError(f"{seen[place]} and {option} are both {output.path}", expected="two files")
        seen[place] = option


def require_output(path: str | Path, kinds: Collection[str] = ()) -> None:
    """Make sure that the running command may write `path`, before the work.

    Args:
        kinds: see `Output`.

    Raises:
        InputError: it would replace an input, a file of somebody else's, or something that is no file.
    """
    kind = kind_of(path) if os.path.isfile(path) else None
    require_replaceable(path, pictures=kind is not None)
    if os.path.exists(path) and not _overwrite:
        if kind is None:
            raise InputError(
                f"{path}: exists, and was not written by this program",
                remedy="choose another name, or say --overwrite 1",
            )
        if kinds and kind not in (*kinds, "nothing"):
            raise InputError(
                f"{path}: exists, and holds something else ({kind})", remedy="choose another name, or say --overwrite 1"
            )


def kind_of(path: str | Path) -> str | None:
    """What a file of ours holds, as _MARKS calls it, or "model", or "nothing"; None: it is not of ours."""
    head, tail = _read(path)
    if not head:
        return "nothing"
    if head.startswith(b"PK\x03\x04"):
        return "model" if _is_model(path) else "arrays" if tail.endswith(ARRAYS_MARK) else None
    for kind, begin_, marks in _MARKS:
        if re.match(begin_, head, re.DOTALL) and all(mark in head or mark in tail for mark in marks):
            return kind
    return None


def _is_model(path: str | Path) -> bool:
    """A checkpoint of ours, or weights for torchvision with the pixels they want."""
    import zipfile  # takes a while, and few commands need it

    try:
        with zipfile.ZipFile(path) as archive:
            name = next(name for name in archive.namelist() if name.endswith("/data.pkl"))
            content = archive.read(name)
    except Exception:  # a damaged archive raises many kinds
        return False
    return any(all(word in content for word in words) for words in _MODEL_WORDS)


def _read(path: str | Path) -> tuple[bytes, bytes]:
    """The first and the last 64 kB."""
    try:
        with open(path, "rb") as stream:
            head = stream.read(_HEAD)
            stream.seek(max(0, os.fstat(stream.fileno()).st_size - _TAIL))
            return head, stream.read(_TAIL)
    except OSError as error:
        raise InputError(f"{path}: exists, and cannot be read ({error.strerror or error})") from error
