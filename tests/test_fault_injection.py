"""A taste of fault_injection.py: faults of the disk end in one line, and old files stay."""

from pathlib import Path

import pytest
from fault_injection import inject


@pytest.mark.parametrize(("command", "every"), [("score", 1), ("convert", 1), ("prepro", 3), ("eval", 11)])
def test_every_fault_is_one_line_and_old_files_stay(command: str, every: int, tmp_path: Path) -> None:
    faults, ended = inject(command, tmp_path / "run", every)
    assert faults > 4 and ended > faults / 3
