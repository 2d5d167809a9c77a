"""Every accepted description of pictures and captions → one list of records."""

import json
from dataclasses import dataclass
from pathlib import Path

from captioner.errors import InputError


@dataclass(frozen=True)
class Record:
    """One picture with its captions; `file_path` is as written, relative to the images' root."""

    file_path: str
    captions: list[str]
    id: int | str | None = None
    split: str | None = None


def read_records(path: str | Path, images_root: str | Path = "") -> list[Record]:
    """Read a description of pictures and captions."""
    path = Path(path)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror or error})") from error
    except ValueError as error:
        raise InputError(f"{path}: is not JSON ({error})") from error
    return [Record(e["file_path"], e["captions"], e.get("id"), e.get("split")) for e in content]
