"""Fast forms: equal to plain torch where they work, and replaced by it where a PyTorch lacks or breaks them."""

import logging
import types

import pytest
import torch
from conftest import TINY_WORDS
from torch import Tensor
from trainers import make_trainer

from captioner import kernels
from captioner.data.batch import Batch, KnownCaptions, PixelInputs
from captioner.data.vocabulary import Vocab
from captioner.inference.captioner import Captioner
from captioner.inference.load import make_captioner
from captioner.inference.run import captions_of, evaluate_batch
from captioner.kernels import CPU, INT8, KERNELS, LSTM, OUTPUT_LOSS, PACKED_LINEAR, TOPK
from captioner.kernels.proof import Kernel
from captioner.model.caption_model import CaptionModel
from captioner.model.checkpoint import Checkpoint
from captioner.model.config import ModelConfig
from captioner.output.rows import caption_row
from captioner.search import SearchOptions
from captioner.training.trainer import Trainer

CONFIG = ModelConfig(
    len(TINY_WORDS), 5, encoding_size=16, rnn_size=24, num_layers=2, cnn_layer="pool5", conv_widths=(8,) * 13
)


@pytest.fixture(autouse=True)
def unproved(monkeypatch):
    """As at the start of a process."""
    for kernel in KERNELS:
        monkeypatch.setattr(kernel, "verdicts", {})


def refuse_all(monkeypatch: pytest.MonkeyPatch) -> None:
    for kernel in KERNELS:
        monkeypatch.setattr(kernel, "verdicts", {"cpu": False})


def make_model() -> CaptionModel:
    torch.manual_seed(0)
    return CaptionModel(CONFIG)


def make_batch() -> Batch:
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(1, len(TINY_WORDS) + 1, (6, 5), generator=generator)
    labels[::2, 3:] = labels[1] = 0
    return Batch(
        info=[{}] * 3,
        positions=[0, 1, 2],
        inputs=PixelInputs(torch.randint(0, 256, (3, 3, 256, 256), dtype=torch.uint8, generator=generator)),
        captions=KnownCaptions(labels, torch.tensor([0, 0, 0, 1, 2, 2])),
    )


@pytest.mark.parametrize("kernel", [LSTM, OUTPUT_LOSS, TOPK], ids=lambda kernel: kernel.name)
def test_forms_that_need_no_special_hardware_work_here(kernel, caplog):
    assert kernel.works(CPU)
    assert not caplog.records
    assert kernels.arithmetic(torch.float32, CPU) == "fp32"


def test_arithmetic_for_people(monkeypatch):
    assert kernels.arithmetic(torch.bfloat16, CPU) == "bf16"
    assert kernels.arithmetic(torch.bfloat16, CPU, int8=True) == "int8 convolutions + bf16"
    monkeypatch.setattr(PACKED_LINEAR, "verdicts", {"cpu": False})
    assert kernels.arithmetic(torch.bfloat16, CPU) == "bf16 (plain torch: packed linear layer)"


@pytest.mark.parametrize(
    ("dtype", "exact", "name"), [(torch.float32, True, "fp32"), (torch.bfloat16, False, "bf16")], ids=["fp32", "bf16"]
)
def test_training_and_captioning_say_what_they_compute_with_and_fp32_is_not_tf32(dtype, exact, name, monkeypatch):
    for make in (make_captioner_of, make_trainer_of):
        monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
        assert make(dtype).arithmetic == name
        assert torch.backends.cudnn.allow_tf32 is not exact


def make_captioner_of(dtype: torch.dtype) -> Captioner:
    return Captioner([make_model()], Vocab(TINY_WORDS), CPU, dtype)


def make_trainer_of(dtype: torch.dtype) -> Trainer:
    return make_trainer(make_model(), dtype=dtype, trains_cnn=False)


def losses_and_gradients(model: CaptionModel) -> list[Tensor]:
    batch = make_batch()
    model.zero_grad()
    total, count = model(batch.inputs, batch.captions)
    (total / count).backward()
    gradients = [parameter.grad for parameter in model.parameters()]
    assert all(gradient is not None for gradient in gradients)
    return [total.detach(), *(gradient.clone() for gradient in gradients if gradient is not None)]


@pytest.mark.parametrize("autocast", [False, True])
def test_a_loss_and_all_its_gradients_in_plain_torch_are_those_of_the_fast_forms(autocast, monkeypatch):
    model = make_model().eval()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        fast = losses_and_gradients(model)
        refuse_all(monkeypatch)
        plain = losses_and_gradients(model)
    for ours, theirs in zip(fast, plain, strict=True):
        assert ours.dtype == theirs.dtype == torch.float32
        assert (ours - theirs).norm() <= (0.05 if autocast else 1e-5) * theirs.norm()


def test_captions_in_plain_torch_are_those_of_the_fast_forms(monkeypatch):
    def captions() -> list:
        captioner = Captioner([make_model()], Vocab(TINY_WORDS), CPU, torch.float32)
        return [
            one.tokens
            for found in evaluate_batch(captioner, make_batch(), SearchOptions(3), 0).hypotheses
            for one in found
        ]

    fast = captions()
    refuse_all(monkeypatch)
    assert captions() == fast


@pytest.mark.parametrize("size", [3, 64, 640, 1000])
@pytest.mark.parametrize("count", [1, 2, 3])
def test_topk_finds_the_greatest_values_and_where_they_are(size, count):
    values = torch.randn(4, 2, size, generator=torch.Generator().manual_seed(size))
    values[0, 0] = -torch.inf
    values[1, 1, size // 2 :] = -torch.inf
    found, places = kernels.topk(values, count)
    assert torch.equal(found, values.sort(descending=True).values[..., :count])
    assert torch.equal(values.gather(2, places), found)
    assert all(len(set(row)) == count for row in places.view(-1, count).tolist())


# --- what a PyTorch may do to operators that it makes no promise about ------------------------------------------------


def without(*_args: object) -> types.SimpleNamespace:
    return types.SimpleNamespace()


def raising(namespace: object, names: list[str]) -> types.SimpleNamespace:
    def fail(*_args: object) -> None:
        raise RuntimeError("could not create a primitive\nwith a long story below")

    return types.SimpleNamespace(**dict.fromkeys(names, fail))


def wrong(namespace: object, names: list[str]) -> types.SimpleNamespace:
    def slightly_off(operator):
        def compute(*args: object) -> object:
            result = operator(*args)
            return result * 1.2 if isinstance(result, Tensor) and result.is_floating_point() else result

        return compute

    return types.SimpleNamespace(**{name: slightly_off(getattr(namespace, name)) for name in names})


def not_a_number(namespace: object, names: list[str]) -> types.SimpleNamespace:
    return types.SimpleNamespace(**dict.fromkeys(names, lambda first, *_: first * float("nan")))


OPERATORS = {
    LSTM: ("aten", ["sigmoid_backward", "tanh_backward"]),
    PACKED_LINEAR: ("mkldnn", ["_reorder_linear_weight", "_linear_pointwise"]),
    INT8: ("onednn", ["qconv_prepack", "qconv2d_pointwise"]),
}


@pytest.mark.parametrize("kernel", OPERATORS, ids=lambda kernel: kernel.name)
@pytest.mark.parametrize("change", [without, raising, wrong, not_a_number])
def test_plain_torch_takes_over_with_one_warning(kernel, change, monkeypatch, caplog):
    name, operators = OPERATORS[kernel]
    monkeypatch.setattr(torch.ops, name, change(getattr(torch.ops, name), operators))
    assert not kernel.works(CPU)
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert record.message.startswith(f"{kernel.name}: not used, plain torch instead (")
    assert "\n" not in record.message


def test_a_verdict_holds_for_the_process(caplog):
    asked = []

    def example(device):
        asked.append(device)
        yield torch.ones(3), torch.tensor([1.0, 1.0, 1.001])

    kernel = Kernel("three numbers", example)
    assert not kernel.works(CPU) and not kernel.works(CPU)
    assert len(asked) == len(caplog.records) == 1
    assert caplog.records[0].message.endswith("(its numbers are off by 0.001)")
    assert kernel.refused(CPU) and not kernel.refused(torch.device("cuda"))


def test_another_shape_is_no_result():
    assert not Kernel("shape", lambda device: [(torch.ones(1, 3), torch.ones(3))]).works(CPU)


def test_too_little_memory_says_nothing_about_an_operator(monkeypatch):
    def example(device):
        raise torch.OutOfMemoryError("injected")

    kernel = Kernel("large", example)
    with pytest.raises(torch.OutOfMemoryError):
        kernel.works(CPU)
    assert not kernel.refused(CPU)


def test_a_proof_depends_on_nothing_around_it_and_changes_nothing():
    torch.manual_seed(3)
    state = torch.get_rng_state()
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16), torch.device("meta"):
        for kernel in KERNELS:
            kernel.works(CPU)
    assert LSTM.works(CPU) and OUTPUT_LOSS.works(CPU) and TOPK.works(CPU)
    assert torch.equal(torch.get_rng_state(), state)


def test_a_pytorch_that_does_not_know_its_cpu_has_no_special_instructions(monkeypatch, caplog):
    monkeypatch.setattr(torch, "cpu", types.SimpleNamespace())
    assert not kernels.can_int8(CPU) and not kernels.can_pack(CPU)
    assert not caplog.records


@pytest.mark.parametrize("change", [without, raising, wrong])
def test_a_machine_with_all_instructions_captions_without_the_operators(change, monkeypatch, caplog):
    """The instructions are only said to be there: bfloat16 is emulated where they are not."""
    monkeypatch.setattr(torch.cpu, "_is_vnni_supported", lambda: True)
    monkeypatch.setattr(kernels, "multiplies_bf16", lambda device: True)
    monkeypatch.setattr("captioner.runtime.precision.multiplies_bf16", lambda device: True)
    model = make_model()
    exact = Captioner([make_model()], Vocab(TINY_WORDS), CPU, torch.float32)
    wanted = evaluate_batch(exact, make_batch(), SearchOptions(2), 0)
    for name, operators in (OPERATORS[PACKED_LINEAR], OPERATORS[INT8]):
        monkeypatch.setattr(torch.ops, name, change(getattr(torch.ops, name), operators))
    checkpoint = Checkpoint(CONFIG, Vocab(TINY_WORDS), model.state_dict())
    captioner = make_captioner([checkpoint], CPU, "auto", lambda count: [])
    assert captioner.arithmetic == "bf16 (plain torch: packed linear layer, 8-bit convolutions)"
    warned = sorted(record.message.split(":")[0] for record in caplog.records if record.levelno == logging.WARNING)
    assert warned == ["8-bit convolutions", "packed linear layer"]
    found = evaluate_batch(captioner, make_batch(), SearchOptions(2), 0)
    rows = [caption_row(caption) for caption in captions_of(found, Vocab(TINY_WORDS))]
    assert [row["arithmetic"] for row in rows] == [captioner.arithmetic] * 3
    for ours, theirs in zip(found.hypotheses, wanted.hypotheses, strict=True):
        assert ours[0].logprob == pytest.approx(theirs[0].logprob, rel=0.03)
