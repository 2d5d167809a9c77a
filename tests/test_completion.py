"""Completion of the commands, in real shells."""

import os
import pty
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from captioner.cli.completion import COMMANDS, script

ROOT = Path(__file__).parents[1]
NEEDS = "needs {}, which scripts/test installs"


@pytest.fixture(scope="module")
def scripts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what caption-completion prints for each shell, and two photos and a folder to be found."""
    folder = tmp_path_factory.mktemp("completion")
    for shell in ("bash", "zsh", "fish"):
        done = subprocess.run(
            [sys.executable, "-m", "captioner", "completion", shell], capture_output=True, text=True, cwd=ROOT
        )
        assert done.returncode == 0, done.stderr
        (folder / f"all.{shell}").write_text(done.stdout)
    (folder / "holiday photos").mkdir()
    (folder / "cat.jpg").touch()
    return folder


# What is typed before Tab, something that must be offered, and something that must not.
CASES = [
    ("caption-eval --recu", "--recursive", "--model"),
    ("caption-eval --precision ", "bf16", "--model"),
    ("caption-eval --existing ap", "append", "prepend"),
    ("caption-train --preset ", "small", "--preset"),
    ("caption-eval --recursive cat", "cat.jpg", "holiday"),
    ("caption-eval --image_folder hol", "holiday photos", "cat.jpg"),
    ("caption-completion ", "fish", "--version"),
]


@pytest.mark.parametrize(("line", "wanted", "unwanted"), CASES)
def test_bash(scripts, line, wanted, unwanted):
    *words, last = line.split(" ")
    program = f"""source all.bash
COMP_WORDS=({" ".join(words)} "{last}"); COMP_CWORD={len(words)}
$(complete -p {words[0]} | sed 's/.*-F \\([^ ]*\\).*/\\1/')
printf '%s\\n' "${{COMPREPLY[@]}}\""""
    done = subprocess.run(
        ["bash", "--norc", "-c", program], cwd=scripts, capture_output=True, text=True, timeout=60, check=True
    )
    offered = done.stdout.splitlines()
    assert any(one.startswith(wanted) for one in offered), (offered, done.stderr)
    assert not any(one.startswith(unwanted) for one in offered)


@pytest.mark.skipif(not shutil.which("fish"), reason=NEEDS.format("fish"))
@pytest.mark.parametrize(("line", "wanted", "unwanted"), CASES)
def test_fish(scripts, line, wanted, unwanted):
    program = f'source all.fish; complete --do-complete "{line}"'
    environment = {**os.environ, "HOME": str(scripts), "XDG_CONFIG_HOME": str(scripts / "none")}
    done = subprocess.run(
        ["fish", "--no-config", "-c", program],
        cwd=scripts,
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    offered = [one.split("\t")[0].replace("\\ ", " ") for one in done.stdout.splitlines()]
    assert any(one.startswith(wanted) for one in offered), (offered, done.stderr)
    assert not any(one.startswith(unwanted) for one in offered)


@pytest.mark.skipif(not shutil.which("zsh"), reason=NEEDS.format("zsh"))
@pytest.mark.parametrize(
    ("line", "completed"),
    [
        ("caption-eval --recu", "caption-eval --recursive "),
        ("caption-eval --existing ap", "caption-eval --existing append "),
        ("caption-eval --recursive cat", "caption-eval --recursive cat.jpg "),
        ("caption-eval --image_folder hol", "caption-eval --image_folder holiday\\ photos/"),
    ],
)
def test_zsh_at_a_press_of_tab(scripts, line, completed):
    """zsh completes only where lines are typed: on a terminal of its own, where Ctrl-T shows the line as it is."""
    (scripts / "rc").write_text(
        "autoload -Uz compinit; compinit -u -D\n"
        'eval "$(cat all.zsh)"\n'
        'show() { print -r -- "<$BUFFER>" > shown; exit }; zle -N show; bindkey "^T" show; bindkey "^I" complete-word\n'
        "PS1='ready'\n"
    )
    (scripts / "shown").unlink(missing_ok=True)
    pid, terminal = pty.fork()
    if not pid:
        os.chdir(scripts)
        os.execvpe("zsh", ["zsh", "-f", "-i"], {**os.environ, "TERM": "dumb"})
    try:
        os.write(terminal, b"source ./rc\n")
        seen = b""
        while b"ready" not in seen.partition(b"source ./rc")[2]:
            seen += os.read(terminal, 4096)
        os.write(terminal, line.encode() + b"\t\x14")
        deadline = time.monotonic() + 60
        while not (scripts / "shown").exists() or not (scripts / "shown").read_text().endswith("\n"):
            assert time.monotonic() < deadline, seen
            time.sleep(0.05)
        assert (scripts / "shown").read_text() == f"<{completed}>\n"
    finally:
        os.close(terminal)
        os.waitpid(pid, 0)


def test_every_command_is_completed():
    from captioner.__main__ import COMMANDS as LISTED

    assert set(COMMANDS) == set(LISTED)


def test_without_shtab_it_is_one_line(monkeypatch):
    from captioner.errors import InputError

    monkeypatch.setitem(sys.modules, "shtab", None)
    with pytest.raises(InputError, match="pip install"):
        script("eval", "bash")
