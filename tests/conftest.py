"""Fixtures that more than one test file uses."""

import contextlib
import importlib
import io
import json
import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch

from captioner.data.vocabulary import Vocab
from captioner.model.caption_model import CaptionModel
from captioner.model.checkpoint import Checkpoint, save_checkpoint
from captioner.model.config import ModelConfig
from captioner.model.encoder import Encoder
from captioner.training import loop

# Tiny models: a second thread costs more than it brings.
torch.set_num_threads(1)

SHARED = Path(__file__).resolve().parents[2] / "shared"

# They take one to five minutes each, longest first: begun last, they would keep one process busy and the other waiting.
LONG_FILES = (
    "ray",
    "train",
    "fault_injection",
    "presets",
    "distributed",
    "service",
    "train_bundled",
    "plan",
    "metrics_java",
    "prepro",
    "sweep",
)


@pytest.fixture(scope="session")
def shared() -> Path:
    """Real photos and weights beside the project; a clone alone does not have them."""
    if not SHARED.is_dir():
        pytest.skip("needs ../shared (real photos and weights), which is not beside this clone")
    return SHARED


@pytest.fixture(scope="session")
def reference(shared: Path) -> Path:
    """Files and numbers computed by the original neuraltalk2."""
    return shared / "reference" / "neuraltalk2"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    first = {f"test_{name}.py": place for place, name in enumerate(LONG_FILES)}
    items.sort(key=lambda item: first.get(item.path.name, len(first)))


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs a CUDA GPU")


@pytest.fixture(scope="session")
def _path_without_java(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("bin")
    for place in os.environ["PATH"].split(os.pathsep):
        for program in Path(place).glob("*") if Path(place).is_dir() else ():
            if program.name != "java" and not os.path.lexists(folder / program.name):
                (folder / program.name).symlink_to(program)
    return str(folder)


@pytest.fixture
def without_java(_path_without_java: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A computer without Java, on which nobody waits for METEOR."""
    monkeypatch.setenv("PATH", _path_without_java)


@pytest.fixture
def java_says_one(
    without_java: None, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A Java that takes any METEOR for perfect at once: the true one takes long to start."""
    program = tmp_path_factory.mktemp("java") / "java"
    program.write_text(f"#!/bin/sh\nwhile read -r line; do echo 2 2 0 0 2 2 {'0 ' * 14} 1 2 2; done\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}{os.pathsep}{os.environ['PATH']}")


COLOURS = {"red": (220, 30, 30), "green": (30, 200, 40), "blue": (40, 60, 220), "grey": (128, 128, 128)}
TINY_WORDS = ["a", "picture", "red", "green", "blue", "grey", "all", "is", "it", "UNK"]
TINY_SPLITS = ["train"] * 16 + ["val"] * 7 + ["test"] * 5


@pytest.fixture
def crash_at_iteration(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], contextlib.AbstractContextManager[None]]:
    """A context in which training must fail when it begins that iteration."""

    @contextlib.contextmanager
    def crash(at: int) -> Iterator[None]:
        update = loop.update

        def fails(trainer, batch, iteration, **arguments):
            if iteration == at:
                raise RuntimeError("injected")
            return update(trainer, batch, iteration, **arguments)

        with monkeypatch.context() as patched, pytest.raises(RuntimeError, match="injected"):
            patched.setattr(loop, "update", fails)
            yield

    return crash


@pytest.fixture(scope="session")
def tiny_dataset(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """h5 and json of 28 noisy single-colour images, written straight in the original's layout (prepro.py), not by us.

    Image i has 1 + i % 3 captions; two of each three captions name the colour.
    """
    folder = tmp_path_factory.mktemp("tiny")
    rng = np.random.default_rng(0)
    images, labels, starts, ends = [], [], [], []
    for i in range(len(TINY_SPLITS)):
        name, colour = list(COLOURS.items())[i % len(COLOURS)]
        noise = rng.integers(-20, 21, size=(3, 256, 256))
        images.append(np.clip(np.array(colour).reshape(3, 1, 1) + noise, 0, 255).astype(np.uint8))
        starts.append(len(labels) + 1)
        for caption in [f"a {name} picture", f"it is all {name}", "a picture"][: 1 + i % 3]:
            ids = [TINY_WORDS.index(word) + 1 for word in caption.split()]
            labels.append(ids + [0] * (16 - len(ids)))
        ends.append(len(labels))
    with h5py.File(folder / "data.h5", "w") as file:
        file.create_dataset("labels", dtype="uint32", data=labels)
        file.create_dataset("label_start_ix", dtype="uint32", data=starts)
        file.create_dataset("label_end_ix", dtype="uint32", data=ends)
        file.create_dataset("label_length", dtype="uint32", data=[sum(1 for w in row if w) for row in labels])
        file.create_dataset("images", dtype="uint8", data=np.stack(images))
    described = [{"split": split, "file_path": f"img{i}.png", "id": 1000 + i} for i, split in enumerate(TINY_SPLITS)]
    words = {str(i): word for i, word in enumerate(TINY_WORDS, start=1)}
    (folder / "data.json").write_text(json.dumps({"ix_to_word": words, "images": described}))
    return folder / "data.h5", folder / "data.json"


@pytest.fixture
def two_files(tiny_dataset: tuple[Path, Path], tmp_path: Path) -> list:
    """--input_h5 and --input_json of the tiny dataset in two parts; the second knows fewer words, in another order."""
    folder = tmp_path / "parts"
    folder.mkdir()
    described = json.loads(tiny_dataset[1].read_text())
    with h5py.File(tiny_dataset[0]) as file:
        images, labels = file["images"][:], file["labels"][:]
        starts, ends = file["label_start_ix"][:], file["label_end_ix"][:]
    for name, rows, words in (("a", range(19), TINY_WORDS), ("b", range(19, 28), sorted(TINY_WORDS[:9]))):
        ids = np.array([0, *(words.index(word) + 1 if word in words else 0 for word in TINY_WORDS)], np.uint32)
        chosen = slice(rows[0], rows[-1] + 1)
        first, end = int(starts[rows[0]]), int(ends[rows[-1]])
        with h5py.File(folder / f"{name}.h5", "w") as file:
            file["images"], file["labels"] = images[chosen], ids[labels[first - 1 : end]]
            file["label_start_ix"], file["label_end_ix"] = starts[chosen] - (first - 1), ends[chosen] - (first - 1)
            file["label_length"] = (labels[first - 1 : end] > 0).sum(1).astype(np.uint32)
        known = {str(number): word for number, word in enumerate(words, start=1)}
        part = {"ix_to_word": known, "images": described["images"][chosen]}
        (folder / f"{name}.json").write_text(json.dumps(part))
    h5s, jsons = ([folder / f"{name}.{kind}" for name in "ab"] for kind in ("h5", "json"))
    return ["--input_h5", *h5s, "--input_json", *jsons]


@pytest.fixture(scope="session")
def tiny_cnn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A .pth of VGG16's convolutions with torchvision's names, 12 channels wide, random."""
    torch.manual_seed(0)
    encoder = Encoder("pool5", (12,) * 13)
    path = tmp_path_factory.mktemp("cnn") / "tiny_vgg.pth"
    state = {name: tensor for name, tensor in encoder.state_dict().items() if name.startswith("features.")}
    # Random convolutions fade the signal away layer by layer; He's scale keeps it.
    scaled = {k: torch.randn_like(v) * (2 / v[0].numel()) ** 0.5 if v.ndim > 1 else v * 0 for k, v in state.items()}
    scaled["features.28.weight"] *= 0.03  # features of about 1, as real ones are
    torch.save(scaled, path)
    return path


@pytest.fixture(scope="session")
def tiny_model(tiny_cnn: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An untrained model whose captions nevertheless depend on the picture."""
    config = ModelConfig(
        vocab_size=len(TINY_WORDS), encoding_size=16, rnn_size=24, cnn_layer="pool5", conv_widths=(12,) * 13, fc_width=1
    )
    torch.manual_seed(23)
    net = CaptionModel(config)
    net.encoder.load_state_dict(torch.load(tiny_cnn, weights_only=True), strict=False)
    with torch.no_grad():
        net.decoder.output.weight *= 12
        net.decoder.output.bias[-1] -= 2
        net.decoder.embedding.weight *= 0.3
        net.encoder.embed.weight *= 4
    path = tmp_path_factory.mktemp("model") / "model.pt"
    save_checkpoint(path, Checkpoint(config, Vocab(TINY_WORDS), net.state_dict(), decoding={"suppress_unk": 1}))
    return path


@pytest.fixture(scope="session")
def command() -> Callable[..., subprocess.CompletedProcess]:
    """Run `caption-NAME ARGUMENTS..`: argv in; exit code and text out. In this process, to import torch only once."""

    def run_command(name: str, *arguments: object) -> subprocess.CompletedProcess:
        main = importlib.import_module(f"captioner.cli.{name}").main
        argv = [str(argument) for argument in arguments]
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                code = main(argv)
            except SystemExit as stopped:  # argparse
                code = int(stopped.code or 0)
        return subprocess.CompletedProcess(argv, code, out.getvalue(), err.getvalue())

    return run_command
