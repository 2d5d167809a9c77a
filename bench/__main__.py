"""`python -m bench [NAME ..]`: run benchmarks by name, all of them without names; tables go to stdout."""

import contextlib
import importlib
import os
import pkgutil
import platform
import re
import sys
from datetime import date
from pathlib import Path

import torch

NAMES = sorted(
    module.name
    for module in pkgutil.iter_modules([str(Path(__file__).parent)])
    if module.name not in ("__main__", "timing", "coco_shaped")
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
    """One line for RESULTS.md: figures mean nothing without the machine, and what else it was doing."""
    found = None
    with contextlib.suppress(OSError):
        found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    processor = found[1] if found else platform.processor() or platform.machine()
    parts = [f"{os.cpu_count()} cores of {processor}", f"{torch.get_num_threads()} threads"]
    if torch.cuda.is_available():
        parts.insert(0, torch.cuda.get_device_name())
    if hasattr(os, "getloadavg"):
        parts.append(f"load {os.getloadavg()[0]:.1f} at the start")
    return f"{', '.join(parts)}; {platform.system()}, Python {platform.python_version()}, torch {torch.__version__}"


if __name__ == "__main__":
    raise SystemExit(main())
