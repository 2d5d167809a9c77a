"""caption-convert --inspect of any .t7: what is in it, and the same as .npz for NumPy."""

import math
from pathlib import Path

import numpy as np
import pytest
from torch7_writer import Instance, Storage, Tensor, checkpoint, dumps, tensor

from captioner.cli.convert import main

DIGITS = np.arange(2 * 28 * 28, dtype=np.uint8).reshape(2, 1, 28, 28)


def inspected(capsys: pytest.CaptureFixture, *argv: object) -> list[str]:
    assert main([str(argument) for argument in argv] + ["--inspect"]) == 0
    return capsys.readouterr().out.splitlines()


def mnist() -> dict:
    """The form of mnist.t7: pictures and labels; and whatever else a table may hold."""
    shared = {"rate": 0.5}
    return {
        "data": tensor(DIGITS, "Byte"),
        "labels": tensor(np.array([5.0, 10.0]), "Double"),
        "names": {1: "zero", 2: "one"},
        "epochs": {1: 3, 2: 4.5},
        "mixed": {1: 3, "b": True, 2: "x\ny"},
        "net": Instance("nn.Linear", {"weight": tensor(np.ones((2, 3)), "Float"), "opt": shared}),
        "opt": shared,
        "size": 60000,
        "": math.nan,
    }


@pytest.mark.parametrize("ascii", [False, True])
def test_a_data_file_is_listed_and_kept_as_npz(ascii: bool, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    path, output = tmp_path / "mnist.t7", tmp_path / "mnist.npz"
    path.write_bytes(dumps(mnist(), ascii))
    lines = inspected(capsys, path, "--output", output)
    assert lines[1] == "kind: data of Torch7"
    assert "data: 2×1×28×28 uint8" in lines and "labels: 2 float64" in lines
    assert "names: 2 text" in lines and "epochs: 2 float64" in lines
    assert "net: nn.Linear of 2" in lines and "net.weight: 2×3 float32" in lines
    assert "mixed.b: True" in lines and r"mixed.2: x\ny" in lines
    assert lines[-1].startswith(f"wrote: {output}: 11 arrays, ")
    with np.load(output, allow_pickle=False) as kept:
        assert np.array_equal(kept["data"], DIGITS) and kept["labels"].tolist() == [5.0, 10.0]
        assert kept["names"].tolist() == ["zero", "one"] and kept["size"] == 60000
        assert kept["net.weight"].dtype == np.float32 and kept["net.opt.rate"] == 0.5
        assert "opt.rate" not in kept.files  # listed where it comes first
    before = output.read_bytes()
    inspected(capsys, path, "--output", output)  # may be repeated, and gives the same bytes
    assert output.read_bytes() == before


def test_a_number_alone_and_a_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "one.t7").write_bytes(dumps(7))
    assert inspected(capsys, tmp_path / "one.t7")[-1] == "content: 7"
    (tmp_path / "model.t7").write_bytes(dumps(checkpoint()[0]))
    lines = inspected(capsys, tmp_path / "model.t7", "--output", tmp_path / "model.npz")
    assert lines[1] == "kind: neuraltalk2 checkpoint of Torch7"
    with np.load(tmp_path / "model.npz") as kept:
        assert any(name.startswith("protos.lm.") for name in kept.files)


def test_what_cannot_be_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    # One storage of a thousand numbers, seen a million times over.
    views = {i: Tensor(Storage(np.zeros(1000)), (1000, 1000), (0, 1)) for i in range(1, 30)}
    (tmp_path / "bomb.t7").write_bytes(dumps(views))
    (tmp_path / "mine.npz").write_bytes(b"PK\x03\x04 somebody's")
    (tmp_path / "one.t7").write_bytes(dumps(7))
    for name, output, told in (
        ("bomb.t7", "bomb.npz", "tensors of the file overlap"),
        ("one.t7", "one.csv", "as .npz"),
        ("one.t7", "mine.npz", "was not written by this program"),
    ):
        assert main([str(tmp_path / name), "--inspect", "--output", str(tmp_path / output)]) == 1
        error = capsys.readouterr().err
        assert error.startswith("caption-convert: error: ") and error.count("\n") == 1 and told in error
    assert not (tmp_path / "bomb.npz").exists()
