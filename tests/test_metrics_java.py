"""METEOR, SPICE and the PTB tokeniser: against coco-caption's own wrappers, and when parts are missing or fail."""

import importlib.util
import json
import os
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from captioner.metrics import METRICS, Scores, java, score

needs_java = pytest.mark.skipif(
    shutil.which("java") is None or importlib.util.find_spec("pycocoevalcap") is None,
    reason="needs Java and the extra `metrics`",
)

ODD = [
    ("", ["a dog"]),
    ("...", ["a dog", "!?"]),
    ("a dog", ["..."]),
    ("", [""]),
    ("ein Mädchen läuft – schnell", ["Ein Mädchen läuft."]),
    ("一个人 骑马 👍", ["一个人 骑马", "馬"]),
    ("a dog runs. " * 300, ["the dog runs " * 200]),
    ("a dog runs", ["a dog runs"] * 30),
    ("Don't stop (now) at 12:43 on 22 3/4 St.", ["it's the men's U.S. team's #41 bus & car"]),
    ("a ||| b", ["a | b", "a b"]),
    ("a\ttab and\u00a0hard blank", ["a tab"]),
]


@pytest.fixture(scope="module")
def both(shared: Path) -> Iterator[tuple[Scores, dict]]:
    """Ours and coco-caption's scores of the odd cases and of 300 images of COCO val2017."""
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.meteor.meteor import Meteor
    from pycocoevalcap.rouge.rouge import Rouge
    from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

    captions: dict[int, list[str]] = {}
    for row in json.loads((shared / "data/coco/captions_val2017.json").read_text())["annotations"]:
        captions.setdefault(row["image_id"], []).append(row["caption"])
    images = ODD + [(first, others) for first, *others in list(captions.values())[:300]]
    ours = score([p for p, _ in images], [r for _, r in images], metrics=METRICS, tokenizer="ptb")

    truth = PTBTokenizer().tokenize({i: [{"caption": c} for c in r] for i, (_, r) in enumerate(images)})
    guess = PTBTokenizer().tokenize({i: [{"caption": p}] for i, (p, _) in enumerate(images)})
    bleu, bleus = Bleu(4).compute_score(truth, guess, verbose=0)
    theirs = {f"Bleu_{k + 1}": (bleu[k], bleus[k]) for k in range(4)}
    for name, metric in (("METEOR", Meteor()), ("ROUGE_L", Rouge()), ("CIDEr", Cider())):
        theirs[name] = metric.compute_score(truth, guess)
    yield ours, theirs


@needs_java
@pytest.mark.java
@pytest.mark.parametrize("name", ["Bleu_1", "Bleu_2", "Bleu_3", "Bleu_4", "METEOR", "ROUGE_L", "CIDEr"])
def test_equals_coco_caption(both: tuple[Scores, dict], name: str) -> None:
    ours, theirs = both
    corpus, each = theirs[name]
    np.testing.assert_allclose(ours.per_caption[name], each, atol=1e-9)
    assert ours.corpus[name] == pytest.approx(corpus, abs=1e-9)


@needs_java
@pytest.mark.java
def test_a_line_break_inside_a_caption_shifts_nothing() -> None:
    captions = ["a\ndog", "b\r\ncat", "c\u2028bird\u0085x", "", "last"]
    assert java.tokenise_ptb(captions) == ["a dog", "b cat", "c bird x", "", "last"]


# Stand-ins for Java and for the package, so that these run everywhere.


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a package of empty jars, and on the PATH a `java` that runs the folder's script."""
    for part, names in {
        "meteor": ["meteor-1.5.jar"],
        "tokenizer": ["stanford-corenlp-3.4.1.jar"],
        "spice": ["spice-1.0.jar", "lib/stanford-corenlp-3.6.0.jar", "lib/stanford-corenlp-3.6.0-models.jar"],
    }.items():
        for name in names:
            path = tmp_path / "pycocoevalcap" / part / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
    spec = importlib.machinery.ModuleSpec("pycocoevalcap", None, is_package=True)
    spec.submodule_search_locations = [str(tmp_path / "pycocoevalcap")]
    monkeypatch.setattr(java.importlib.util, "find_spec", lambda name: spec)
    if os.name == "nt":
        pytest.skip("the stand-in for java is a shell script")
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    return tmp_path


def java_does(folder: Path, script: str) -> None:
    program = folder / "java"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(program.stat().st_mode | stat.S_IXUSR)


def test_a_failing_program_is_one_line_and_the_rest_goes_on(fake: Path) -> None:
    java_does(fake, "echo warning >&2; echo 'no memory' >&2; exit 3")
    scores = score(["a dog"] * 5000, [["a dog", "a cat"]] * 5000, metrics=METRICS)
    assert scores.skipped == {
        "METEOR": "METEOR failed with exit code 3: no memory",
        "SPICE": "SPICE failed with exit code 3: no memory",
    }
    assert scores.corpus["Bleu_1"] == pytest.approx(1)


def test_a_program_that_answers_nonsense_is_one_line(fake: Path) -> None:
    java_does(fake, "echo hello")
    scores = score(["a dog", "a cat"], [["a dog"], ["a cat"]], metrics=METRICS)
    assert scores.skipped["METEOR"] == "METEOR gave no answer for some captions; it ended with 'hello'"
    assert scores.skipped["SPICE"].startswith("SPICE gave no scores")
    with pytest.raises(java.Unavailable, match="answered 2 captions with 1 lines"):
        java.tokenise_ptb(["a", "b"])


def test_spice_is_the_mean_of_its_f_scores(fake: Path) -> None:
    answer = [{"image_id": 1, "scores": {"All": {"f": 0.5}}}, {"image_id": 0, "scores": {"All": {"f": 0.25}}}]
    # Its arguments: options, -jar, the jar, the questions, -out, the answers.
    java_does(fake, f'while [ "$1" != -out ]; do shift; done; echo \'{json.dumps(answer)}\' > "$2"')
    scores = score(["a dog", "a cat"], [["a dog"], ["a cat"]], metrics=["SPICE"])
    assert scores.per_caption["SPICE"] == [0.25, 0.5]
    assert scores.corpus["SPICE"] == 0.375


def test_missing_parts_are_named(fake: Path) -> None:
    java_does(fake, "exit 1")
    for path in (fake / "pycocoevalcap").rglob("*.jar"):
        if "models" in path.name or "meteor" in path.name:
            path.unlink()
    skipped = score(["a dog"], [["a dog"]], metrics=METRICS).skipped
    assert skipped["METEOR"].startswith("meteor-1.5.jar is missing in ")
    assert skipped["SPICE"].startswith("stanford-corenlp-3.6.0-models.jar (Stanford CoreNLP 3.6.0) must be put into ")


def test_without_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(java.importlib.util, "find_spec", lambda name: None)
    assert score(["a dog"], [["a dog"]], metrics=METRICS).skipped == dict.fromkeys(
        ("METEOR", "SPICE"), 'pycocoevalcap is not installed (pip install "captioner[metrics]")'
    )
