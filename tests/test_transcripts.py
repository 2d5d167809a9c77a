"""The newcomers' transcripts are run: they show what happens, but for the captions, which change with the model.

After a change of the bundled model, `PYTHONPATH=tests:. python -m test_transcripts` writes what happens now into the
page, the training included (minutes; its photos are those of ../shared), and captions into README and docs/python.md.
"""

import json
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from conftest import SHARED

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs/transcripts.md"
PHOTOS = ("astronaut", "cat", "coffee", "rocket")
RUN, TRAIN = (
    re.compile(rf"(?<=<!-- {mark} -->\n```console\n).*?(?=^```$)", re.MULTILINE | re.DOTALL)
    for mark in ("run", "train")
)
# What the page shows of a training's log, and how much of a line.
TOLD = re.compile(r"(images|captions|vocabulary|top words|hint|wrote|preset|validation at|done|image)\b|\d\.jpg$")
WIDEST = 150


def newcomers_home(folder: Path) -> tuple[Path, dict[str, str]]:
    """A home with some photos, and an environment in which the commands are found."""
    (folder / "bin").mkdir()
    for name in ("caption-eval", "caption-score", "caption-prepro", "caption-train"):
        program = folder / "bin" / name
        program.write_text(f'#!/bin/sh\nexec {sys.executable} -m captioner {name.removeprefix("caption-")} "$@"\n')
        program.chmod(0o755)
    home = folder / "home"
    (home / "holiday").mkdir(parents=True)
    for name in PHOTOS:
        shutil.copy(ROOT / f"examples/{name}.jpg", home / "holiday")
    return home, {
        "PATH": f"{folder}/bin:/usr/bin:/bin",
        "PYTHONPATH": str(ROOT),
        "HOME": str(home),
        "OMP_NUM_THREADS": "1",
        "LC_ALL": "C.UTF-8",
    }


def as_it_happens(blocks: re.Pattern[str], text: str, home: Path, environment: dict[str, str]) -> str:
    """The page with the outputs of these blocks' commands as they are now, each run where the one before left off."""

    def run(block: re.Match[str]) -> str:
        shown = ""
        for line in block[0].splitlines():
            if line.startswith("$ "):
                done = subprocess.run(["sh", "-c", line[2:]], cwd=home, env=environment, capture_output=True, text=True)
                assert done.returncode == 0, f"{line}\n{done.stderr}"
                shown += f"{line}\n{done.stdout if blocks is RUN else _told(done.stdout + done.stderr)}"
        return shown

    return blocks.sub(run, text)


def _told(log: str) -> str:
    lines = [line for line in log.splitlines() if TOLD.match(line)]
    return "".join(
        (line if len(line) <= WIDEST else line[:WIDEST].rpartition(", ")[0] + ", …") + "\n" for line in lines
    )


def lay_out_dogs(home: Path) -> None:
    """mine/: photos of dogs that the bundled model was not trained on, with two captions each; walks/: four more."""
    records = json.loads((SHARED / "data/flickr8k/dataset.json").read_text("utf-8"))
    dogs = [
        record
        for record in records
        if record["split"] == "val" and sum(bool(re.search(r"\bdogs?\b", text)) for text in record["captions"]) >= 3
    ]
    (home / "mine").mkdir()
    (home / "walks").mkdir()
    for number, record in enumerate(dogs[:100], start=1):
        shutil.copy(SHARED / "data/flickr8k" / record["file_path"], home / f"mine/{number:03}.jpg")
        (home / f"mine/{number:03}.txt").write_text("\n".join(record["captions"][:2]) + "\n", "utf-8")
    for number, record in enumerate(dogs[100:104], start=1):
        shutil.copy(SHARED / "data/flickr8k" / record["file_path"], home / f"walks/{number}.jpg")


def without_captions(text: str) -> str:
    text = re.sub(r"^(image \d+: ).*(  \(.*\))$", r"\1…\2", text, flags=re.MULTILINE)
    text = re.sub(r"^(\d+,[\w.]+,).*$", r"\1…", text, flags=re.MULTILINE)
    text = re.sub(r"^(photo of ).*$", r"\1…", text, flags=re.MULTILINE)
    return re.sub(r"^ *-?\d+\.\d\d +-?\d+\.\d\d  .*$", "…", text, flags=re.MULTILINE)


def test_the_transcripts_show_what_happens(tmp_path):
    text = PAGE.read_text("utf-8")
    assert len(RUN.findall(text)) >= 4
    assert without_captions(as_it_happens(RUN, text, *newcomers_home(tmp_path))) == without_captions(text)
    album = (tmp_path / "home/holiday.html").read_text("utf-8")
    assert album.count("/9j/") == len(PHOTOS)  # how JPEGs begin in base 64


def test_the_training_is_one_that_the_preset_does():
    """Training itself takes minutes; that what is shown of it is a whole run shows in its lines."""
    shown = "".join(TRAIN.findall(PAGE.read_text("utf-8")))
    commands = [line.split()[1] for line in shown.splitlines() if line.startswith("$ ")]
    assert commands == ["caption-prepro", "caption-prepro", "caption-train", "ls", "caption-eval"]
    iterations = [int(found) for found in re.findall(r"validation at iteration (\d+)", shown)]
    assert iterations[0] == 0 and iterations == sorted(iterations)
    assert f"done: {iterations[-1]} iterations" in shown
    assert len(re.findall(r"^image \d: .*\(\d\.jpg\)$", shown, re.MULTILINE)) == 4


def renew() -> None:
    """Write what happens now into the documentation."""
    import captioner

    with tempfile.TemporaryDirectory() as place:
        home, environment = newcomers_home(Path(place))
        text = as_it_happens(RUN, PAGE.read_text("utf-8"), home, environment)
        if (SHARED / "data/flickr8k").is_dir():
            lay_out_dogs(home)
            text = as_it_happens(TRAIN, text, home, environment)
        else:
            print("the training is left as it was: its photos, ../shared/data, are not here")
    PAGE.write_text(text, "utf-8")
    model = captioner.load_model()

    def caption(name: str) -> str:
        return model.caption(ROOT / "examples" / name).text

    readme, python = ROOT / "README.md", ROOT / "docs/python.md"
    image = re.compile(r"^(image \d+: ).*(  \((\w+\.jpg)\))$", re.MULTILINE)
    text = image.sub(lambda line: f"{line[1]}{caption(line[3])}{line[2]}", readme.read_text("utf-8"))
    readme.write_text(text, "utf-8")
    printed = re.compile(r"^(print\(caption\.text\)  # ).*?(?= \(|$)", re.MULTILINE)
    python.write_text(printed.sub(rf"\g<1>{caption('cat.jpg')}", python.read_text("utf-8")), "utf-8")


if __name__ == "__main__":
    renew()
