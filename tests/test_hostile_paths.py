"""A taste of hostile_paths.py."""

from hostile_paths import run


def test_odd_files_for_all_options_lose_nothing_and_end_in_one_line() -> None:
    rows = run(["score", "download"]).splitlines()[2:]
    assert len(rows) == 2
