"""docs/original.md names every feature of the original and its neighbours, and a test for each that there is."""

import ast
import csv
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ROW = re.compile(r"\| (?P<feature>.+) \| (?P<here>.+) \| `tests/(?P<file>test_\w+\.py)::(?P<test>test_\w+)` \|")


@pytest.fixture(scope="module")
def rows() -> list[dict[str, str]]:
    lines = (ROOT / "docs" / "original.md").read_text(encoding="utf-8").splitlines()
    table = [line for line in lines if line.startswith("| ") and line != "| there | here | shown by |"]
    matches = [ROW.fullmatch(line) for line in table]
    assert all(matches), [line for line, match in zip(table, matches, strict=True) if not match]
    return [match.groupdict() for match in matches if match]


def test_every_named_test_exists(rows):
    tests = {}
    for name in {row["file"] for row in rows}:
        tree = ast.parse((ROOT / "tests" / name).read_text(encoding="utf-8"))
        tests[name] = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
    assert not [row for row in rows if row["test"] not in tests[row["file"]]]


def test_every_feature_is_named(rows, shared):
    with open(shared / "reference" / "original" / "features.tsv", encoding="utf-8", newline="") as stream:
        features = [row["feature"] for row in csv.DictReader(stream, delimiter="\t", quoting=csv.QUOTE_NONE)]
    assert len(features) == 144
    assert [row["feature"] for row in rows] == [feature.replace("|", "/") for feature in features]
