"""Which device computes, in which numbers, and how its processes talk, told without one."""

import pytest
import torch

from captioner import kernels
from captioner.errors import InputError
from captioner.runtime import processes
from captioner.runtime.device import choose_device, widest_float


@pytest.fixture
def one_gpu(monkeypatch):
    chosen: list[int] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    monkeypatch.setenv("LOCAL_RANK", "1")
    return chosen


def test_a_process_takes_the_one_gpu_it_was_given(one_gpu, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
    assert choose_device(0) == torch.device("cuda", 0)
    assert one_gpu == [0]


def test_two_processes_do_not_share_a_machines_only_gpu(one_gpu, monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    with pytest.raises(InputError, match="this machine has 1 GPU"):
        choose_device(0)


def test_apples_gpus_have_no_float64():
    assert widest_float(torch.device("mps")) == torch.float32
    assert widest_float(torch.device("cuda")) == widest_float(torch.device("cpu")) == torch.float64


def test_torchs_lstm_never_computes_in_the_format_of_autocast():
    """cuDNN's would take float16 where autocast says bfloat16."""
    seen = []
    lstm = torch.nn.LSTM(3, 5)
    lstm.register_forward_pre_hook(
        lambda _, arguments: seen.append((arguments[0].data.dtype, torch.is_autocast_enabled("cpu")))
    )
    with torch.autocast("cpu", torch.bfloat16):
        kernels._plain_lstm(lstm, torch.randn(9, 3).bfloat16(), [4, 3, 2])
    assert seen == [(torch.float32, False)]


@pytest.mark.parametrize(("device", "backend"), [("cuda", "cpu:gloo,cuda:nccl"), ("cpu", "gloo")])
def test_messages_that_are_no_gradients_go_through_gloo(device, backend, monkeypatch):
    class Joined(Exception):
        pass

    def init(asked: str, **_: object) -> None:
        raise Joined(asked)

    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(processes, "rendezvous", lambda *_, **__: iter([(torch.distributed.HashStore(), 0, 2)]))
    monkeypatch.setattr(processes, "_agree_on_a_name", lambda *_: "x")
    monkeypatch.setattr(torch.distributed, "init_process_group", init)
    with pytest.raises(Joined, match=f"^{backend}$"), processes.process_group(torch.device(device)):
        pass
