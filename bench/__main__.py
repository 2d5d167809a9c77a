"""`python -m bench [NAME ..]`: run benchmarks by name, all of them without names; tables go to stdout."""

import importlib
import pkgutil
import sys
from datetime import date
from pathlib import Path

import torch

NAMES = sorted(
    module.name
    for module in pkgutil.iter_modules([str(Path(__file__).parent)])
    if module.name not in ("__main__", "timing")
)


def main() -> int:
    wanted = sys.argv[1:] or NAMES
    unknown = [name for name in wanted if name not in NAMES]
    if unknown:
        print(f"bench: no benchmark {unknown[0]!r}; there are {', '.join(NAMES)}", file=sys.stderr)
        return 2
    print(f"{date.today()}, {_machine()}\n")
    for name in wanted:
        print(f"## {name}\n\n`python -m bench {name}`\n", flush=True)
        importlib.import_module(f"bench.{name}").run()
        print(flush=True)
    return 0


def _machine() -> str:
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{torch.get_num_threads()} CPU threads"
    return f"{device}, Python {sys.version.split()[0]}, torch {torch.__version__}"


if __name__ == "__main__":
    raise SystemExit(main())
