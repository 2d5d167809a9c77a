"""A taste of fuzz_files.py."""

from pathlib import Path

from fuzz_files import run


def test_damaged_files_are_refused_or_read(tmp_path: Path) -> None:
    rows = [row.split("|")[1:-1] for row in run(files=600, seed=0, folder=tmp_path).splitlines()[2:]]
    assert len(rows) > 30
    assert all(int(row[1].replace(",", "")) >= 10 for row in rows)
    assert [path.name for path in tmp_path.iterdir()] == ["sound"]
