"""A taste of fault_injection.py: faults of the disk end in one line, and old files stay."""

from pathlib import Path

import pytest
from fault_injection import inject, inject_into_training
from small_runs import RUNS, pictures_server

EVERY = {
    "score": 1,
    "convert": 7,
    "convert .t7": 17,
    "prepro": 5,
    "eval": 17,
    "eval, everything": 29,
    "video": 31,
    "download": 1,
}


@pytest.mark.parametrize("name", [name for name in RUNS if name != "train"])
def test_every_fault_is_one_line_and_old_files_stay(name: str, tmp_path: Path) -> None:
    with pictures_server() as server:
        faults, ended = inject(name, tmp_path / "run", server, EVERY.get(name, 5))
    assert faults > 1 and ended


def test_faults_cost_a_training_nothing(tmp_path: Path) -> None:
    with pictures_server() as server:
        faults, ended = inject_into_training(tmp_path / "run", server, 97)
    assert faults > 4 and ended > faults / 2
