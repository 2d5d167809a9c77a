"""Shards at s3:// and gs://, in stores that run on this machine: results as from a disk, and a repeated command.

pip install 'captioner[s3,gs]' 'moto[s3,server]' gcp-storage-emulator
python -m bench stores
"""

import contextlib
import json
import logging
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from bench.scale import caption_eval, make_shards, narrow_model, rows_of, synthetic_photos

PICTURES, SHARDS = 24, 3


def run() -> None:
    """Try both stores; one whose packages are missing is named."""
    with tempfile.TemporaryDirectory() as folder:
        photos, shards, plain = synthetic_photos(PICTURES), Path(folder, "shards"), Path(folder, "plain")
        make_shards(photos, shards, PICTURES, SHARDS)
        argv = ["--model", str(narrow_model(Path(folder, "narrow.pt"), 8)), "--precision", "fp32", "--gpuid", "-1"]
        subprocess.run(caption_eval(shards, plain, *argv), check=True, capture_output=True)
        for kind, store in STORES.items():
            try:
                with store() as environment:
                    seconds = use(f"{kind}://captioner", environment, shards, rows_of(plain), argv)
                print(f"{kind}: {PICTURES} pictures in {SHARDS} shards as from a disk; {seconds}", flush=True)
            except ImportError as error:
                print(f"{kind}: {error}; see bench/stores.py")


def use(bucket: str, environment: Mapping[str, str], shards: Path, expected: list[dict], argv: list[str]) -> str:
    """Caption shards in a bucket, some of them again, and prepare a data set of them; how long each took.

    Raises:
        AssertionError: something is not as it is on a disk.
    """
    import fsspec

    os.environ.update(environment)
    fsspec.config.conf.clear()
    fsspec.config.set_conf_env(fsspec.config.conf)
    system, root = fsspec.core.url_to_fs(bucket)
    system.mkdir(root)
    for path in sorted(shards.iterdir()):
        system.pipe_file(f"{root}/in/{path.name}", path.read_bytes())
    system.pipe_file(f"{root}/in/broken.tar", b"garbage" * 1000)
    command = [*caption_eval(shards, Path(), *argv)]
    command[3], command[5] = f"{bucket}/in/*.tar", f"{bucket}/out"
    times = []

    def finished(command: list[str], code: int, said: str) -> None:
        started = time.monotonic()
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        times.append(time.monotonic() - started)
        assert done.returncode == code and said in done.stderr + done.stdout, done.stderr

    finished(command, 1, f"1 of {SHARDS + 1} shards could not be read")
    system.invalidate_cache()
    system.rm_file(f"{root}/out/00001.jsonl")
    system.rm_file(f"{root}/in/broken.tar")
    finished(command, 0, f"1 of {SHARDS} shards are left")
    system.invalidate_cache()
    names = sorted(name.rpartition("/")[2] for name in system.ls(f"{root}/out", detail=False))
    assert names == [*(f"{number:05}.jsonl" for number in range(SHARDS)), "captioner-run.json"], names
    lines = [line for name in names[:SHARDS] for line in system.cat_file(f"{root}/out/{name}").splitlines()]
    assert [json.loads(line) for line in lines] == expected
    with tempfile.TemporaryDirectory() as folder:
        written = ["--output_h5", f"{folder}/data.h5", "--output_json", f"{folder}/data.json", "--num_workers", "0"]
        prepro = [sys.executable, "-m", "captioner.cli.prepro", "--input_json", f"{bucket}/in/*.tar", "--num_val", "0"]
        finished([*prepro, *written], 1, "no picture has a caption")  # they are pictures alone, but they were read
    return f"first run {times[0]:.1f} s, repeated {times[1]:.1f} s, caption-prepro {times[2]:.1f} s"


@contextlib.contextmanager
def s3() -> Iterator[dict[str, str]]:
    import s3fs  # noqa: F401
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    try:
        host, port = server.get_host_and_port()
        keys = {"AWS_ACCESS_KEY_ID": "x", "AWS_SECRET_ACCESS_KEY": "x", "AWS_DEFAULT_REGION": "us-east-1"}
        yield {**keys, "AWS_ENDPOINT_URL": f"http://{host}:{port}"}
    finally:
        server.stop()


@contextlib.contextmanager
def gs() -> Iterator[dict[str, str]]:
    # Google's own stores are asked over gRPC what kind of bucket it is, which the emulator does not know.
    os.environ["GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT"] = "false"
    import gcsfs  # noqa: F401
    from gcp_storage_emulator.server import create_server

    server = create_server("127.0.0.1", 0, in_memory=True)
    server.start()
    try:
        port = server._api._httpd.server_port
        yield {"STORAGE_EMULATOR_HOST": f"http://127.0.0.1:{port}", "FSSPEC_GS": json.dumps({"token": "anon"})}
    finally:
        server.stop()


STORES: Mapping[str, Callable[[], contextlib.AbstractContextManager[dict[str, str]]]] = {"s3": s3, "gs": gs}
