"""Too little memory: smaller pieces of the same batch, with the result of the whole one."""

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from captioner.data.batch import Batch, FeatureInputs, PixelInputs
from captioner.data.dataset import Dataset
from captioner.data.vocabulary import Vocab
from captioner.errors import InputError
from captioner.inference.captioner import Captioner
from captioner.inference.likelihood import likelihoods
from captioner.inference.run import evaluate
from captioner.model.caption_model import CaptionModel
from captioner.model.checkpoint import load_checkpoint
from captioner.model.config import ModelConfig
from captioner.runtime.memory import is_out_of_memory
from captioner.search import SearchOptions
from captioner.training.feature_cache import CacheForm, Views

CAPTIONS = 2  # per image
RUN = ["--cnn_layer", "pool5", "--rnn_size", 24, "--input_encoding_size", 16, "--gpuid", -1, "--batch_size", 7]
RUN += ["--seq_per_img", CAPTIONS, "--drop_prob_lm", 0, "--max_iters", 4, "--save_checkpoint_every", 2]
RUN += ["--num_workers", 0, "--learning_rate", 0.01, "--losses_log_every", 1, "--precision", "fp32"]
WAYS = {
    "frozen": [],
    "fine-tuned later": ["--finetune_cnn_after", 2, "--cnn_learning_rate", 1e-4],
    "already in parts": ["--accumulate", 2, "--finetune_cnn_after", 0, "--cnn_learning_rate", 1e-4],
}


class _FailsInBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, total: Tensor) -> Tensor:
        return total.clone()

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        raise torch.OutOfMemoryError("injected")


def limit_memory(monkeypatch: pytest.MonkeyPatch, images: int, where: str) -> list[int]:
    """Let training fail for more than `images` at once; returns the list of what was tried, as it grows."""
    tried: list[int] = []
    whole = CaptionModel.loss_sum

    def loss_sum(
        self: CaptionModel, encodings: Tensor, image_of_caption: Tensor, labels: Tensor, *rest: float
    ) -> tuple[Tensor, int]:
        if not self.training:
            return whole(self, encodings, image_of_caption, labels, *rest)
        tried.append(len(labels) // CAPTIONS)
        too_large = tried[-1] > images
        if too_large and where == "forward":
            raise torch.OutOfMemoryError("injected")
        total, count = whole(self, encodings, image_of_caption, labels, *rest)
        return (_FailsInBackward.apply(total) if too_large else total), count

    monkeypatch.setattr(CaptionModel, "loss_sum", loss_sum)
    return tried


def assert_same_weights(one: Path, other: Path) -> None:
    first, second = load_checkpoint(one).state_dict, load_checkpoint(other).state_dict
    for name, tensor in first.items():
        # Adam turns rounding of tiny gradients into steps of up to a tenth of the learning rate.
        torch.testing.assert_close(tensor, second[name], rtol=0, atol=5e-4, msg=lambda m, n=name: f"{n}: {m}")


@pytest.fixture(scope="module")
def data(tiny_dataset, tiny_cnn):
    return ["--input_h5", tiny_dataset[0], "--input_json", tiny_dataset[1], "--cnn_model", tiny_cnn, *RUN]


@pytest.fixture(scope="module", params=WAYS)
def whole(request, data, command, tmp_path_factory):
    """A run with memory enough, and its options."""
    folder = tmp_path_factory.mktemp("whole")
    options = [*data, *WAYS[request.param]]
    done = command("train", *options, "--checkpoint_path", folder)
    assert done.returncode == 0, done.stderr
    assert "out of memory" not in done.stderr
    return options, folder


@pytest.mark.parametrize("where", ["forward", "backward"])
def test_a_batch_in_smaller_pieces_trains_the_same(where, whole, command, tmp_path, monkeypatch):
    options, folder = whole
    tried = limit_memory(monkeypatch, 2, where)
    done = command("train", *options, "--checkpoint_path", tmp_path)
    assert done.returncode == 0, done.stderr
    assert_same_weights(folder / "model_id_last.pt", tmp_path / "model_id_last.pt")
    announced = re.findall(r"out of memory with (\d+) images at once: going on with (\d+)", done.stderr)
    assert announced == ([("4", "2")] if "--accumulate" in options else [("7", "4"), ("4", "2")])
    # 7 images are four pieces; once they fit, nothing larger is tried again.
    assert tried == [int(size) for size, _ in announced] + [2, 2, 2, 1] * 4


def test_a_continued_run_keeps_the_smaller_pieces(data, command, tmp_path, monkeypatch):
    """Dropout draws for each piece, so that other pieces would be another run."""
    options = [*data, "--drop_prob_lm", 0.5, "--resume", "auto"]
    tried = limit_memory(monkeypatch, 3, "forward")
    assert command("train", *options, "--checkpoint_path", tmp_path / "whole").returncode == 0
    assert command("train", *options, "--max_iters", 2, "--checkpoint_path", tmp_path / "two").returncode == 0
    tried.clear()
    done = command("train", *options, "--checkpoint_path", tmp_path / "two")
    assert done.returncode == 0 and tried == [2, 2, 2, 1] * 2
    one, other = (load_checkpoint(tmp_path / name / "model_id_last.pt").state_dict for name in ("whole", "two"))
    assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())


def test_too_little_for_one_image_is_one_line(data, command, tmp_path, monkeypatch):
    limit_memory(monkeypatch, 0, "forward")
    done = command("train", *data, "--checkpoint_path", tmp_path)
    assert done.returncode == 1
    line = done.stderr.splitlines()[-1]
    assert line.startswith("caption-train: error: out of memory with one image") and "pool5" in line
    assert load_checkpoint(tmp_path / "model_id_last.pt").history.iteration == 0


ONE_SMALL_RANK = """
import os, sys, torch
from captioner.cli.train import main
from captioner.data.batch import Batch, FeatureInputs, PixelInputs
from captioner.data.vocabulary import Vocab
from captioner.errors import InputError
from captioner.inference.captioner import Captioner
from captioner.inference.likelihood import likelihoods
from captioner.inference.run import evaluate
from captioner.model.caption_model import CaptionModel
whole = CaptionModel.loss_sum
def loss_sum(self, encodings, image_of_caption, labels, *rest):
    if self.training and os.environ.get("RANK") == "1" and len(labels) > 2:
        print("injected", file=sys.stderr)
        raise torch.OutOfMemoryError("injected")
    return whole(self, encodings, image_of_caption, labels, *rest)
CaptionModel.loss_sum = loss_sum
sys.exit(main())
"""


def test_processes_may_cut_their_shares_differently(data, command, tmp_path):
    assert command("train", *data, "--checkpoint_path", tmp_path / "one").returncode == 0
    (tmp_path / "small_rank.py").write_text(ONE_SMALL_RANK)
    argv = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", 2]
    argv += [tmp_path / "small_rank.py", *data, "--checkpoint_path", tmp_path / "two"]
    done = subprocess.run([str(a) for a in argv], capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("injected") == 2  # three images, then two, then one
    assert_same_weights(tmp_path / "one" / "model_id_last.pt", tmp_path / "two" / "model_id_last.pt")


WORDS = ["a", "dog", "runs"]
CUDNN = RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED")


@pytest.fixture
def captioner():
    torch.manual_seed(0)
    config = ModelConfig(3, 6, encoding_size=8, rnn_size=8, cnn_layer="pool5", conv_widths=(3,) * 13)
    return Captioner([CaptionModel(config)], Vocab(WORDS), torch.device("cpu"), torch.float32)


def feature_batches(*sizes: int) -> list[Batch]:
    features = torch.randn(sum(sizes), 3, generator=torch.Generator().manual_seed(0))
    starts = [sum(sizes[:k]) for k in range(len(sizes))]
    return [
        Batch([{}] * size, list(range(start, start + size)), FeatureInputs(features[start : start + size]))
        for start, size in zip(starts, sizes, strict=True)
    ]


def let_encoding_fail(monkeypatch: pytest.MonkeyPatch, images: int, error: Exception) -> list[int]:
    tried: list[int] = []
    whole = CaptionModel.encode

    def encode(self: CaptionModel, inputs: PixelInputs | FeatureInputs) -> Tensor:
        assert isinstance(inputs, FeatureInputs)
        tried.append(len(inputs.features))
        if tried[-1] > images:
            raise error
        return whole(self, inputs)

    monkeypatch.setattr(CaptionModel, "encode", encode)
    return tried


def test_captioning_goes_on_in_smaller_pieces_and_remembers_them(captioner, monkeypatch, caplog):
    def captions() -> list:
        found = evaluate(captioner, feature_batches(5, 5, 1), SearchOptions(beam_size=2))
        return [
            (batch.positions, [[h.tokens for h in hypotheses] for hypotheses in batch.hypotheses]) for batch in found
        ]

    whole = captions()
    tried = let_encoding_fail(monkeypatch, 2, CUDNN)
    assert captions() == whole
    assert tried == [5, 3, 2, 2, 1, 2, 2, 1, 1]
    assert [record.message.partition(":")[0] for record in caplog.records] == [
        "out of memory with 5 images at once",
        "out of memory with 3 images at once",
    ]
    assert next(iter(evaluate(captioner, feature_batches(4), SearchOptions()))).positions == [0, 1, 2, 3]
    assert max(tried[9:]) <= 2  # the next run of the same model has not forgotten


def test_judging_goes_on_in_smaller_pieces(captioner, monkeypatch):
    texts = [["a dog", "dog runs a"]] * 5
    whole = [judged for _, judged in likelihoods(captioner, feature_batches(3, 2), texts)]
    let_encoding_fail(monkeypatch, 1, CUDNN)
    pieces = [judged for _, judged in likelihoods(captioner, feature_batches(3, 2), texts)]
    for one, other in zip(sum(whole, []), sum(pieces, []), strict=True):
        assert one.logprob == pytest.approx(other.logprob, abs=1e-5)


def test_features_to_keep_are_computed_in_smaller_pieces(tiny_dataset, monkeypatch):
    torch.manual_seed(0)
    model = CaptionModel(
        ModelConfig(3, 6, encoding_size=8, rnn_size=8, cnn_layer="pool5", conv_widths=(3,) * 13)
    ).eval()
    views = Views(model, Dataset.open(*tiny_dataset), CacheForm(1), torch.device("cpu"), 0)
    views.batch_size = 5
    whole = list(views.of(np.arange(7)))
    tried, compute = [], CaptionModel.cnn_features

    def cnn_features(self: CaptionModel, images: Tensor, offsets: Tensor) -> Tensor:
        tried.append(len(images))
        if len(images) > 2:
            raise CUDNN
        return compute(self, images, offsets)

    monkeypatch.setattr(CaptionModel, "cnn_features", cnn_features)
    for one, other in zip(whole, views.of(np.arange(7)), strict=True):
        assert torch.allclose(one, other, rtol=1e-5, atol=1e-6)
    assert tried == [5, 3, 2, 2, 1, 1, 1]


def test_too_little_for_one_image_to_caption_is_an_input_error(captioner, monkeypatch):
    let_encoding_fail(monkeypatch, 0, torch.OutOfMemoryError("injected"))
    with pytest.raises(InputError, match="out of memory with one image at a time"):
        list(evaluate(captioner, feature_batches(2), SearchOptions()))


def test_other_errors_are_not_too_little_memory(captioner, monkeypatch):
    let_encoding_fail(monkeypatch, 0, RuntimeError("CUDA error: an illegal memory access was encountered"))
    with pytest.raises(RuntimeError, match="illegal"):
        list(evaluate(captioner, feature_batches(2), SearchOptions()))


@pytest.mark.parametrize(
    ("error", "too_little"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."), True),
        (MemoryError(), True),
        (
            RuntimeError("[enforce fail at alloc_cpu.cpp:118] err == 0. DefaultCPUAllocator: can't allocate memory"),
            True,
        ),
        (RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`"), True),
        (RuntimeError("CUDA error: out of memory"), True),
        (RuntimeError("MPS backend out of memory (MPS allocated: 17 GB)"), True),
        (RuntimeError("cuDNN error: CUDNN_STATUS_EXECUTION_FAILED"), False),
        (RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasSgemm`"), False),
    ],
    ids=str,
)
def test_ways_to_say_that_memory_is_too_small(error, too_little):
    assert is_out_of_memory(error) is too_little
