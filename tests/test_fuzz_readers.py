"""A taste of the fuzzing that bench/RESULTS.md reports in full."""

import re

from fuzz_readers import run


def test_damaged_files_are_refused_fast_and_in_little_memory() -> None:
    counts = re.findall(r"^\| (?:Torch7|Caffe)[^|]*\| ([\d,]+) \| ([\d,]+)", run(inputs=1200, seed=0), re.MULTILINE)
    assert [inputs for inputs, _ in counts] == ["240"] * 5
    assert all(int(refused) > 100 for _, refused in counts)
