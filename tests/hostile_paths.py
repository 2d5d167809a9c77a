"""Every option of the small runs that names a file, given what it must not take; every file they make, made by somebody
else before.

    PYTHONPATH=. python tests/hostile_paths.py

An odd input, as a pipe, a device or a file cut in half, ends a command in one line, or does not matter; within SECONDS.
No output replaces an input, whatever it is called and whether or not --overwrite 1 is said; nor, without that, a file
of somebody else's.
"""

import argparse
import os
import resource
import shutil
import signal
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from small_runs import RUNS, files_of, pictures_server, run_in, write_inputs

SECONDS = 30
MEMORY = 3 * 2**30  # bytes, beyond what the process has at first
SOMEBODYS = b"my thesis, the only copy\n"

# Options by run that name what is read, besides those in the run's own line; "" is what stands without an option.
READ: dict[str, tuple[str, ...]] = {
    "score": ("--predictions", "--references", "--df", "--train_captions"),
    "score, two systems": ("--compare",),
    "score, by a model": ("--images", "--captions", "--model"),
    "score, by words": ("--images", "--model"),
    "convert": ("",),
    "convert .t7": ("",),
    "convert --inspect": ("",),
    "prepro": ("--input_json", "--images_root"),
    "prepro, a shard": ("--input_json",),
    "prepro --check": ("--input_json",),
    "eval": ("--image_folder", "--model", "--coco_json"),
    "eval, everything": ("--references",),
    "eval, shards": ("", "--model"),
    "train": ("--input_h5", "--input_json", "--cnn_model", "--start_from", "--resume"),
    "video": ("--input", "--model"),
    "download": ("",),
}
# Options by run that name what is written.
WRITTEN: dict[str, tuple[str, ...]] = {
    "score": ("--output",),
    "score, two systems": ("--output", "--view"),
    "score, by a model": ("--output",),
    "score, by words": ("--output", "--view"),
    "convert": ("--output",),
    "convert --inspect": ("--output",),
    "prepro": ("--output_h5", "--output_json"),
    "prepro, a shard": ("--output_h5", "--output_json"),
    "prepro --check": ("--output", "--mean_image"),
    "prepro --view": ("--view",),
    "eval": ("--output", "--vis_dir"),
    "eval, everything": ("--share", "--output"),
    "eval, shards": ("--output_dir",),
    "train": ("--checkpoint_path",),
    "video": ("--output", "--srt", "--vtt", "--jsonl", "--vis_dir"),
    "download": ("--folder",),
}


class Hang(BaseException):
    """A command took longer than SECONDS."""


def ends(folder: Path, command: str, arguments: list[str]) -> tuple[int, str]:
    """Exit code and stderr.

    Raises:
        AssertionError: it hung, or ended with a traceback or without a line.
    """

    def hang(*_: object) -> None:
        raise Hang

    before = signal.signal(signal.SIGALRM, hang)
    signal.alarm(SECONDS)
    try:
        code, told = run_in(folder, command, arguments)
    except Hang:
        raise AssertionError(f"caption-{command} {arguments} hangs") from None
    except Exception as error:
        raise AssertionError(f"caption-{command} {arguments}: {type(error).__name__}: {error}") from error
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
    last = told.strip().splitlines()[-1] if told.strip() else ""
    assert "Traceback" not in told, (arguments, told)
    assert code == 0 or (code in (1, 2) and ": error: " in last), (arguments, code, told)
    return code, told


def with_option(arguments: tuple[str, ...], option: str, value: str) -> list[str]:
    """The arguments with another value of an option, or with one more option; "": the first argument."""
    found = list(arguments)
    if not option:
        return [value, *found[1:]]
    if option in found:
        found[found.index(option) + 1] = value
        return found
    return [*found, option, value]


def odd_files(folder: Path, sound: Path | None) -> dict[str, str]:
    """What a path may lead to besides a sound file: what it is → its name. `sound` is cut in half for one of them."""
    folder.mkdir()
    for name, content in {
        "empty": b"",
        "zeros": bytes(5000),
        "text": SOMEBODYS,
        "deep.json": b"[" * 100_000,
        "deeper.json": b'{"a":' * 100_000,
        "numbers.json": b"[" + b"1" * 5000 + b"]",
        "half.json": b'[{"file_path": "\\ud83d", "image_id": 1e999, "captions": ["\\u0000"]}]',
        "zip": b"PK\x03\x04" + bytes(50),
        "hdf5": b"\x89HDF\r\n\x1a\n" + bytes(500),
        "parquet": b"PAR1" + bytes(100) + b"PAR1",
        "tar": bytes(257) + b"ustar\x0000" + bytes(1000),
    }.items():
        (folder / name).write_bytes(content)
    if sound and sound.is_file():
        whole = sound.read_bytes()
        (folder / f"half{sound.suffix}").write_bytes(whole[: len(whole) // 2])
        (folder / f"tail{sound.suffix}").write_bytes(whole[len(whole) // 2 :])
        os.link(folder / f"half{sound.suffix}", os.fsencode(folder) + b"/\xff\xfe\n" + os.fsencode(sound.suffix))
    os.mkfifo(folder / "pipe")
    (folder / "loop").symlink_to("loop")
    (folder / "dangling").symlink_to("nowhere")
    (folder / "folder").mkdir()
    with (folder / "sparse").open("wb") as stream:
        stream.truncate(20 * 2**30)
    (folder / "endless").symlink_to("/dev/zero")
    names = {path.name: str(path) for path in folder.iterdir()}
    return names | {
        "nothing": "",
        "missing": str(folder / "missing"),
        "below a file": str(folder / "text" / "x"),
        "too long": "x" * 300,
        "much too long": "x" * 5000,
        "null": "/dev/null",
        "full": "/dev/full",
        "dash": "-x",
    }


def odd_inputs(name: str, folder: Path, server: str) -> int:
    """Try all of `odd_files` as each input of a run; returns how many there were."""
    command, arguments = RUNS[name]
    count = 0
    for option in READ.get(name, ()):
        work = folder / f"in{count}"
        write_inputs(work, name, server)
        given = arguments[arguments.index(option) + 1] if option in arguments else "" if option else arguments[0]
        odd = odd_files(folder / f"odd{count}", work / given if given else None)
        before = files_of(work)
        for path in odd.values():
            ends(work, command, [*with_option(arguments, option, path)])
            count += 1
            now = files_of(work)
            assert {one: now.get(one) for one in before} == before, (name, option, path)
    return count


def other_names(path: Path) -> Iterator[str]:
    """Ways to call a file: as it is, by a detour, by links."""
    yield from (path.name, str(path), f"./{path.name}", f"photos/../{path.name}")
    symbolic, hard = path.with_name(f"link-{path.name}"), path.with_name(f"hard-{path.name}")
    if not os.path.lexists(symbolic):
        symbolic.symlink_to(path)
        os.link(path, hard)
    yield from (symbolic.name, hard.name)


def odd_outputs(name: str, folder: Path, server: str) -> int:
    """Try to have each output of a run replace each of its inputs, under each of their names."""
    command, arguments = RUNS[name]
    write_inputs(folder, name, server)
    known = [folder / value for value in arguments if (folder / value).is_file()]
    beside = [folder / "photos" / "0.txt", folder / "photos" / "1.png"]
    before = files_of(folder)
    count = 0
    for option in WRITTEN.get(name, ()):
        suffixes = {Path(arguments[arguments.index(option) + 1]).suffix} - {""}
        for path in [*known, *beside]:
            # The suffix decides about the format: names with the one that would be right, too.
            called = path.with_name(path.name + next(iter(suffixes), ""))
            if suffixes and path.suffix not in suffixes:
                os.link(path, called)
            for target in [*other_names(path), *(other_names(called) if called.exists() else ())]:
                place = target if os.path.isabs(target) or path.parent == folder else f"photos/{Path(target).name}"
                for more in ([], ["--overwrite", "1"]):
                    if name in ("train", "download") and more:
                        continue
                    ends(folder, command, [*with_option(arguments, option, place), *more])
                    count += 1
                    now = files_of(folder)
                    changed = [one for one, content in before.items() if now.get(one) != content]
                    # Without a dataset's captions read from it a text file is an input no more than any other.
                    assert not [one for one in changed if Path(one) != Path("photos/0.txt")], (
                        name,
                        option,
                        place,
                        changed,
                    )
                    if changed:
                        read = "prepro" in name and name != "prepro, a shard"
                        assert (more or "--overwrite" in arguments) and not read, (
                            name,
                            option,
                            place,
                            changed,
                        )
                        (folder / "photos" / "0.txt").write_bytes(before["photos/0.txt"])
            for left in folder.rglob("*"):
                if left.is_symlink() or (left.name.startswith("hard-") and left.is_file()) or left == called != path:
                    left.unlink()
    return count


def strangers(name: str, folder: Path, server: str) -> int:
    """Put a stranger's file in the place of each file that a run makes: it is never lost. It may be set aside."""
    command, arguments = RUNS[name]
    arguments = tuple(with_option(arguments, "--overwrite", "0")) if "--overwrite" in arguments else arguments
    write_inputs(folder / "inputs", name, server)
    work = folder / "work"
    shutil.copytree(folder / "inputs", work)
    ends(work, command, list(arguments))
    made = sorted(files_of(work).keys() - files_of(folder / "inputs").keys())
    count = 0
    for one in made:
        if one.startswith("cache/"):
            continue
        shutil.rmtree(work)
        shutil.copytree(folder / "inputs", work)
        (work / one).parent.mkdir(parents=True, exist_ok=True)
        (work / one).write_bytes(SOMEBODYS)
        ends(work, command, list(arguments))
        count += 1
        assert any(SOMEBODYS in content for content in files_of(work).values()), (name, one)
    return count


def run(
    names: list[str], trials: tuple[Callable[[str, Path, str], int], ...] = (odd_inputs, odd_outputs, strangers)
) -> str:
    """A Markdown table of what was tried.

    Raises:
        AssertionError: some command did otherwise than it should, when all have had their turn.
    """
    rows = [
        f"| run | {' | '.join(trial.__name__.replace('_', ' ') for trial in trials)} |",
        "|---" * (1 + len(trials)) + "|",
    ]
    wrong: list[str] = []
    limits = resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, limits[1]))
    with pictures_server() as server:
        for name in names:
            counts = []
            for trial in trials:
                folder = Path(tempfile.mkdtemp()).resolve() / "run"
                if trial is not odd_outputs:
                    folder.mkdir()
                try:
                    counts.append(f"{trial(name, folder, server):,}")
                except AssertionError as error:
                    counts.append("wrong")
                    wrong.append(f"{name}: {error}")
                    print(wrong[-1], flush=True)
                shutil.rmtree(folder)
            rows.append(f"| caption-{name} | {' | '.join(counts)} |")
            print(rows[-1], flush=True)
    resource.setrlimit(resource.RLIMIT_AS, limits)
    assert not wrong, f"{len(wrong)}: {wrong[:3]}"
    return "\n".join(rows)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--runs", nargs="+", default=list(RUNS), choices=list(RUNS))
    torch.set_num_threads(1)
    print(run(parser.parse_args().runs))
