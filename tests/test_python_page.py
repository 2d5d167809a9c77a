"""docs/python.md and docs/tour.ipynb: every example runs as it stands."""

import json
import os
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture
def clone(tmp_path, monkeypatch):
    """A folder with the examples in it, as the top of a clone has them."""
    os.symlink(ROOT / "examples", tmp_path / "examples", target_is_directory=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_examples_of_the_python_page_run(clone, capsys):
    page = (ROOT / "docs" / "python.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```python\n(.*?)^```", page, re.DOTALL | re.MULTILINE)
    assert len(blocks) == page.count("```python") >= 8
    names: dict[str, object] = {}
    for block in blocks:
        exec(block, names)
    printed = capsys.readouterr().out
    assert "left out: picture 2 of 2: " in printed
    assert "{'train': 10, 'val': 2, 'test': 0}" in printed
    low, high = names["logprobs"][1], names["logprobs"][0]
    assert low < high < 0
    assert (clone / "data.h5").is_file()


def test_the_tour_runs_cell_by_cell(clone, capsys):
    notebook = json.loads((ROOT / "docs" / "tour.ipynb").read_text(encoding="utf-8"))
    names: dict[str, object] = {}
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            assert not cell["outputs"], "committed without results"
            exec("".join(cell["source"]), names)
    printed = capsys.readouterr().out
    assert "CIDEr" in printed
    losses = list(names["losses"].values())
    assert len(losses) >= 6 and losses[-1] < losses[0]
