"""What is handed out: the wheel and the source archive hold the package, the page and the bundled model."""

import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
BUILD = "import sys, setuptools.build_meta as backend; print(getattr(backend, sys.argv[1])(sys.argv[2]))"


def _build(kind: str, source: Path, out: Path) -> Path:
    command = [sys.executable, "-c", BUILD, kind, str(out)]
    done = subprocess.run(command, cwd=source, capture_output=True, text=True, check=True)
    return out / done.stdout.split()[-1]


@pytest.fixture(scope="module")
def archives(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The source archive, and the wheel built from it."""
    folder = tmp_path_factory.mktemp("dist")
    source = folder / "source"
    for name in ("captioner", "vis"):
        ignore = shutil.ignore_patterns("__pycache__", "imgs", "vis.json", "scores.json")
        shutil.copytree(ROOT / name, source / name, ignore=ignore)
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    sdist = _build("build_sdist", source, folder)
    with tarfile.open(sdist) as archive:
        archive.extractall(folder / "unpacked", filter="data")
    (unpacked,) = (folder / "unpacked").iterdir()
    return sdist, _build("build_wheel", unpacked, folder)


def _package_files() -> set[str]:
    modules = {path.relative_to(ROOT).as_posix() for path in (ROOT / "captioner").rglob("*.py")}
    folders = (ROOT / "captioner" / "assets", ROOT / "captioner" / "service" / "upload")
    assets = {path.relative_to(ROOT).as_posix() for folder in folders for path in folder.glob("*")}
    return modules | assets


def test_the_wheel_holds_every_module_the_assets_and_the_page(archives):
    with zipfile.ZipFile(archives[1]) as wheel:
        names = set(wheel.namelist())
    page = {
        f"captioner/page/{path.name}" for path in (ROOT / "vis").iterdir() if path.suffix in (".html", ".css", ".js")
    }
    assert "captioner/page/index.html" in page
    assert _package_files() | page <= names
    assert any(name.endswith("LICENSE") for name in names)
    assert not {name for name in names if "imgs/" in name or name.startswith("tests")}


def test_the_source_archive_holds_the_licence_and_the_readme(archives):
    with tarfile.open(archives[0]) as sdist:
        names = {name.split("/", 1)[-1] for name in sdist.getnames()}
    assert _package_files() | {"LICENSE", "README.md", "pyproject.toml", "vis/index.html"} <= names


def test_the_installed_package_writes_its_page(archives, tmp_path):
    with zipfile.ZipFile(archives[1]) as wheel:
        wheel.extractall(tmp_path / "site")
    code = (
        "import captioner, captioner.output.page as page; print(captioner.__file__, page.VisWriter('out').finish([]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={"PYTHONPATH": str(tmp_path / "site")},
        capture_output=True,
        text=True,
        check=True,
    )
    assert str(tmp_path / "site") in done.stdout
    assert (tmp_path / "out" / "index.html").read_bytes() == (ROOT / "vis" / "index.html").read_bytes()


def test_the_test_run_installs_every_extra():
    """Whatever can be installed is tested: an extra that scripts/test leaves out would be tested nowhere."""
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    section = project.split("[project.optional-dependencies]")[1].split("\n[")[0]
    extras = set(re.findall(r"^(\w+) = \[", section, re.MULTILINE))
    installed = re.search(r"^scripts/setup (\S+)$", (ROOT / "scripts" / "test").read_text(), re.MULTILINE)
    assert installed
    stores = {"s3", "gs", "hf"}  # no such store can be started here; tests use fsspec's own kinds of address
    assert set(installed[1].split(",")) == extras - stores


@pytest.mark.parametrize("script", ["setup", "demo", "test", "check", "sweep", "fuzz", "../.ci/run"])
def test_scripts_are_bash_and_can_be_run(script):
    path = ROOT / "scripts" / script
    assert path.stat().st_mode & 0o111
    subprocess.run(["bash", "-n", path], check=True)


def test_the_image_is_made_of_files_that_are_there_and_let_through():
    import fnmatch

    tomllib = pytest.importorskip("tomllib")  # from Python 3.11 on

    steps = (ROOT / "Dockerfile").read_text().replace("\\\n", " ")
    ignored = (ROOT / ".dockerignore").read_text().split()
    copied = [name for line in re.findall(r"^COPY (.*) \S+$", steps, re.MULTILINE) for name in line.split()]
    assert {f"!{name}" for name in copied} <= set(ignored)
    assert all((ROOT / name).exists() for name in copied)
    # setup.py, and whatever pyproject.toml names, is among them.
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert {project["readme"], "setup.py", "pyproject.toml", "captioner", "vis", "LICENSE"} <= set(copied)
    (extras,) = re.findall(r"'/src\[(.*)\]'", steps)
    assert set(extras.split(",")) <= set(project["optional-dependencies"])
    assert re.search(r"^USER \d{4,}$", steps, re.MULTILINE)  # by number, so that whoever starts it sees: not root
    command = re.findall(r'^CMD \["([^"]+)"', steps, re.MULTILINE)[-1]
    assert command in project["scripts"]
    assert not [name for name in copied if any(fnmatch.fnmatch(name, one) for one in ignored if one[0] not in "!*")]


@pytest.mark.parametrize("path", sorted((ROOT / ".github/ISSUE_TEMPLATE").iterdir()), ids=lambda path: path.stem)
def test_issue_forms_are_complete(path):
    import yaml

    form = yaml.safe_load(path.read_text())
    assert form["name"] and form["description"]
    ids = [one.get("id") for one in form["body"] if one["type"] != "markdown"]
    assert len(ids) == len(set(ids)) and all(ids)
    assert all(one["attributes"].get("label") or one["type"] == "markdown" for one in form["body"])
