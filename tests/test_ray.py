"""caption-eval --engine ray: the same results as without, whatever dies on the way."""

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from captioner.cli.eval import build_parser
from captioner.errors import InputError
from captioner.scale import ray_engine
from captioner.scale.items import Item


@pytest.fixture
def scale(monkeypatch):
    """The benchmark that does this in large."""
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1]))
    import bench.scale

    return bench.scale


@pytest.mark.timeout(900)
def test_killed_workers_and_a_killed_driver_change_nothing(scale, tmp_path, capsys):
    """In commands of their own, on a cluster of this machine; `faults` raises where anything is amiss."""
    scale.faults(scale.synthetic_photos(20), tmp_path, pictures=200, shards=8, actors=2, width=24)
    said = capsys.readouterr().out
    assert said.count("killed worker") == 3 and said.count("every picture once; 0 captions differ") == 2


def test_what_an_actor_claims_of_machines():
    def node(**resources: float) -> dict:
        return {"Alive": True, "Resources": resources}

    two = [node(CPU=2)]
    assert ray_engine._resources(two, True, None) == ({"num_cpus": 1.5}, 1, "cpu", 2)
    assert ray_engine._resources([node(CPU=4)], True, 2) == ({"num_cpus": 1.5}, 2, "cpu", 2)
    assert ray_engine._resources([node(CPU=16), node(CPU=6), node(memory=1)], True, None)[1:] == (5, "cpu", 4)
    with_gpus = [node(CPU=32, GPU=4), node(CPU=32, GPU=4), {"Alive": False, "Resources": {"GPU": 4}}]
    assert ray_engine._resources(with_gpus, True, None) == ({"num_gpus": 1, "num_cpus": 1}, 8, "cuda", 1)
    assert ray_engine._resources(with_gpus, False, None)[1:] == (16, "cpu", 4)


@pytest.mark.parametrize(
    ("text", "expected"), [("3", (3, 3)), ("1,64", (1, 64)), ("4,2", None), ("0", None), ("a", None), ("1,", None)]
)
def test_numbers_of_actors(text, expected, capsys):
    if expected:
        assert build_parser().parse_args(["--actors", text]).actors == expected
    else:
        with pytest.raises(SystemExit):
            build_parser().parse_args(["--actors", text])
        assert "argument --actors" in capsys.readouterr().err


def test_without_ray_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(InputError, match=r'pip install "captioner\[ray\]"'):
        ray_engine._connect(None)


def test_a_cluster_that_does_not_answer_or_start_is_one_line(monkeypatch):
    import ray

    def fail(**_: object) -> None:
        raise Exception("The current node timed out during startup.")

    monkeypatch.setattr(ray, "init", fail)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with pytest.raises(InputError, match="--address there:6379: no Ray cluster answers"):
        ray_engine._connect("there:6379")
    with pytest.raises(InputError, match="Ray does not start here .*timed out"):
        ray_engine._connect(None)


def test_a_machine_too_busy_to_start_ray_is_asked_again_and_nothing_of_the_vain_attempt_stays(monkeypatch, caplog):
    import ray
    from ray._private.node import Node

    attempts: list[Node] = []

    class HalfStarted(Node):
        def __init__(self) -> None:
            self.ended = False
            attempts.append(self)
            if len(attempts) < 3:
                raise Exception("The current node timed out during startup.")

        def kill_all_processes(self, *_: object, **__: object) -> None:
            self.ended = True

    monkeypatch.setattr(ray, "init", lambda **_: HalfStarted())
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    assert ray_engine._connect(None) is ray
    assert [attempt.ended for attempt in attempts] == [True, True, False]
    assert caplog.text.count("timed out during startup.): trying again") == 2


def test_an_actor_hands_its_worker_batches_that_fit_and_lets_it_read_ahead(monkeypatch):
    import ray

    sizes: list[int] = []

    def worker(batches):
        before = None
        for batch in batches:
            sizes.append(len(batch))
            if before:
                yield before
            before = [replace(item, pixels=None, row=str(int(item.pixels.sum()))) for item in batch]
        yield before

    monkeypatch.setattr(ray, "get", lambda made: made)
    actor = ray_engine._Caption(lambda device, threads: worker, "cuda", 1, batch_size=3)
    pixels = [np.zeros((3, 256, 256), np.uint8) for _ in range(8)]
    for number, picture in enumerate(pixels):
        picture[0, 0, 0] = number
    found = actor(ray_engine._table([Item(0, number, pixels=picture) for number, picture in enumerate(pixels)]))
    assert found["row"].to_pylist() == [str(number) for number in range(8)]
    assert found["index"].to_pylist() == list(range(8)) and sizes == [3, 3, 2]


def test_a_user_error_inside_a_worker_is_the_user_s():
    wrapped = RuntimeError("an actor died")
    wrapped.cause = ValueError("in a task")  # type: ignore[attr-defined]
    wrapped.cause.__cause__ = InputError("--beam_size 0")  # type: ignore[attr-defined]
    assert str(ray_engine._input_error_in(wrapped)) == "--beam_size 0"
    assert ray_engine._input_error_in(ValueError("ours")) is None
