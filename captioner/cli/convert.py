"""caption-convert: checkpoints and weights from and for other places (original: convert_checkpoint_gpu_to_cpu.lua)."""

import os
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from captioner.cli.options import Parser, add_overwrite, gpu_number, run
from captioner.errors import InputError, printable
from captioner.runtime.outputs import require_output
from captioner.runtime.quantities import bytes_text

if TYPE_CHECKING:  # torch is imported late, so that --help and argument errors are instant
    from captioner.model.checkpoint import Checkpoint

Kind = Literal["torch7", "caffe", "pytorch", "safetensors"]

LEGACY_PICKLE = b"\x80\x02"  # .pth files from before PyTorch 1.6
CNN_HINT = "use it as it is: caption-train --cnn_model"


def build_parser() -> Parser:
    """The command's options."""
    p = Parser(
        prog="caption-convert",
        description="Convert a neuraltalk2 checkpoint (.t7 to .pt), Caffe's VGG16 (.caffemodel to a torchvision .pth), "
        "or a checkpoint of ours (.pt to _cpu.pt, without resume state; or to .safetensors, and back).",
    )
    p.add_argument("path", help="the file to read")
    p.add_argument(
        "--output",
        help="the file to write (default: beside the one read); .safetensors chooses that format; with --inspect: "
        "F.npz for all that a .t7 holds",
    )
    p.add_argument(
        "--dtype", choices=("float32", "float16", "int8"), default="float32", help="how the weights are stored"
    )
    p.add_argument("--gpuid", type=gpu_number, default=0, help="accepted; without effect here")
    add_overwrite(p)
    p.add_argument("--inspect", action="store_true", help="print what the file holds; any .t7, too")
    return p


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    opt = build_parser().parse_args(argv)
    path, output = Path(opt.path), Path(opt.output) if opt.output else None
    if opt.inspect:
        return run("caption-convert", lambda: inspect(path, output))
    return run("caption-convert", lambda: convert(path, output, opt.dtype))


def convert(path: Path, output: Path | None, dtype: Literal["float32", "float16", "int8"]) -> None:
    """Read `path` by its kind, and write its counterpart."""
    kind = kind_of(path)
    default = {
        "torch7": path.with_suffix(".pt"),
        "caffe": path.with_suffix(".pth"),
        "pytorch": path.with_name(f"{path.stem}_cpu.pt"),
        "safetensors": path.with_suffix(".pt"),
    }
    output = output or default[kind]
    require_output(output, ["model"])
    if kind == "caffe":
        from captioner.convert.export import export_cnn_weights
        from captioner.convert.torchvision import read_cnn_weights

        weights = read_cnn_weights(str(path), "fc7")
        print(f"read {path}: VGG16 for Caffe, {size_of(path)}, {len(weights.state)} arrays", flush=True)
        export_cnn_weights(output, weights.state, weights.pixels, dtype)
    else:
        from captioner.convert.export import export_checkpoint

        checkpoint = load(path, kind)
        title = dict(describe_checkpoint(checkpoint))["model"]
        print(f"read {path}: {KIND_NAMES[kind]}, {size_of(path)}, {title}", flush=True)
        export_checkpoint(output, checkpoint, dtype)
    print(f"wrote {output}: {dtype}, {size_of(output)} ({output.stat().st_size / path.stat().st_size:.0%})")


def inspect(path: Path, output: Path | None = None) -> None:
    """Print what a file holds, one fact a line.

    Args:
        output: an .npz to write with all that a .t7 holds.
    """
    kind = kind_of(path)
    if output and (output.suffix.lower() != ".npz" or kind != "torch7"):
        raise InputError(
            f"{output}: --inspect writes what a .t7 holds as .npz", remedy="leave out --output, or --inspect"
        )
    facts = [("file", f"{path}, {size_of(path)}")]
    if kind == "torch7":
        facts += inspect_torch7(path, output)
    elif kind == "caffe":
        from captioner.convert.caffe import read_caffemodel

        facts += [("kind", "VGG16 for Caffe (pixels: caffe)")]
        facts += [(name, "×".join(map(str, array.shape))) for name, array in read_caffemodel(path).items()]
    elif kind == "pytorch" and (tensors := state_dict_of(path)):
        facts += [("kind", "state_dict of PyTorch")]
        facts += [(name, f"{'×'.join(map(str, t.shape))} {str(t.dtype).removeprefix('torch.')}") for name, t in tensors]
    else:
        facts += [("kind", KIND_NAMES[kind]), *describe_checkpoint(load(path, kind))]
    for name, value in facts:
        print(f"{name}: {value}")


def inspect_torch7(path: Path, output: Path | None) -> list[tuple[str, str]]:
    """Facts about a .t7: a checkpoint's, or the names and kinds of whatever it holds."""
    from captioner.convert.mapped_file import map_file
    from captioner.convert.neuraltalk2 import to_checkpoint
    from captioner.convert.torch7 import parse_torch7
    from captioner.convert.torch7_listing import described, listing, write_npz

    data = map_file(path)
    content = parse_torch7(data, str(path))
    if isinstance(content, dict) and "protos" in content:
        facts = [("kind", KIND_NAMES["torch7"]), *describe_checkpoint(to_checkpoint(content, str(path), data))]
    else:
        facts = [("kind", "data of Torch7"), *((printable(name), described(value)) for name, value in listing(content))]
    if output:
        require_output(output, ["arrays"])
        count = write_npz(output, content, path.stat().st_size)
        facts.append(("wrote", f"{output}: {count} arrays, {size_of(output)}"))
    return facts


KIND_NAMES = {
    "torch7": "neuraltalk2 checkpoint of Torch7",
    "pytorch": "captioner checkpoint",
    "safetensors": "captioner model as .safetensors",
}


def kind_of(path: Path) -> Kind:
    """Told by suffix, else by content."""
    if not os.path.isfile(path):
        problem = "a folder, a pipe or a device" if os.path.exists(path) else "no such file"
        raise InputError(f"{path}: {problem}", remedy="check the path")
    suffixes: dict[str, Kind] = {
        ".t7": "torch7",
        ".caffemodel": "caffe",
        ".pt": "pytorch",
        ".pth": "pytorch",
        ".safetensors": "safetensors",
    }
    if path.suffix.lower() in suffixes:
        return suffixes[path.suffix.lower()]
    with path.open("rb") as stream:
        first = stream.read(4)
    if zipfile.is_zipfile(path) or first.startswith(LEGACY_PICKLE):
        return "pytorch"
    if first and (first[0] <= 8 or first[:1].isdigit()):
        return "torch7"
    raise InputError(f"{path}: unknown kind of file", expected="a .t7, a .caffemodel, a .pt or a .safetensors")


def load(path: Path, kind: Kind) -> "Checkpoint":
    """A checkpoint of any kind."""
    from captioner.model.checkpoint import load_checkpoint

    if kind == "torch7":
        from captioner.convert.neuraltalk2 import load_neuraltalk2

        return load_neuraltalk2(path)
    if kind == "safetensors":
        from captioner.convert.safetensors import read_safetensors

        return read_safetensors(path)
    if state_dict_of(path):
        raise InputError(f"{path}: PyTorch weights, not a checkpoint of ours", remedy=f"{CNN_HINT} {path}")
    return load_checkpoint(path)


def state_dict_of(path: Path) -> list:
    """The names and tensors of a plain PyTorch state_dict; empty where the file is something else."""
    import torch

    from captioner.model.checkpoint import load_plain

    content = load_plain(path)
    if not isinstance(content, dict) or not all(isinstance(value, torch.Tensor) for value in content.values()):
        return []
    return list(content.items())


def describe_checkpoint(checkpoint: "Checkpoint") -> list[tuple[str, str]]:
    """Facts about a checkpoint, the most wanted first."""
    config = checkpoint.config
    parameters = sum(tensor.numel() for tensor in checkpoint.state_dict.values())
    language_model = f"LSTM of {config.num_layers} × {config.rnn_size}"
    if config.decoder == "attention":
        language_model = f"two LSTMs of {config.rnn_size} with attention of {config.attention_heads} heads"
    facts = [
        (
            "model",
            f"VGG16 to {config.cnn_layer}, {language_model}, {config.vocab_size} words, "
            f"iteration {checkpoint.history.iteration}",
        ),
        ("parameters", f"{parameters:,}"),
        ("encoding size", str(config.encoding_size)),
        ("longest caption", f"{config.max_length} words"),
        (
            "pixels",
            config.cnn_pixels + (f": mean {config.pixel_mean}, std {config.pixel_std}" if config.pixel_mean else ""),
        ),
        ("image mode", config.image_mode),
        ("CNN widths", " ".join(map(str, config.conv_widths)) + f", fc {config.fc_width}"),
        ("vocabulary", f"{config.vocab_size} words: {' '.join(checkpoint.vocab.words[:8])} …"),
        ("iteration", str(checkpoint.history.iteration)),
    ]
    if checkpoint.history.best_score is not None:
        facts.append(("best score", f"{checkpoint.history.best_score:.4f}"))
    for name, curve in (
        ("training loss", checkpoint.history.loss_history),
        ("validation loss", checkpoint.history.val_loss_history),
    ):
        if curve:
            last = max(curve)
            facts.append((name, f"{curve[last]:.4f} at iteration {last} ({len(curve)} recorded)"))
    if checkpoint.history.val_lang_stats_history:
        last = max(checkpoint.history.val_lang_stats_history)
        scores = checkpoint.history.val_lang_stats_history[last]
        told = ", ".join(f"{name} {value:.3f}" for name, value in sorted(scores.items()))
        facts.append(("scores", f"{told} at iteration {last}"))
    facts += [(f"option {name}", repr(value)) for name, value in sorted(checkpoint.history.opt.items())]
    return facts


def size_of(path: Path) -> str:
    """A file's size for people."""
    return bytes_text(path.stat().st_size)


if __name__ == "__main__":
    raise SystemExit(main())
