"""The curves of a training run as one page beside its report, to be opened by double click."""

import json
from collections.abc import Sequence
from pathlib import Path

from captioner.output.page_files import inlined, write_data
from captioner.runtime.files import atomic_write


def write_training_page(target: Path, reports: Sequence[Path]) -> None:
    """Write train.html with the reports inside, and with what lies beside each in NAME_pace.json.

    Args:
        reports: model_id<ID>.json of `caption-train` or of the original; the first is shown, the others can be.

    Raises:
        InputError: the file cannot be written.
    """
    head, tail = inlined("train.html")
    with atomic_write(target, "w", encoding="utf-8") as stream:
        stream.write(head)
        for report in reports:
            for path in (report, report.with_name(f"{report.stem}_pace.json")):
                if path == report or path.is_file():
                    write_data(stream, path.name, json.loads(path.read_text(encoding="utf-8")))
        write_data(stream, "runs.json", [report.name for report in reports])
        stream.write(tail)
