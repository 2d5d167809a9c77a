"""coco-caption's Java programs: the PTB tokeniser, METEOR 1.5 and SPICE 1.0.

The programs come with the package pycocoevalcap (the extra `metrics`); only its jar files are used. Nothing is
written into the package's folder, which may be read-only or used by several runs at once.
"""

import importlib.util
import json
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from captioner.metrics.measure import Measure, mean_measure

# UTF-8 whatever the locale; one thread for garbage is enough for programs that run for seconds.
_JAVA_OPTIONS = ("-Dfile.encoding=UTF-8", "-XX:+UseSerialGC")
_METEOR_MEMORY = "-Xmx2G"  # holds its paraphrase table
_SPICE_MEMORY = "-Xmx8G"
# What coco-caption drops from the PTB tokeniser's output. Bracket names stay: see `captioner.data.tokenizers`.
_PTB_PUNCTUATION = frozenset("'' ' `` ` . ? ! , : - -- ... ;".split())

# METEOR's parameters for English (Denkowski and Lavie 2014).
_ALPHA, _BETA, _GAMMA, _DELTA = 0.85, 0.2, 0.6, 0.75
_STAGE_WEIGHTS = np.array([1.0, 0.6, 0.8, 0.6])  # exact, stem, synonym, paraphrase
_METEOR_COLUMNS = 23


class Unavailable(Exception):
    """A Java program cannot run here; the message says why, to follow 'skipped because'."""


def _jar(part: str, name: str) -> str:
    package = importlib.util.find_spec("pycocoevalcap")
    folders = list(package.submodule_search_locations or []) if package else []
    for folder in folders:
        path = Path(folder) / part / name
        if path.is_file():
            return str(path)
    reason = f"{name} is missing in {folders[0]}" if folders else "pycocoevalcap is not installed"
    raise Unavailable(f'{reason} (pip install "captioner[metrics]")')


class _Program:
    """A Java program at work on `text`; it has its input in a file, so it may end before reading all of it."""

    def __init__(self, name: str, options: Sequence[str], text: str = "") -> None:
        java = shutil.which("java")
        if java is None:
            raise Unavailable("there is no Java: no program `java` is on the PATH")
        self._name = name
        with tempfile.TemporaryFile() as stdin:
            stdin.write(text.encode())
            stdin.seek(0)
            command = [java, *_JAVA_OPTIONS, *options]
            try:
                self._process = subprocess.Popen(command, stdin=stdin, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
            except OSError as error:
                raise Unavailable(f"{java} does not start ({error.strerror or error})") from error

    def lines(self) -> list[str]:
        """Wait for the end; the lines of the answer."""
        try:
            answer, complaint = self._process.communicate()
        except BaseException:  # an interrupt must not leave the program running
            self.stop()
            raise
        if self._process.returncode:
            last = " ".join(complaint.decode(errors="replace").strip().splitlines()[-1:])
            raise Unavailable(f"{self._name} failed with exit code {self._process.returncode}: {last}")
        return answer.decode(errors="replace").split("\n")[:-1]

    def stop(self) -> None:
        """End it, if it is still running."""
        if self._process.poll() is None:
            self._process.kill()
            self._process.communicate()


def tokenise_ptb(captions: Sequence[str]) -> list[str]:
    """coco-caption's tokeniser: Stanford's PTBTokenizer in lower case, then without punctuation.

    Raises:
        Unavailable: no Java, or the jar is not there.
    """
    jar = _jar("tokenizer", "stanford-corenlp-3.4.1.jar")
    options = ("-preserveLines", "-lowerCase", "-encoding", "UTF-8")
    # A line break of any kind inside a caption would shift all captions after it.
    text = "".join(" ".join(caption.split()) + "\n" for caption in captions)
    command = ("-cp", jar, "edu.stanford.nlp.process.PTBTokenizer", *options)
    lines = _Program("the PTB tokeniser", command, text).lines()
    if len(lines) != len(captions):
        raise Unavailable(f"the PTB tokeniser answered {len(captions)} captions with {len(lines)} lines")
    return [" ".join(word for word in line.rstrip().split(" ") if word not in _PTB_PUNCTUATION) for line in lines]


class Meteor:
    """METEOR at work on N tokenised captions. Its start takes seconds: other scores can be computed meanwhile.

    Raises:
        Unavailable: no Java, or the jar is not there.
    """

    def __init__(self, predictions: Sequence[str], references: Sequence[Sequence[str]]) -> None:
        jar = _jar("meteor", "meteor-1.5.jar")
        questions = "".join(
            " ||| ".join(["SCORE", *map(_one_field, captions), _one_field(prediction)]) + "\n"
            for prediction, captions in zip(predictions, references, strict=True)
        )
        options = (_METEOR_MEMORY, "-jar", jar, "-", "-", "-stdio", "-l", "en", "-norm")
        self._program = _Program("METEOR", options, questions)
        self._num_images = len(predictions)

    def stop(self) -> None:
        """End the program if its answer is no longer wanted."""
        self._program.stop()

    def measure(self) -> Measure:
        """Wait for the scores.

        Raises:
            Unavailable: the program failed.
        """
        lines = self._program.lines()
        try:
            rows = np.array([line.split() for line in lines], dtype=np.float64)
        except ValueError:
            rows = np.zeros(0)
        if rows.shape != (self._num_images, _METEOR_COLUMNS):
            raise Unavailable(f"METEOR gave no answer for some captions; it ended with {' '.join(lines[-1:])!r}")
        # A prediction equal to a reference is one chunk without a fragmentation penalty, also inside a corpus.
        perfect = (rows[:, 21] == rows[:, 0]) & (rows[:, 22] == rows[:, 1]) & (rows[:, 20] == 1)
        rows[perfect, 20] = 0
        return Measure(_meteor(rows), rows, _meteor)


def _one_field(caption: str) -> str:
    return " ".join(caption.replace("|||", "").split())


def _meteor(sums: np.ndarray) -> np.ndarray:
    """METEOR from its sufficient statistics (..., 23).

    Columns: length of prediction and reference, function words of both; for each stage matched content words of
    prediction and reference, function words of both; chunks; matched words of prediction and reference.
    """
    stages = sums[..., 4:20].reshape(*sums.shape[:-1], 4, 4)
    weighted = np.einsum("...sc,s->...c", stages, _STAGE_WEIGHTS)
    matched = _DELTA * weighted[..., :2] + (1 - _DELTA) * weighted[..., 2:]  # (..., 2): prediction, reference
    length = _DELTA * (sums[..., :2] - sums[..., 2:4]) + (1 - _DELTA) * sums[..., 2:4]
    share = _divide(matched, length)
    precision, recall = share[..., 0], share[..., 1]
    f_mean = _divide(precision * recall, _ALPHA * precision + (1 - _ALPHA) * recall)
    fragmentation = _divide(sums[..., 20], (sums[..., 21] + sums[..., 22]) / 2)
    return f_mean * (1 - _GAMMA * fragmentation**_BETA)


def _divide(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return np.divide(a, b, out=np.zeros(np.shape(a)), where=b != 0)


def spice(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> Measure:
    """SPICE of N tokenised captions: F-score over scene graphs, mean over images (Anderson et al. 2016).

    Raises:
        Unavailable: no Java, parts missing (CoreNLP 3.6.0 does not come with the package), or the program failed.
    """
    jar = Path(_jar("spice", "spice-1.0.jar"))
    missing = [
        name
        for name in ("stanford-corenlp-3.6.0.jar", "stanford-corenlp-3.6.0-models.jar")
        if not (jar.parent / "lib" / name).is_file()
    ]
    if missing:
        raise Unavailable(f"{' and '.join(missing)} (Stanford CoreNLP 3.6.0) must be put into {jar.parent / 'lib'}")
    images = [
        {"image_id": i, "test": prediction, "refs": list(captions)}
        for i, (prediction, captions) in enumerate(zip(predictions, references, strict=True))
    ]
    with tempfile.TemporaryDirectory() as folder:
        questions, answers = Path(folder) / "captions.json", Path(folder) / "scores.json"
        questions.write_text(json.dumps(images), encoding="ascii")
        _Program("SPICE", (_SPICE_MEMORY, "-jar", str(jar), str(questions), "-out", str(answers), "-silent")).lines()
        try:
            rows = json.loads(answers.read_text(encoding="utf-8"))
            score_of = {row["image_id"]: float(row["scores"]["All"]["f"]) for row in rows}
            scores = np.array([score_of[i] for i in range(len(images))])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise Unavailable(f"SPICE gave no scores ({type(error).__name__}: {error})") from error
    return mean_measure(scores)
