"""caption-convert from outside: argv in; files, text and exit code out."""

import json
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
import torchvision
from caffe_writer import narrow_net, written
from safetensors import safe_open
from safetensors.torch import save_file
from torch7_writer import checkpoint, dumps

from captioner.cli.convert import main
from captioner.convert.torchvision import read_cnn_weights
from captioner.model.caption_model import build_model
from captioner.model.checkpoint import load_checkpoint

WIDE = {"encoding_size": 24, "rnn_size": 32, "words": 40, "fc_width": 48}


@pytest.fixture
def t7(tmp_path: Path) -> Path:
    path = tmp_path / "model.t7"
    path.write_bytes(dumps(checkpoint(**WIDE)[0]))
    return path


@pytest.fixture
def caffemodel(tmp_path: Path) -> Path:
    path = tmp_path / "vgg.caffemodel"
    path.write_bytes(written(narrow_net(), old=True))
    return path


def error_of(capsys: pytest.CaptureFixture, *argv: object) -> str:
    assert main([str(argument) for argument in argv]) == 1
    captured = capsys.readouterr()
    assert captured.err.startswith("caption-convert: error: ") and captured.err.count("\n") == 1
    return captured.err


def test_t7_becomes_pt_beside_it(t7: Path, capsys: pytest.CaptureFixture) -> None:
    assert main([str(t7)]) == 0
    out = capsys.readouterr().out.splitlines()
    assert out[0].startswith(f"read {t7}: neuraltalk2 checkpoint of Torch7, ") and "40 words" in out[0]
    assert out[1].startswith(f"wrote {t7.with_suffix('.pt')}: float32, ") and out[1].endswith("%)")
    converted = load_checkpoint(t7.with_suffix(".pt"))
    assert build_model(converted, "x").config.rnn_size == 32
    assert torch.load(t7.with_suffix(".pt"), weights_only=True)["format_version"] == 1


def test_pt_becomes_cpu_pt_in_less_space(t7: Path, capsys: pytest.CaptureFixture) -> None:
    assert main([str(t7)]) == 0
    pt, sizes = t7.with_suffix(".pt"), []
    before = load_checkpoint(pt)
    for dtype, tolerance in (("float32", 0.0), ("float16", 1e-3), ("int8", 1e-2)):
        assert main([str(pt), "--dtype", dtype]) == 0
        cpu = t7.with_name("model_cpu.pt")
        after = load_checkpoint(cpu)
        for name, tensor in before.state_dict.items():
            assert (after.state_dict[name] - tensor).abs().max() <= tolerance * tensor.abs().max()
        assert (after.config, after.vocab, after.history.opt) == (before.config, before.vocab, before.history.opt)
        sizes.append(sum(entry.file_size for entry in zipfile.ZipFile(cpu).infolist() if "/data/" in entry.filename))
    assert sizes[1] < 0.55 * sizes[0] and sizes[2] < 0.4 * sizes[0]


def test_resume_state_is_left_out(t7: Path) -> None:
    assert main([str(t7)]) == 0
    content = torch.load(t7.with_suffix(".pt"), weights_only=True)
    resume = t7.with_name("run_resume.pt")
    torch.save({**content, "optimizers": {"adam": torch.ones(1000)}, "first_loss": 1.0}, resume)
    assert main([str(resume)]) == 0
    assert torch.load(t7.with_name("run_resume_cpu.pt"), weights_only=True).keys() == content.keys()


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_safetensors_has_the_tensors_and_comes_back(t7: Path, dtype: str) -> None:
    out = t7.with_suffix(".safetensors")
    assert main([str(t7), "--output", str(out), "--dtype", dtype]) == 0
    with safe_open(out, "pt") as file:
        metadata = file.metadata()
        tensors = {name: file.get_tensor(name) for name in sorted(file.keys())}
    assert json.loads(metadata["config"])["rnn_size"] == 32
    assert json.loads(metadata["vocab"])["ix_to_word"]["1"] == "w1"
    assert main([str(t7)]) == 0
    direct = load_checkpoint(t7.with_suffix(".pt"))
    assert tensors.keys() == direct.state_dict.keys()
    for name, tensor in direct.state_dict.items():
        assert tensors[name].dtype == getattr(torch, dtype) and torch.equal(
            tensors[name], tensor.to(tensors[name].dtype)
        )
    assert main([str(out), "--output", str(t7.with_name("back.pt"))]) == 0
    back = load_checkpoint(t7.with_name("back.pt"))
    assert (back.config, back.vocab, back.decoding) == (direct.config, direct.vocab, direct.decoding)
    assert (back.history.opt, back.history.iteration) == (direct.history.opt, direct.history.iteration)
    assert all(torch.equal(back.state_dict[name], tensor.float()) for name, tensor in tensors.items())


def test_other_and_damaged_safetensors_are_one_line(t7: Path, capsys: pytest.CaptureFixture) -> None:
    foreign = t7.with_name("foreign.safetensors")
    save_file({"weight": torch.zeros(2)}, foreign)
    assert "no model of ours" in error_of(capsys, foreign)
    out = t7.with_suffix(".safetensors")
    assert main([str(t7), "--output", str(out)]) == 0
    out.write_bytes(out.read_bytes()[:-7])
    assert "damaged" in error_of(capsys, out)


def test_caffemodel_becomes_a_pth_that_torchvision_reads(
    caffemodel: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    assert main([str(caffemodel)]) == 0
    pth = caffemodel.with_suffix(".pth")
    direct, stored = read_cnn_weights(str(caffemodel), "fc7"), read_cnn_weights(str(pth), "fc7")
    assert stored.pixels == direct.pixels == "caffe"  # it travels with the weights
    assert stored.conv_widths == direct.conv_widths
    assert all(torch.equal(stored.state[name], value) for name, value in direct.state.items())
    features = torchvision.models.vgg16(init_weights=False).features
    names = {name.removeprefix("features.") for name in stored.state if name.startswith("features.")}
    assert names == features.state_dict().keys()
    assert "int8" in error_of(capsys, caffemodel, "--dtype", "int8")


def test_inspect_says_what_a_file_is(t7: Path, caffemodel: Path, capsys: pytest.CaptureFixture) -> None:
    assert main(["--inspect", str(t7)]) == 0
    out = capsys.readouterr().out
    for fact in ("kind: neuraltalk2 checkpoint", "40 words: w1 w2", "iteration: 50", "option learning_rate: 0.0004"):
        assert fact in out
    assert "validation loss: 1.5000 at iteration 50" in out and "best score: -1.5000" in out
    assert sorted(path.name for path in t7.parent.iterdir()) == ["model.t7", "vgg.caffemodel"]  # nothing written
    assert main([str(t7)]) == main([str(caffemodel)]) == 0
    capsys.readouterr()
    for path, fact in [
        (t7.with_suffix(".pt"), "kind: captioner checkpoint"),
        (caffemodel, "features.0.weight: 1×3×3×3"),
        (caffemodel.with_suffix(".pth"), "classifier.3.bias: 1 float32"),
    ]:
        assert main([str(path), "--inspect"]) == 0
        assert fact in capsys.readouterr().out


def test_kinds_are_told_by_content_too(t7: Path, capsys: pytest.CaptureFixture) -> None:
    plain = t7.rename(t7.with_name("checkpoint"))
    assert main([str(plain)]) == 0
    pt = t7.with_name("checkpoint.pt").rename(t7.with_name("converted"))
    assert main([str(pt), "--inspect"]) == 0


class Evil:
    def __reduce__(self) -> tuple:
        return (print, ("code was run",))


def test_what_cannot_be_converted_is_one_line(
    t7: Path, caffemodel: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    assert main([str(caffemodel)]) == 0
    capsys.readouterr()
    torch.save({"format_version": 1, "state_dict": Evil()}, tmp_path / "evil.pt")
    assert "could run code" in error_of(capsys, tmp_path / "evil.pt")
    assert "could run code" in error_of(capsys, "--inspect", tmp_path / "evil.pt")
    assert "--cnn_model" in error_of(capsys, caffemodel.with_suffix(".pth"))
    assert "no such file" in error_of(capsys, tmp_path / "missing.t7")
    assert "a folder" in error_of(capsys, tmp_path)
    (tmp_path / "notes.txt").write_text("hello")
    assert "unknown kind of file" in error_of(capsys, tmp_path / "notes.txt")
    t7.write_bytes(t7.read_bytes()[:5000])
    assert re.search(r"model.t7: byte \d+: the file ends", error_of(capsys, t7))
    assert "is an input of this command" in error_of(capsys, t7, "--output", t7)
    assert "cannot be written" in error_of(capsys, caffemodel, "--output", tmp_path / "no" / "x.pth")


def test_as_a_program(t7: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "captioner.cli.convert", str(t7), "-dtype", "float16"], capture_output=True, text=True
    )
    assert done.returncode == 0 and "wrote" in done.stdout and done.stderr == ""
