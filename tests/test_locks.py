"""Two runs in one place: the second one leaves, unless the first is dead."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from captioner.errors import InputError
from captioner.runtime import locks
from captioner.runtime.locks import sole_run

HOLD = """
import sys
from pathlib import Path
from captioner.runtime.locks import sole_run
with sole_run(Path(sys.argv[1]), "the run"):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def holder(tmp_path):
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path / "lock")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        cwd=Path(__file__).parents[1],
    )
    assert process.stdout.readline() == b"held\n"
    yield process
    process.kill()
    process.wait()


def test_the_second_one_says_who_is_there_and_since_when(holder, tmp_path):
    since = json.loads((tmp_path / "lock").read_text())["since"]
    told = f"the run is in use by process {holder.pid} on .*, since {since}"
    with pytest.raises(InputError, match=told), sole_run(tmp_path / "lock", "the run"):
        pass
    holder.communicate(b"")
    assert not list(tmp_path.iterdir())


def test_the_lock_of_a_killed_process_is_taken_over(holder, tmp_path):
    holder.kill()
    holder.wait()
    with sole_run(tmp_path / "lock", "the run"):
        assert json.loads((tmp_path / "lock").read_text())["process"] == os.getpid()
    assert not list(tmp_path.iterdir())


ENDING = """
import builtins, sys
from pathlib import Path
from captioner.runtime.locks import sole_run
lock = sole_run(Path(sys.argv[1]), "the run")
lock.__enter__()
builtins.kept = lock  # not collected: nobody gives it back before Python ends
"""


def test_a_lock_goes_with_its_process(tmp_path):
    subprocess.run([sys.executable, "-c", ENDING, str(tmp_path / "lock")], check=True, cwd=Path(__file__).parents[1])
    assert not list(tmp_path.iterdir())


def test_what_a_process_left_that_was_killed_while_it_took_the_lock_is_swept(tmp_path):
    (tmp_path / ".lock.abcd1234.tmp").write_text("{")
    with sole_run(tmp_path / "lock", "the run"):
        assert os.listdir(tmp_path) == ["lock"]


def test_a_number_that_another_process_has_now_is_no_holder(tmp_path):
    with sole_run(tmp_path / "lock", "the run"):
        held = json.loads((tmp_path / "lock").read_text())
    (tmp_path / "lock").write_text(json.dumps({**held, "started": "1"}))
    with sole_run(tmp_path / "lock", "the run"):
        pass


def test_on_another_machine_a_holder_lives_as_long_as_it_touches_the_lock(tmp_path):
    lock = tmp_path / "lock"
    lock.write_text(json.dumps({"host": "far", "machine": "far", "process": 1, "started": "1", "since": "noon"}))
    with pytest.raises(InputError, match="process 1 on far, since noon"), sole_run(lock, "the run"):
        pass
    os.utime(lock, (1, os.stat(lock).st_mtime - 2 * locks.DEAD_AFTER_SECONDS))
    with sole_run(lock, "the run"):
        pass
    assert not list(tmp_path.iterdir())


def test_a_holder_keeps_touching(tmp_path, monkeypatch):
    monkeypatch.setattr(locks, "TOUCH_EVERY_SECONDS", 0.01)
    with sole_run(tmp_path / "lock", "the run"):
        os.utime(tmp_path / "lock", (1, 1))
        for _ in range(1000):
            if os.stat(tmp_path / "lock").st_mtime > 1:
                break
            locks.time.sleep(0.01)
        assert os.stat(tmp_path / "lock").st_mtime > 1


@pytest.mark.parametrize("content", ["", "{", '{"host": 5}', "\0" * 100])
def test_a_damaged_lock_counts_for_a_while(content, tmp_path):
    lock = tmp_path / "lock"
    lock.write_text(content)
    with pytest.raises(InputError, match="an unknown process"), sole_run(lock, "the run"):
        pass
    os.utime(lock, (1, 1))
    with sole_run(lock, "the run"):
        pass


@pytest.mark.parametrize("content", ["[]", "keys of the cellar", "\udcff", '{"hostess": 1}'])
def test_a_file_of_somebody_elses_is_no_lock_however_old(content, tmp_path):
    lock = tmp_path / "lock"
    lock.write_text(content, errors="surrogateescape")
    os.utime(lock, (1, 1))
    with pytest.raises(InputError, match="is no lock of this program"), sole_run(lock, "the run"):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["lock"]
    assert lock.read_text(errors="surrogateescape") == content


def test_a_pipe_for_a_lock_keeps_nobody_waiting(tmp_path):
    os.mkfifo(tmp_path / "lock")
    with pytest.raises(InputError, match="a pipe or a device"), sole_run(tmp_path / "lock", "the run"):
        pass


def test_a_second_training_in_the_folder_leaves_without_touching_it(tiny_dataset, command, tmp_path):
    data = ["--input_h5", tiny_dataset[0], "--input_json", tiny_dataset[1], "--gpuid", -1]
    with sole_run(tmp_path / ".model_id.lock", "the training run"):
        done = command("train", *data, "--cnn_model", "random", "--checkpoint_path", tmp_path)
        assert done.returncode == 1
        assert f"in {tmp_path} is in use by process {os.getpid()} on " in done.stderr
        assert [path.name for path in tmp_path.iterdir()] == [".model_id.lock"]
