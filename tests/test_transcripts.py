"""The newcomers' transcripts are run: they show what happens, but for the captions, which change with the model.

`PYTHONPATH=tests python -m test_transcripts` writes what happens now into the page.
"""

import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs/transcripts.md"
PHOTOS = ("astronaut", "cat", "coffee", "rocket")
BLOCK = re.compile(r"(?<=<!-- run -->\n```console\n).*?(?=^```$)", re.MULTILINE | re.DOTALL)


def as_it_happens(text: str, folder: Path) -> str:
    """The page with the outputs of its commands as they are now, each command run where the one before left off."""
    (folder / "bin").mkdir()
    for name in ("caption-eval", "caption-score"):
        program = folder / "bin" / name
        program.write_text(f'#!/bin/sh\nexec {sys.executable} -m captioner {name.removeprefix("caption-")} "$@"\n')
        program.chmod(0o755)
    (folder / "home/holiday").mkdir(parents=True)
    for name in PHOTOS:
        shutil.copy(ROOT / f"examples/{name}.jpg", folder / "home/holiday")
    environment = {
        "PATH": f"{folder}/bin:/usr/bin:/bin",
        "PYTHONPATH": str(ROOT),
        "HOME": str(folder / "home"),
        "OMP_NUM_THREADS": "1",
        "LC_ALL": "C.UTF-8",
    }

    def run(block: re.Match[str]) -> str:
        shown = ""
        for line in block[0].splitlines():
            if line.startswith("$ "):
                done = subprocess.run(
                    ["sh", "-c", line[2:]], cwd=folder / "home", env=environment, capture_output=True, text=True
                )
                assert done.returncode == 0, f"{line}\n{done.stderr}"
                shown += f"{line}\n{done.stdout}"
        return shown

    return BLOCK.sub(run, text)


def without_captions(text: str) -> str:
    text = re.sub(r"^(image \d+: ).*(  \(.*\))$", r"\1…\2", text, flags=re.MULTILINE)
    text = re.sub(r"^(\d+,[\w.]+,).*$", r"\1…", text, flags=re.MULTILINE)
    text = re.sub(r"^(photo of ).*$", r"\1…", text, flags=re.MULTILINE)
    return re.sub(r"^ *-?\d+\.\d\d +-?\d+\.\d\d  .*$", "…", text, flags=re.MULTILINE)


def test_the_transcripts_show_what_happens(tmp_path):
    text = PAGE.read_text("utf-8")
    assert len(BLOCK.findall(text)) >= 4
    assert without_captions(as_it_happens(text, tmp_path)) == without_captions(text)
    album = (tmp_path / "home/holiday.html").read_text("utf-8")
    assert album.count("/9j/") == len(PHOTOS)  # how JPEGs begin in base 64


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as place:
        PAGE.write_text(as_it_happens(PAGE.read_text("utf-8"), Path(place)), "utf-8")
