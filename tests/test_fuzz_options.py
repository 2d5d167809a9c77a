"""A taste of fuzz_options.py."""

from fuzz_options import run


def test_any_option_line_is_parsed_or_refused_in_one_line() -> None:
    counts = run(lines=1000, seed=0)
    for name, count in counts.items():
        assert count.total() == 100 and count["parsed"] and count["refused"], name
