"""kill -9 at random moments of every command, then the same command again: the same bytes, and nothing left over.

    PYTHONPATH=. python tests/kill_commands.py --kills 20 --seed 1

Commands run in forks of one process that has imported everything, so that the moments fall into their work.
"""

import argparse
import os
import random
import re
import shutil
import signal
import tempfile
import time
from pathlib import Path

import torch
import tqdm
from small_runs import RUNS, files_of, pictures_server, run_in, write_inputs

DATE = re.compile(rb"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d[+-]\d\d:\d\d")
SPEED = re.compile(rb'("seconds"|"images_per_second"): [\d.e+-]+')
LEFT_OVER = re.compile(r".*(\.tmp|\.lock|\.journal|\.partial|\.dead|\.part|\.part\.json)")


def start(folder: Path, name: str) -> int:
    """Begin a run in a fork; returns its process."""
    pid = os.fork()
    if pid:
        return pid
    code = 99
    try:
        code, err = run_in(folder, *RUNS[name])
        if code:
            print(f"caption-{name}: {err}", flush=True)
    finally:
        os._exit(code)


def finish(pid: int) -> int:
    """The exit code of a process, or minus the signal that ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def comparable(folder: Path) -> dict[str, bytes]:
    """All files; of what holds the time only the rest, of the list of our files only the names."""
    found = {}
    for name, content in files_of(folder).items():
        if name.endswith(".captioner-files"):
            content = b"\n".join(sorted(re.findall(rb'^\["([^"]+)"', content, re.MULTILINE)))
        # These say how fast it went, and which file a digest is of, by its time.
        if not name.endswith((".pixels", "_pace.json")) and not name.startswith("run/model_id.html"):
            found[name] = SPEED.sub(rb"\1: 0", DATE.sub(b"DATE", content))
    return found


def kill(name: str, folder: Path, server: str, kills: int, rng: random.Random) -> tuple[int, int]:
    """Kill so many running commands, each time doing it again to the end.

    Returns:
        How many kills hit a running command, and how many came too late.

    Raises:
        AssertionError: a command did not end, or ended otherwise than one that nothing disturbs.
    """
    undisturbed, inputs, warm = folder / "undisturbed", folder / "inputs", folder / "warm"
    write_inputs(inputs, name, server)
    shutil.copytree(inputs, warm)
    code, err = run_in(warm, *RUNS[name])  # so that forks have imported everything
    assert code == 0, (name, err)
    shutil.copytree(inputs, undisturbed)
    started = time.monotonic()
    assert finish(start(undisturbed, name)) == 0, name
    seconds = time.monotonic() - started
    wanted = comparable(undisturbed)
    hit = late = 0
    while hit < kills and late < 3 * kills:
        # The same place for all: paths are part of some files.
        shutil.rmtree(undisturbed)
        shutil.copytree(inputs, undisturbed)
        pid = start(undisturbed, name)
        time.sleep(rng.uniform(0, seconds))
        os.kill(pid, signal.SIGKILL)
        if finish(pid) == -signal.SIGKILL:
            hit += 1
        else:
            late += 1
        assert finish(start(undisturbed, name)) == 0, name
        found = comparable(undisturbed)
        left = sorted(path for path in found if LEFT_OVER.fullmatch(path))
        assert not left, (name, left)
        assert found.keys() == wanted.keys(), (name, sorted(found.keys() ^ wanted.keys()))
        differs = [path for path in found if found[path] != wanted[path]]
        assert not differs, (name, differs)
    return hit, late


def run(kills: int, seed: int, names: list[str]) -> str:
    """A Markdown table of what was killed.

    Raises:
        AssertionError: as of `kill`, when all have had their turn.
    """
    rng = random.Random(seed)
    torch.set_num_threads(1)
    tqdm.tqdm.monitor_interval = 0  # a thread of its own may hold a lock when we fork, and the fork waits for ever
    wrong: list[str] = []
    rows = ["| run | killed | came too late | ended otherwise when repeated |", "|---|---|---|---|"]
    with pictures_server() as server:
        for name in names:
            folder = Path(tempfile.mkdtemp()).resolve()
            try:
                hit, late = kill(name, folder, server, kills, rng)
            except AssertionError as error:
                wrong.append(f"{error}, in {folder}")
                print(f"caption-{wrong[-1]}", flush=True)
                continue
            shutil.rmtree(folder)
            rows.append(f"| caption-{name} | {hit} | {late} | 0 |")
            print(rows[-1], flush=True)
    assert not wrong, wrong
    return "\n".join(rows)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--runs", nargs="+", default=list(RUNS), choices=list(RUNS))
    arguments = parser.parse_args()
    print(run(arguments.kills, arguments.seed, arguments.runs))
