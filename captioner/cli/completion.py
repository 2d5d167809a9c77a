"""caption-completion: what a shell needs to complete all commands at a press of Tab (by shtab)."""

import argparse
import importlib
from collections.abc import Sequence

from captioner.cli.options import Parser, flag, run
from captioner.errors import InputError

SHELLS = ("bash", "zsh", "fish")
COMMANDS = ("completion", "convert", "download", "eval", "prepro", "score", "serve", "sweep", "train", "video")

# What an option without fixed choices takes is a file, unless it stands here.
FOLDERS = {"checkpoint_path", "folder", "image_folder", "image_root", "images", "images_root", "view", "vis_dir"}
TEXTS = {"ban", "caption_prefix", "gpus", "host", "id", "metrics", "only", "prefix", "query", "require", "split"}
TEXTS |= {"suffix", "txt_extension"}


def build_parser() -> Parser:
    """The command's options."""
    p = Parser(
        prog="caption-completion",
        description="Print the script with which a shell completes these commands. bash, in ~/.bashrc: "
        'eval "$(caption-completion bash)"; zsh, in ~/.zshrc after compinit: the same with zsh; fish, in '
        "~/.config/fish/config.fish: caption-completion fish | source",
    )
    p.add_argument("shell", choices=SHELLS)
    return p


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of `caption-completion`."""
    opt = build_parser().parse_args(argv)
    return run("caption-completion", lambda: print("\n".join(script(name, opt.shell) for name in COMMANDS)))


def parser_of(command: str) -> argparse.ArgumentParser:
    """The options of a command, by its name without "caption-"."""
    module = importlib.import_module(f"captioner.cli.{'train_options' if command == 'train' else command}")
    parser: argparse.ArgumentParser = module.build_parser()
    return parser


def script(command: str, shell: str) -> str:
    """The completion of one command.

    Raises:
        InputError: shtab is not installed.
    """
    try:
        import shtab
    except ImportError as error:
        raise InputError("completion needs shtab", remedy="install it: pip install 'shtab>=1.13'") from error
    parser = parser_of(command)
    for action in parser._actions:
        if action.type is flag:
            action.nargs = 0  # switches work bare; what follows is the next argument
        elif action.type in (None, str) and action.choices is None and action.nargs != 0:
            names_file = None if action.dest in TEXTS else shtab.DIRECTORY if action.dest in FOLDERS else shtab.FILE
            if names_file:
                action.complete = names_file  # type: ignore[attr-defined]
    text: str = shtab.complete(parser, shell)
    if shell == "zsh":
        # Written for a file that zsh loads by its name; here it is read with others.
        text = text.removeprefix(f"#compdef {parser.prog}\n")
    return text


if __name__ == "__main__":
    raise SystemExit(main())
