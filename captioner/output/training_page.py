"""The curves of a training run as one page beside its report, to be opened by double click."""

import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import IO

from captioner.errors import InputError
from captioner.output.page_files import inlined, write_data
from captioner.runtime.files import atomic_write, read_json

log = logging.getLogger(__name__)


def write_training_page(target: Path, reports: Sequence[Path]) -> None:
    """Write train.html with the reports inside, and with what lies beside each in NAME_pace.json.

    Args:
        reports: model_id<ID>.json of `caption-train` or of the original; the first is shown, the others can be. Those
            that cannot be read are left out.

    Raises:
        InputError: the file cannot be written.
    """
    head, tail = inlined("train.html")
    with atomic_write(target, "w", encoding="utf-8") as stream:
        stream.write(head)
        shown = [report for report in reports if _write(stream, report)]
        for report in shown:
            pace = report.with_name(f"{report.stem}_pace.json")
            if os.path.lexists(pace):
                _write(stream, pace)
        write_data(stream, "runs.json", [report.name for report in shown])
        stream.write(tail)


def _write(stream: IO[str], path: Path) -> bool:
    """Put a JSON file into the page; False: it is damaged, or of another program, and left out."""
    try:
        content = read_json(path)
        if not isinstance(content, dict):
            raise InputError(f"{path}: is no report of a training")
    except InputError as error:
        log.warning("not on the page of the training: %s", error)
        return False
    write_data(stream, path.name, content)
    return True
