"""A taste of kill_commands.py."""

from kill_commands import run


def test_a_killed_command_is_repeated_as_if_nothing_had_been() -> None:
    rows = run(kills=2, seed=0, names=["score", "convert", "prepro", "eval"]).splitlines()[2:]
    assert len(rows) == 4
