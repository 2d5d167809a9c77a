"""Captions as files: a journal while a run is under way, then JSON, JSON lines or CSV."""

import csv
import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeAlias, cast

from captioner.errors import InputError
from captioner.output.rows import CaptionRow
from captioner.runtime.files import atomic_write, cannot_write, require_replaceable

Row: TypeAlias = Mapping[str, object]  # one of `captioner.output.rows`

SUFFIXES = (".json", ".jsonl", ".csv")
FORMULA = ("=", "+", "-", "@", "\t", "\r")  # how a cell begins that spreadsheets take for one
CSV_COLUMNS = ("image_id", "file_name", "caption", "logprob", "confidence")


def require_known_suffix(path: Path) -> None:
    """Refuse a file name whose format is unknown before the work starts.

    Raises:
        InputError: its suffix is not one of SUFFIXES.
    """
    if path.suffix.lower() not in SUFFIXES:
        raise InputError(f"{path}: results cannot be written in this format", expected=f"{', '.join(SUFFIXES)}")


def write_results(path: Path, rows: Iterable[Row]) -> None:
    """Write rows one by one, in the format the file's suffix names; the file appears when it is complete.

    Raises:
        InputError: the file cannot be written.
    """
    suffix = path.suffix.lower()
    with atomic_write(path, "w", encoding="utf-8", newline="" if suffix == ".csv" else None) as stream:
        if suffix == ".csv":
            writer = csv.DictWriter(stream, CSV_COLUMNS, extrasaction="ignore")
            writer.writeheader()
            writer.writerows(_without_formulas(row) for row in rows)
        elif suffix == ".jsonl":
            for row in rows:
                stream.write(json.dumps(row, ensure_ascii=False) + "\n")
        else:
            separator = "[\n"
            for row in rows:
                stream.write(separator + json.dumps(row, ensure_ascii=False))
                separator = ",\n"
            stream.write("[]\n" if separator == "[\n" else "\n]\n")


def _first_line(path: Path) -> bytes:
    with path.open("rb") as stream:
        return stream.readline(1000)


def _without_formulas(row: Row) -> Row:
    """Texts that a spreadsheet would compute get an apostrophe in front; caption-score takes it away again."""
    return {name: f"'{text}" if isinstance(text, str) and text[:1] in FORMULA else text for name, text in row.items()}


class Journal:
    """Rows of a run as they come, one JSON line each, so that an interrupted run can go on.

    Args:
        path: the journal; it is removed when the run is complete.
        run: what makes this run the same as an earlier one: model, options, list of images.
        resume: go on with an existing journal instead of starting a new one.

    Raises:
        InputError: the journal belongs to a different run, or cannot be written.
    """

    def __init__(self, path: Path, run: str, resume: bool) -> None:
        self.path, self._header = path, json.dumps({"run": run}) + "\n"
        self.num_done = 0  # images dealt with by the earlier run: captioned or skipped
        self.totals: dict[str, float] = {}  # what they add up to, by name
        try:
            require_replaceable(path)  # no pipe, which would never end
            found = _first_line(path) if path.exists() else b""
            if found and not found.startswith(b'{"run": '):
                raise InputError(f"{path}: exists, and is no journal of this program", remedy="move it away")
            if resume and found:
                self._keep_whole_batches(run)
            else:
                with atomic_write(path, "w") as stream:
                    stream.write(self._header)
            self._stream = path.open("a", encoding="utf-8", errors="backslashreplace")
        except OSError as error:
            raise cannot_write(path, error) from error

    def _keep_whole_batches(self, run: str) -> None:
        with self.path.open("r+b") as stream:
            whole = size = 0
            for number, line in enumerate(stream, start=1):
                size += len(line)
                if not line.endswith(b"\n"):
                    break  # the run was killed while writing it
                entry = self._entry(line, number)
                if number == 1 and entry.get("run") != run:
                    raise InputError(
                        f"{self.path}: belongs to a run with another model, other options or other images",
                        remedy="repeat that command line, or start anew without --resume",
                    )
                if number == 1 or "num_done" in entry:
                    whole = size
                    self.num_done, self.totals = entry.get("num_done", 0), entry.get("totals", {})
            stream.truncate(whole)

    def _entry(self, line: bytes, number: int) -> dict[str, Any]:
        """What a whole line says: {"run": ..}, {"row": ..} or {"num_done": .., "totals": ..}."""
        try:
            entry = json.loads(line.decode("utf-8"))
            totals = entry.pop("totals", {})  # which earlier versions did not write
            ((key, value),) = entry.items()
            entry["totals"] = totals
            sound = {
                "run": lambda: number == 1,
                "row": lambda: (
                    isinstance(value["caption"], str)
                    and isinstance(value["file_name"], str)
                    and isinstance(value["image_id"], int | str | None)
                ),
                "num_done": lambda: type(value) is int and value >= self.num_done,
            }[key]() and all(type(number) in (int, float) and 0 <= number < math.inf for number in totals.values())
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
            sound = False
        if not sound:
            raise InputError(f"{self.path}: line {number} is damaged", remedy="start anew without --resume")
        return entry

    def append(self, rows: Iterable[CaptionRow], num_done: int, totals: Mapping[str, float] | None = None) -> None:
        """Add the rows of a batch, after which `num_done` images of the run are dealt with.

        Args:
            totals: what they all add up to, by name: for the run that goes on.
        """
        try:
            for row in rows:
                self._stream.write(json.dumps({"row": row}, ensure_ascii=False) + "\n")
            self._stream.write(json.dumps({"num_done": num_done, "totals": dict(totals or {})}) + "\n")
            self._stream.flush()
        except OSError as error:
            raise cannot_write(self.path, error) from error

    def rows(self) -> Iterator[CaptionRow]:
        """All rows so far, in order."""
        with self.path.open(encoding="utf-8", newline="\n") as stream:  # as `_keep_whole_batches` reads it
            for line in stream:
                entry = json.loads(line)
                if "row" in entry:
                    yield cast(CaptionRow, entry["row"])

    def close(self) -> None:
        """Close the file and leave it for a later --resume."""
        self._stream.close()

    def remove(self) -> None:
        """The run is complete: nothing is left to resume."""
        self._stream.close()
        os.unlink(self.path)
