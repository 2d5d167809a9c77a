"""The tree of the design: imports point one way, commands are imported by nobody, and --help needs no torch."""

import ast
import graphlib
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "captioner"

# Data flow down this list; a part imports only parts above it. A sub-package is one part.
ORDER = """
    errors runtime kernels data model search metrics inference output scale convert training sweep service video cli
    __main__
""".split()

# A module that imports none of ours stands on level 1, any other one level below the lowest one it imports.
MAX_LEVELS = 8

COMMANDS = sorted(
    path.stem for path in (PACKAGE / "cli").glob("*.py") if "def main(" in path.read_text(encoding="utf-8")
)


def _module_name(path: Path) -> str:
    return ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__")


def _imports(path: Path) -> set[str]:
    """The modules of captioner that a file imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= (names & MODULES.keys()) or {node.module or ""}
    return found & MODULES.keys() - {"captioner"}


MODULES = {_module_name(path): path for path in sorted(PACKAGE.rglob("*.py"))}
GRAPH = {name: _imports(path) for name, path in MODULES.items()}


def _part(module: str) -> str:
    return module.split(".")[1]


def test_every_part_has_its_place_in_the_order():
    parts = {_part(name) for name in MODULES if name != "captioner"}
    assert parts <= set(ORDER), "put the new part where its imports point up, here and in the README"
    assert len(ORDER) == len(set(ORDER))


@pytest.mark.parametrize("module", sorted(GRAPH.keys() - {"captioner"}))
def test_imports_point_up(module):
    place = ORDER.index(_part(module))
    below = {imported for imported in GRAPH[module] if ORDER.index(_part(imported)) > place}
    assert not below, f"{module} imports what stands below it: {below}"


def test_no_module_imports_itself_in_a_circle():
    list(graphlib.TopologicalSorter({name: imported - {name} for name, imported in GRAPH.items()}).static_order())


def test_there_are_few_levels():
    levels: dict[str, int] = {}
    for name in graphlib.TopologicalSorter({name: GRAPH[name] - {name} for name in GRAPH}).static_order():
        levels[name] = 1 + max((levels[imported] for imported in GRAPH[name] - {name}), default=0)
    # The front door names what stands on the other levels, and imports it when it is asked for.
    del levels["captioner"]
    assert not {name: level for name, level in levels.items() if level > MAX_LEVELS}


def test_nobody_imports_the_commands():
    importers = {
        name
        for name, imported in GRAPH.items()
        if _part(name + ".x") != "cli" and any(_part(i) == "cli" for i in imported)
    }
    assert not importers


def test_no_module_is_a_drawer_for_odds_and_ends():
    assert not {path.stem for path in MODULES.values()} & {"utils", "util", "helpers", "common", "misc"}


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_a_command_needs_no_torch(command):
    """Help and argument errors must come at once; torch alone takes seconds to import."""
    code = f"""
import atexit, sys, captioner.cli.{command}
atexit.register(lambda: print(*sys.modules, file=sys.stderr))
captioner.cli.{command}.main(["--help"])"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=PACKAGE.parent, check=True)
    assert f"usage: caption-{command}" in done.stdout
    assert not {"torch", "torchvision", "numpy", "PIL", "h5py"} & set(done.stderr.split())


def test_every_command_is_listed_and_runs_as_an_argument_of_the_package():
    def run(*arguments: str) -> subprocess.CompletedProcess:
        command = [sys.executable, "-m", "captioner", *arguments]
        return subprocess.run(command, capture_output=True, text=True, cwd=PACKAGE.parent)

    listed = run()
    assert listed.returncode == 0
    assert sorted(line.split()[0] for line in listed.stdout.splitlines() if line.startswith("  ")) == COMMANDS
    assert run("eval", "--help").stdout.startswith("usage: caption-eval")
    unknown = run("evaluate")
    assert unknown.returncode == 2 and "no command 'evaluate'" in unknown.stderr


WITHOUT_TORCH = """
    errors runtime.files runtime.signals data.vocabulary data.images data.listing data.records data.captioned
    data.statistics metrics output.results output.page
""".split()


@pytest.mark.parametrize("module", WITHOUT_TORCH)
def test_modules_that_know_no_network_do_without_torch(module):
    code = f"import sys, captioner.{module}; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=PACKAGE.parent, check=True)
    assert "torch" not in done.stdout.split()
