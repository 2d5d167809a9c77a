"""Pictures in the rows of Parquet files, named as if the file were a folder and its rows numbered files: a.parquet/17.

As img2dataset writes them (a column jpg, png or webp) and Hugging Face's datasets (a column image, of bytes and path).
Errors are OSErrors, as of other files, with a reason to read. pyarrow is imported where it is needed.
"""

import contextlib
import errno
import functools
import os
import threading
from collections.abc import Iterator
from typing import IO, TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pyarrow
    from pyarrow.parquet import ParquetFile

SUFFIX = ".parquet"
_MAGIC = b"PAR1"
# Columns of pictures; the first one that is there counts, else the only column of bytes.
_PICTURE_COLUMNS = "image jpg jpeg png webp picture img image_bytes bytes content data".split()
_KEY_COLUMNS = ("key", "__key__", "image_id", "id")
_ROWS_AT_ONCE = 64
NEEDS_PYARROW, INSTALL = "Parquet files need pyarrow", 'pip install "captioner[shards]"'
NO_BYTES = "the row has no bytes of a picture"
_reading = threading.Lock()


def is_parquet(path: str | os.PathLike[str]) -> bool:
    """Whether a file on this machine is Parquet, by its first bytes."""
    if not os.path.isfile(path):  # to open a pipe would wait for a writer
        return False
    try:
        with open(path, "rb") as stream:
            return stream.read(len(_MAGIC)) == _MAGIC
    except OSError:
        return False


def read_rows(
    stream: IO[bytes], columns: tuple[str, ...] = (), with_pictures: bool = True
) -> Iterator[tuple[str, bytes | str, dict[str, Any]]]:
    """Every row's key, its picture's bytes or the reason why it has none, and its values in those of `columns` that are
    there. A damaged row group costs its own rows.

    The key is what a column key, image_id or id says, else the row's number. Memory: some rows, and what pyarrow keeps
    of a row group.

    Raises:
        OSError: the file as a whole is damaged, has no column of pictures, or the system fails.
    """
    with _errors_named():
        file = _open(stream)
        picture = _picture_column(file)
    names = file.schema_arrow.names
    key = next((name for name in _KEY_COLUMNS if name in names), None)
    others = [name for name in columns if name in names]
    described = list(dict.fromkeys([*([key] if key else []), *others]))
    number = 0
    for group in range(file.metadata.num_row_groups):
        end = number + file.metadata.row_group(group).num_rows
        try:
            for batch in _batches(file, group, [*([picture] if with_pictures else []), *described]):
                with _errors_named():
                    rows = batch.select(described).to_pylist() if described else [{}] * len(batch)
                    pictures = _bytes_of(batch.column(picture)) if with_pictures else [b""] * len(batch)
                for data, fields in zip(pictures, rows, strict=True):
                    named = fields.get(key) if key else None
                    values = {name: fields[name] for name in others}
                    yield str(number if named is None else named), NO_BYTES if data is None else data, values
                    number += 1
        except OSError as error:
            if error.errno != errno.EBADMSG:
                raise
            for lost in range(number, end):
                yield str(lost), str(error.strerror), {}
            number = end


def _batches(file: "ParquetFile", group: int, columns: list[str]) -> Iterator["pyarrow.RecordBatch"]:
    with _errors_named():
        yield from file.iter_batches(_ROWS_AT_ONCE, row_groups=[group], columns=columns)


def count_rows(path: str) -> int:
    """How many pictures a file has.

    Raises:
        OSError: it is damaged, or has no column of pictures.
    """
    with open(path, "rb") as stream, _errors_named():
        file = _open(stream)
        _picture_column(file)
        return int(file.metadata.num_rows)


def read_row(path: str, most: int) -> bytes | None:
    """The bytes of the picture that a path as a.parquet/17 names; None where it names none.

    Raises:
        OSError: the file is damaged, or the picture is missing or holds more than `most` bytes.
    """
    parent, name = os.path.split(path)
    if not name.isdecimal() or not is_parquet(parent):
        return None
    status = os.stat(parent)
    if len(name) > 18:  # beyond all rows
        return None
    with _reading, _errors_named():  # threads that ask for rows of one group shall not all read it
        ends = _row_group_ends(parent, status.st_mtime_ns, status.st_size)
        group = next((i for i, end in enumerate(ends) if int(name) < end), None)
        if group is None:
            return None
        pictures = _row_group(parent, status.st_mtime_ns, status.st_size, group)
        data = _bytes_of(pictures.slice(int(name) - (ends[group] - len(pictures)), 1))[0]
    if data is None:
        raise OSError(errno.ENODATA, NO_BYTES)
    if len(data) > most:
        raise OSError(errno.EFBIG, f"holds {len(data):,} bytes, more than {most:,}")
    return data


@functools.lru_cache(16)
def _row_group_ends(path: str, *_: int) -> list[int]:
    with open(path, "rb") as stream:
        metadata = _open(stream).metadata
    ends, end = [], 0
    for group in range(metadata.num_row_groups):
        end += metadata.row_group(group).num_rows
        ends.append(end)
    return ends


@functools.lru_cache(2)
def _row_group(path: str, mtime: int, size: int, group: int) -> "pyarrow.ChunkedArray":
    with open(path, "rb") as stream:
        file = _open(stream)
        return file.read_row_group(group, columns=[_picture_column(file)]).column(0)


def _open(stream: IO[bytes]) -> "ParquetFile":
    try:
        from pyarrow.parquet import ParquetFile
    except ImportError as error:
        raise OSError(errno.ENOSYS, f"{NEEDS_PYARROW}: {INSTALL}") from error
    return ParquetFile(stream)


def _picture_column(file: "ParquetFile") -> str:
    schema = file.schema_arrow
    of_bytes = [field.name for field in schema if _holds_bytes(field.type)]
    known = [name for wanted in _PICTURE_COLUMNS for name in of_bytes if name.lower() == wanted]
    if known or len(of_bytes) == 1:
        return (known or of_bytes)[0]
    raise OSError(errno.EINVAL, f"no column of pictures, called image or jpg (its columns: {', '.join(schema.names)})")


def _holds_bytes(kind: "pyarrow.DataType") -> bool:
    from pyarrow import types

    if types.is_struct(kind):
        place = kind.get_field_index("bytes")
        return place >= 0 and _holds_bytes(kind.field(place).type)
    if types.is_dictionary(kind):
        return _holds_bytes(kind.value_type)
    is_view = getattr(types, "is_binary_view", lambda _: False)  # newer than the oldest pyarrow that will do
    return types.is_binary(kind) or types.is_large_binary(kind) or is_view(kind)


def _bytes_of(column: "pyarrow.Array | pyarrow.ChunkedArray") -> list[bytes | None]:
    return [one["bytes"] if isinstance(one, dict) else one for one in column.to_pylist()]


@contextlib.contextmanager
def _errors_named() -> Iterator[None]:
    """What pyarrow says about a file's content becomes an OSError EBADMSG; errors of the system keep their numbers."""
    try:
        yield
    except Exception as error:
        # ValueError: text that is no UTF-8, or a time beyond Python's calendar.
        ours = type(error).__module__.startswith("pyarrow") or isinstance(error, ValueError | OverflowError)
        if not ours and not (isinstance(error, OSError) and error.errno is None):
            raise
        raise OSError(errno.EBADMSG, f"damaged Parquet file: {error}") from error
