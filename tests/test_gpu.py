"""A GPU computes what the CPU does and does not wait for the host; the GPU benchmarks run, tiny, on the CPU too."""

import sys
import warnings
from pathlib import Path

import pytest
import torch
from test_decoder import make_decoder
from trainers import make_trainer

from captioner.data.batch import Batch, KnownCaptions, PixelInputs
from captioner.data.vocabulary import Vocab
from captioner.inference.captioner import Captioner
from captioner.inference.run import evaluate, evaluate_batch
from captioner.model.caption_model import CaptionModel
from captioner.model.config import ModelConfig
from captioner.search import SearchOptions, search
from captioner.training.loop import update

CONFIG = ModelConfig(12, 6, encoding_size=16, rnn_size=24, drop_prob_lm=0.0, cnn_layer="pool5", conv_widths=(8,) * 13)


def make_model() -> CaptionModel:
    torch.manual_seed(0)
    return CaptionModel(CONFIG)


def make_batch(seed: int = 0) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(1, 13, (8, 6), generator=generator)
    labels[::3, 4:] = 0
    return Batch(
        info=[{}] * 4,
        positions=list(range(4)),
        inputs=PixelInputs(
            torch.randint(0, 256, (4, 3, 256, 256), dtype=torch.uint8, generator=generator),
            torch.tensor([[0, 31], [16, 16], [31, 0], [7, 9]]),
        ),
        captions=KnownCaptions(labels, torch.arange(4).repeat_interleave(2)),
    )


@pytest.fixture
def exact_products(monkeypatch):
    """float32 products without TF32."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


@pytest.mark.gpu
@pytest.mark.parametrize("finetune", [False, True])
def test_a_training_step_changes_the_weights_as_on_the_cpu(finetune, exact_products):
    here, there = make_trainer(make_model()), make_trainer(make_model().to("cuda"))
    losses = [update(trainer, make_batch(), 0, rate_factor=1.0, finetune=finetune) for trainer in (here, there)]
    assert losses[0].item() == pytest.approx(losses[1].item(), abs=1e-4)
    for (name, ours), theirs in zip(here.model.named_parameters(), there.model.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs.cpu(), rtol=1e-3, atol=1e-5, msg=lambda text, n=name: f"{n}: {text}")


@pytest.mark.gpu
def test_evaluation_gives_what_the_cpu_gives(exact_products):
    vocab = Vocab([f"w{number}" for number in range(12)])
    here, there = (
        evaluate_batch(
            Captioner([make_model()], vocab, torch.device(device), torch.float32), make_batch(), SearchOptions(3), 0
        )
        for device in ("cpu", "cuda")
    )
    assert [h.tokens for own in here.hypotheses for h in own] == [h.tokens for own in there.hypotheses for h in own]
    assert here.loss_sum == pytest.approx(there.loss_sum, rel=1e-4)
    assert here.num_targets == there.num_targets


@pytest.mark.gpu
@pytest.mark.parametrize("beam_size", [1, 3])
def test_batches_encoded_ahead_give_what_the_cpu_gives(beam_size, exact_products):
    vocab = Vocab([f"w{number}" for number in range(12)])
    here, there = (
        [
            [h.tokens for own in found.hypotheses for h in own]
            for found in evaluate(
                Captioner([make_model()], vocab, torch.device(device), torch.float32),
                [make_batch(seed) for seed in range(8)],
                SearchOptions(beam_size),
            )
        ]
        for device in ("cpu", "cuda")
    )
    assert here == there and len({str(one) for one in here}) > 1


def synchronisations(work) -> int:
    """How often `work` makes the host wait for the GPU."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            work()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return sum("synchronizing CUDA operation" in str(warning.message) for warning in caught)


@pytest.mark.gpu
@pytest.mark.parametrize("beam_size", [1, 3])
def test_a_search_waits_for_the_gpu_only_to_end_early(beam_size):
    decoder = make_decoder(vocab_size=10, rnn=16).to("cuda")
    with torch.no_grad():
        decoder.output.bias[-1] = -30  # no caption ends, none leaves the batch
    features = torch.randn(8, 4).double().cuda()

    def run(max_length: int) -> int:
        def work() -> None:
            state = decoder.start(features)
            options = SearchOptions(beam_size=beam_size)
            search(decoder.step, state, num_images=8, vocab_size=10, max_length=max_length, options=options)

        with torch.inference_mode():
            work()
            return synchronisations(work)

    # One answer per step, whether all images are done; what was found is fetched at the end, in a few copies a step.
    assert run(12) - run(6) <= 6 * (1 + 7)


@pytest.mark.gpu
def test_a_training_step_never_waits_for_the_gpu():
    trainer, batch = make_trainer(make_model().to("cuda")), make_batch().pin()
    update(trainer, batch, 0, rate_factor=1.0, finetune=True)
    assert synchronisations(lambda: update(trainer, batch, 1, rate_factor=1.0, finetune=True)) == 0


@pytest.fixture
def bench(shared, monkeypatch):
    """The benchmarks' folder lies beside the package, not in it."""
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1]))
    yield
    for name in [name for name in sys.modules if name.partition(".")[0] == "bench"]:
        del sys.modules[name]


def test_the_gpu_benchmarks_run_tiny_on_the_cpu(bench, capsys, monkeypatch):
    from bench import gpu_eval, gpu_train

    for module, name in ((gpu_train, "WARM_UP"), (gpu_train, "PROFILED"), (gpu_eval, "ROUNDS")):
        monkeypatch.setattr(module, name, 1)
    config = ModelConfig(9567, encoding_size=8, rnn_size=8, cnn_layer="pool5", conv_widths=(2,) * 13)
    gpu_train.measure(torch.device("cpu"), config, num_images=8, batches=(2,), num_iterations=1)
    gpu_eval.measure(torch.device("cpu"), config, num_images=8, batches=(2,))
    out = capsys.readouterr().out
    assert "| frozen | 2 |" in out
    assert "| fine-tuning | 2 |" in out
    assert "| float32 | 2 |" in out


def test_gradients_summed_by_distributed_data_parallel_train_the_same(bench, capsys, monkeypatch):
    """Which is not why training does without it: see docs/architecture.md."""
    from bench import ddp

    config = ModelConfig(9567, encoding_size=8, rnn_size=8, cnn_layer="pool5", conv_widths=(2,) * 13)
    ddp.measure(config, ranks=2, on_gpus=False, images=2, iterations=1)
    rows = [line.split(" | ") for line in capsys.readouterr().out.splitlines() if line.startswith(("| fr", "| fi"))]
    assert len(rows) == 4
    assert all(float(row[-1].rstrip(" |")) < 1e-6 for row in rows), rows


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what is missing where there is no GPU")
def test_the_gpu_benchmarks_say_in_one_line_that_there_is_no_gpu(bench, capsys):
    from bench import gpu_eval, gpu_train

    for module in (gpu_train, gpu_eval):
        module.run()
        out = capsys.readouterr().out
        assert out.count("\n") == 1
        assert "needs a CUDA GPU" in out
