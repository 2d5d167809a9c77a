"""Every option of the original under its own name and default, in every spelling; and how commands end."""

import argparse
import importlib
import subprocess
import sys

import pytest

from captioner import __version__
from captioner.cli.options import Parser, Range, flag, run
from captioner.errors import InputError

COMMANDS = ("download", "prepro", "train", "eval", "convert", "score", "sweep")

# Read off prepro.py, train.lua and eval.lua of neuraltalk2; None: required.
ORIGINAL = {
    "prepro": {
        "input_json": None,
        "num_val": None,
        "output_json": "data.json",
        "output_h5": "data.h5",
        "max_length": 16,
        "images_root": "",
        "word_count_threshold": 5,
        "num_test": 0,
    },
    "train": {
        "input_h5": "coco/data.h5",
        "input_json": "coco/data.json",
        "cnn_proto": "",
        "cnn_model": "imagenet",
        "start_from": "",
        "rnn_size": 512,
        "input_encoding_size": 512,
        "max_iters": -1,
        "batch_size": 16,
        "grad_clip": 0.1,
        "drop_prob_lm": 0.5,
        "finetune_cnn_after": -1,
        "seq_per_img": 5,
        "optim": "adam",
        "learning_rate": 4e-4,
        "learning_rate_decay_start": -1,
        "learning_rate_decay_every": 50000,
        "optim_alpha": 0.8,
        "optim_beta": 0.999,
        "optim_epsilon": 1e-8,
        "cnn_optim": "adam",
        "cnn_optim_alpha": 0.8,
        "cnn_optim_beta": 0.999,
        "cnn_learning_rate": 1e-5,
        "cnn_weight_decay": 0,
        "val_images_use": 3200,
        "save_checkpoint_every": 2500,
        "checkpoint_path": "",
        "language_eval": False,
        "losses_log_every": 25,
        "backend": "cudnn",
        "id": "",
        "seed": 123,
        "gpuid": 0,
        "num_layers": 1,
    },
    "eval": {
        "model": [],
        "batch_size": 1,
        "num_images": None,  # 100 for a split, all for a folder
        "language_eval": False,
        "dump_images": True,
        "dump_json": True,
        "dump_path": False,
        "sample_max": True,
        "beam_size": None,  # 2, unless the model's file says otherwise
        "temperature": 1.0,
        "image_folder": "",
        "image_root": "",
        "input_h5": "",
        "input_json": "",
        "split": "test",
        "coco_json": "",
        "backend": "cudnn",
        "id": "evalscript",
        "seed": 123,
        "gpuid": 0,
    },
}
REQUIRED = {"prepro": ["--input_json", "raw.json", "--num_val", "1"], "train": [], "eval": []}


def parser_of(command: str) -> argparse.ArgumentParser:
    return importlib.import_module(f"captioner.cli.{command}").build_parser()


@pytest.mark.parametrize("command", ORIGINAL)
def test_original_options_keep_their_names_and_defaults(command):
    parsed = vars(parser_of(command).parse_args(REQUIRED[command]))
    expected = {name: value for name, value in ORIGINAL[command].items() if f"--{name}" not in REQUIRED[command]}
    assert {name: parsed[name] for name in expected} == expected


@pytest.mark.parametrize("command", ("prepro", "train", "eval"))
def test_every_option_is_documented(command):
    for action in parser_of(command)._actions:
        assert action.help, f"caption-{command} {action.option_strings} has no help text"


@pytest.mark.parametrize("spelling", ["--beam_size", "--beam-size", "-beam_size", "-beam-size"])
def test_all_spellings_mean_the_same(spelling):
    parser = parser_of("eval")
    assert parser.parse_args([spelling, "5"]).beam_size == 5
    assert parser.parse_args([spelling + "=5"]).beam_size == 5


def test_values_are_left_alone():
    parsed = parser_of("eval").parse_args(["-num_images", "-1", "-image_folder", "-my-odd_folder", "--id", "a-b"])
    assert (parsed.num_images, parsed.image_folder, parsed.id) == (-1, "-my-odd_folder", "a-b")


@pytest.mark.parametrize(
    ("command", "argv", "told"),
    [
        ("eval", ["--beam", "3"], "there is no option '--beam'; --beam_size is the nearest"),
        ("eval", ["--recursiv", "1"], "there is no option '--recursiv'; --recursive is the nearest"),
        ("eval", ["--outptu=x.csv"], "there is no option '--outptu'; --output is the nearest"),
        ("eval", ["--dump_json", "yes"], "'yes' is neither 1 nor 0"),
        ("eval", ["--beam_size", "0"], "'0' is out of range: expected at least 1 and at most 10000"),
        ("eval", ["--beam_size"], "expected one argument"),
        ("eval", ["--temperature", "inf"], "'inf' is out of range"),
        ("eval", ["--temperature", "1e-300"], "'1e-300' is out of range"),
        ("eval", ["--length_penalty", "nan"], "'nan' is out of range"),
        ("eval", ["--seed", str(2**64)], "is out of range: expected at least 0 and at most 4294967295"),
        ("eval", ["--num_images", "0"], "expected at least 1 and at most 1000000000000, or -1"),
        ("eval", ["--min_confidence", "1.5"], "expected at least 0 and at most 1"),
        ("train", ["--epochs", "nan"], "'nan' is out of range"),
        ("train", ["--val_images_use", "0"], "'0' is out of range"),
        ("train", ["--drop_prob_lm", "1"], "expected at least 0 and below 1"),
        ("train", ["--learning_rate", "0"], "expected above 0"),
        ("train", ["--rnn_size", "1" * 5000], "is not a whole number"),
        ("prepro", ["--max_length", str(10**9)], "expected at least 1 and at most 1000"),
        ("score", ["--seed", "1\n2"], "is not a whole number"),
    ],
)
def test_a_usage_mistake_is_one_line_that_says_where_to_look(command, argv, told, capsys):
    with pytest.raises(SystemExit) as stopped:
        parser_of(command).parse_args([*REQUIRED.get(command, []), *argv])
    assert stopped.value.code == 2
    out, err = capsys.readouterr()
    assert told in err and out == ""
    assert err.startswith(f"caption-{command}: error: ") and err.endswith(f"; see caption-{command} --help\n")
    assert err.count("\n") == 1 and len(err) < 300


@pytest.mark.parametrize("command", COMMANDS)
def test_every_number_has_a_range_with_its_default_inside(command):
    for action in parser_of(command)._actions:
        name = f"caption-{command} {action.option_strings}"
        assert action.type not in (int, float), f"{name}: say what numbers it takes with a Range of cli/options.py"
        if isinstance(action.type, Range) and isinstance(action.default, int | float):
            assert action.default in action.type, name


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_tells_its_version(command, capsys):
    with pytest.raises(SystemExit) as stopped:
        parser_of(command).parse_args(["-version"])
    assert stopped.value.code == 0
    assert capsys.readouterr().out == f"caption-{command} {__version__}\n"


def test_bare_switches_are_on_and_leave_the_next_argument_alone():
    parser = Parser(prog="x")
    parser.add_argument("photos", nargs="*")
    parser.add_argument("--recursive", type=flag, default="0")
    parser.add_argument("--dump_json", type=flag, default="1")
    for argv, recursive, dump_json, photos in (
        (["-recursive", "holiday"], True, True, ["holiday"]),
        (["--recursive", "0", "holiday"], False, True, ["holiday"]),
        (["--dump-json=0", "--recursive"], True, False, []),
        (["--dump_json", "--recursive", "1", "--", "--recursive"], True, True, ["--recursive"]),
    ):
        parsed = parser.parse_args(argv)
        assert (parsed.recursive, parsed.dump_json, parsed.photos) == (recursive, dump_json, photos)


def test_several_models():
    assert parser_of("eval").parse_args(["--model", "a.pt", "b.pt", "-beam_size", "1"]).model == ["a.pt", "b.pt"]


def test_flag_after_flag():
    parser = Parser(prog="x")
    parser.add_argument("--one", type=flag, default="0")
    parser.add_argument("--sure", action="store_true")
    parsed = parser.parse_args(["-sure", "-one", "1"])
    assert parsed.sure and parsed.one is True


def test_bad_input_is_one_line_and_exit_code_1(capsys):
    def body() -> int:
        raise InputError("photos/: no such folder\nindeed", expected="a folder", remedy="check the path")

    assert run("caption-x", body) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err == "caption-x: error: photos/: no such folder indeed; expected a folder; check the path\n"


def test_too_little_gpu_memory_is_one_line(capsys):
    def body() -> int:
        import torch

        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has ..\n.. in use")

    assert run("caption-x", body) == 1
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1
    assert err.startswith("caption-x: error: CUDA out of memory; ") and "--gpuid -1" in err


def test_interruption_is_exit_code_130(capsys):
    def body() -> int:
        raise KeyboardInterrupt

    assert run("caption-x", body) == 130


def test_defects_keep_their_traceback():
    with pytest.raises(ZeroDivisionError):
        run("caption-x", lambda: 1 // 0)


@pytest.mark.parametrize("command", COMMANDS)
def test_help_does_not_wait_for_torch(command):
    """Importing torch takes seconds; answering --help must not."""
    code = f"import sys; sys.argv = ['x', '--help']\nfrom captioner.cli.{command} import main\n"
    code += "try:\n    main()\nexcept SystemExit:\n    pass\nassert 'torch' not in sys.modules, 'torch was imported'"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "usage: caption-" + command in done.stdout


def test_no_logged_losses(tiny_dataset, tiny_cnn, command, tmp_path):
    argv = ["--input_h5", tiny_dataset[0], "--input_json", tiny_dataset[1], "--cnn_model", tiny_cnn, "--gpuid", -1]
    argv += ["--cnn_layer", "pool5", "--rnn_size", 8, "--input_encoding_size", 8, "--max_iters", 2, "--num_workers", 0]
    done = command("train", *argv, "-losses_log_every", 0, "--val_images_use", 1, "--checkpoint_path", tmp_path)
    assert done.returncode == 0, done.stderr
    assert "iter 0" not in done.stderr


def test_the_converter_takes_the_originals_gpuid(command, tmp_path):
    done = command("convert", tmp_path / "gone.t7", "-gpuid", 0)
    assert done.returncode == 1 and "gone.t7: no such file" in done.stderr


def test_a_misspelt_command_is_one_line_and_none_lists_them(monkeypatch, capsys):
    from captioner.__main__ import COMMANDS as listed
    from captioner.__main__ import main

    for word, nearest in {
        "evel": "eval is the nearest; ",
        "caption-score": "score is the nearest; ",
        "zzz": "",
    }.items():
        monkeypatch.setattr("sys.argv", ["captioner", word])
        assert main() == 2
        expected = f"captioner: there is no command {word!r}; {nearest}see python -m captioner --help\n"
        assert capsys.readouterr() == ("", expected)
    monkeypatch.setattr("sys.argv", ["captioner"])
    assert main() == 0
    shown = capsys.readouterr().out
    assert all(f"\n  {name} " in shown for name in listed)
