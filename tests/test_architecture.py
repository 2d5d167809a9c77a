"""docs/architecture.md tells the ways through the code as they are: they are walked here, and compared."""

import json
import os
import re
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import FrameType

import pytest

import captioner

ROOT = Path(__file__).parents[1]
PACKAGE = str(ROOT / "captioner")

Function = tuple[str, str]  # file in the package, qualified name


def told(heading: str) -> list[Function]:
    """The numbered lists of a section of the page."""
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    section = page.split(f"## {heading}\n")[1].split("\n## ")[0]
    return re.findall(r"^\d+\. `([^`]+)`: `([^`]+)`", section, re.MULTILINE)


def walked(work: Callable[[], object], first: Function | None = None) -> tuple[list[Function], set[str]]:
    """The functions of the package that a call enters from `first` on, in the order of their first call, and the files
    that a call comes back into from another file: A calls B calls A."""
    found: dict[Function, None] = {}
    entered_twice: set[str] = set()

    def note(frame: FrameType, event: str, _: object) -> None:
        if event != "call" or not frame.f_code.co_filename.startswith(PACKAGE):
            return
        name = getattr(frame.f_code, "co_qualname", frame.f_code.co_name)
        file = Path(os.path.relpath(frame.f_code.co_filename, PACKAGE)).as_posix()
        if name == "<module>" or (file, name) in found or not (found or first in (None, (file, name))):
            return
        found[file, name] = None
        below, files = frame.f_back, [file]
        while below is not None:
            if below.f_code.co_filename.startswith(PACKAGE):
                caller = Path(os.path.relpath(below.f_code.co_filename, PACKAGE)).as_posix()
                if caller != files[-1]:
                    files.append(caller)
            below = below.f_back
        if file in files[1:]:
            entered_twice.add(file)

    threading.setprofile(note)
    sys.setprofile(note)
    try:
        work()
    finally:
        sys.setprofile(None)
        threading.setprofile(None)
    return list(found), entered_twice


def _known_as(hop: Function) -> Function:
    """Python 3.10 knows only the last part of a function's name."""
    return hop if sys.version_info >= (3, 11) else (hop[0], hop[1].split(".")[-1])


def require_walked(page: list[Function], found: list[Function]) -> None:
    """Every function told is called, and first called in the order in which it is told."""
    page = [_known_as(hop) for hop in page]
    assert not [hop for hop in page if hop not in found], "told, but not on the way"
    places = [found.index(hop) for hop in page]
    assert places == sorted(places), page


def test_one_photo_to_its_caption(tiny_model):
    model = captioner.load_model(tiny_model, device="cpu", precision="fp32")
    photo = ROOT / "examples" / "cat.jpg"
    model.caption(photo)  # imports, and proofs of kernels
    found, entered_twice = walked(lambda: model.caption(photo))
    page = told("One photo → its caption")
    require_walked(page, found)
    assert 25 <= len(page) <= 40
    assert entered_twice <= {"data/images.py", "runtime/files.py"}


def test_one_caption_to_the_loss(tiny_cnn, tmp_path):
    photos = sorted((ROOT / "examples").glob("*.jpg"))
    rows = [{"file_path": str(photo), "captions": [f"a picture of a {photo.stem}"]} for photo in photos]
    (tmp_path / "raw.json").write_text(json.dumps(rows))
    page, iteration = told("One caption → the loss"), ("training/run_files.py", "Progress.next")
    h5, described = tmp_path / "data.h5", tmp_path / "data.json"
    prepared, _ = walked(
        lambda: captioner.prepare(
            tmp_path / "raw.json",
            num_val=2,
            word_count_threshold=0,
            num_workers=0,
            output_h5=h5,
            output_json=described,
        )
    )
    trained, _ = walked(
        lambda: captioner.train(
            input_h5=str(h5),
            input_json=str(described),
            cnn_model=str(tiny_cnn),
            cnn_layer="pool5",
            cnn_pixels="caffe",
            rnn_size=8,
            input_encoding_size=8,
            max_iters=1,
            batch_size=4,
            num_workers=0,
            gpuid=-1,
            precision="fp32",
            checkpoint_path=str(tmp_path / "run"),
        ),
        first=_known_as(iteration),
    )
    begins = page.index(iteration)
    require_walked(page[:begins], prepared)
    require_walked(page[begins:], trained)
    assert 20 <= len(page) <= 35


@pytest.mark.parametrize(
    "part", sorted(path.name for path in (ROOT / "captioner").iterdir() if (path / "__init__.py").is_file())
)
def test_every_part_is_in_the_table(part):
    table = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8").split("## The parts")[1].split("\n## ")[0]
    assert f"`{part}/`" in table
