"""`python -m captioner eval ...` is `caption-eval ...`; without a command it lists them."""

import difflib
import importlib
import sys

# The command, and what it is for.
COMMANDS = {
    "download": "fetch pictures by lists of addresses",
    "prepro": "pictures and captions to a dataset",
    "train": "train a captioning model on a dataset",
    "eval": "caption a folder of photos or a split of a dataset",
    "score": "compare captions with what people said, or rate them by what a model thinks of them",
    "convert": "bring checkpoints and weights here from other programs, and from here to them",
    "sweep": "search for good training options",
    "video": "caption a video file or a camera, scene by scene",
    "serve": "captions over HTTP, with a page to upload pictures",
    "completion": "what a shell needs to complete these commands",
}


def main() -> int:
    """Run the command that the first argument names."""
    name = sys.argv[1] if len(sys.argv) > 1 else ""
    if name in COMMANDS:
        # Imported by name: each command brings in only what it needs.
        return importlib.import_module(f"captioner.cli.{name}").main(sys.argv[2:])
    listing = "\n".join(f"  {command:11}{purpose}" for command, purpose in COMMANDS.items())
    usage = f"usage: python -m captioner COMMAND ...\n\n{listing}\n\npython -m captioner COMMAND --help tells more."
    if name in ("", "-h", "--help"):
        return importlib.import_module("captioner.cli.options").run("captioner", lambda: print(usage))
    near = difflib.get_close_matches(name.removeprefix("caption-"), COMMANDS, n=1)
    nearest = f"{near[0]} is the nearest; " if near else ""
    print(f"captioner: there is no command {name!r}; {nearest}see python -m captioner --help", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
