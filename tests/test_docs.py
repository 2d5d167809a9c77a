"""The documentation: a site that builds without a broken link, and commands and options that exist."""

import re
import shlex
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = sorted([ROOT / "README.md", *ROOT.glob("docs/*.md"), *ROOT.glob("coco/*.md"), ROOT / "CONTRIBUTING.md"])
COMMANDS = {path.stem for path in (ROOT / "captioner/cli").glob("*.py") if "def main(" in path.read_text("utf-8")}


def _shell_lines(page: Path) -> list[str]:
    """The lines of a page's unmarked code blocks that call a caption-… command, continued lines joined."""
    blocks = re.findall(r"^```(?:sh|bash)?\n(.*?)^```", page.read_text("utf-8"), re.MULTILINE | re.DOTALL)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    return [line for line in lines if re.match(r"\s*(?:torchrun .*-m captioner\.cli\.|caption-)[a-z]+", line)]


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(page):
    text = re.sub(r"^```.*?^```", "", page.read_text("utf-8"), flags=re.MULTILINE | re.DOTALL)
    for target in re.findall(r"\]\(([^)#\s]+)", text):
        if "://" not in target:
            assert (page.parent / target).exists(), f"{page.name}: {target}"


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_commands_and_options_exist(page):
    import importlib

    for line in _shell_lines(page):
        words = shlex.split(line, comments=True)
        if words[0] == "torchrun":
            words = words[words.index("-m") + 1 :]
        name = words[0].removeprefix("caption-").removeprefix("captioner.cli.")
        assert name in COMMANDS, line
        module = importlib.import_module(f"captioner.cli.{name}")
        if name == "train":
            module = importlib.import_module("captioner.cli.train_options")
        known = {option for action in module.build_parser()._actions for option in action.option_strings}
        for word in words[1:]:
            if word.startswith("-") and word != "-" and not word.lstrip("-").isdigit():
                option = "--" + word.split("=")[0].lstrip("-").replace("-", "_")
                assert option in known, f"{line}: {option}"


def test_site_builds_without_a_broken_link(tmp_path):
    from mkdocs.commands.build import build
    from mkdocs.config import load_config

    build(load_config(str(ROOT / "mkdocs.yml"), site_dir=str(tmp_path)))
    assert (tmp_path / "photos" / "index.html").is_file()
