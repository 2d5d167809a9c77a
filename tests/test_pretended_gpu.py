"""What runs on a GPU, without one: devices are not mixed, and the host neither waits nor copies but where it must."""

import itertools

import numpy as np
import pytest
import torch
from pretend_gpu import GPU, pretend_gpu
from trainers import make_trainer

from captioner.data.batch import Batch, KnownCaptions, PixelInputs
from captioner.data.batches import pinned_ahead
from captioner.data.dataset import Dataset
from captioner.data.vocabulary import Vocab
from captioner.errors import InputError
from captioner.inference.captioner import Captioner
from captioner.inference.run import evaluate, evaluate_batch
from captioner.model.caption_model import CaptionModel
from captioner.model.checkpoint_content import TrainingHistory
from captioner.model.config import ModelConfig
from captioner.search import SearchOptions
from captioner.training.feature_cache import CacheForm, Views
from captioner.training.health_checks import LossMonitor, LossTrend
from captioner.training.loop import update

WORDS = [f"w{number}" for number in range(12)]
IMAGES = 4
# Of the CNN and six steps, with room for a twentieth more: the time of a search on a GPU is that of their launches.
KERNELS = {("lstm", 1): 177, ("lstm", 3): 294, ("attention", 1): 343, ("attention", 3): 499}


def make_model(decoder: str) -> CaptionModel:
    torch.manual_seed(0)
    model = CaptionModel(
        ModelConfig(
            12,
            6,
            encoding_size=16,
            rnn_size=16,
            drop_prob_lm=0.0,
            drop_prob_words=0.0,
            drop_prob_features=0.0,
            cnn_layer="pool5",
            conv_widths=(4,) * 13,
            decoder=decoder,
        )
    )
    with torch.no_grad():  # no caption ends before the longest, so that all steps are taken
        (model.decoder.output_bias if decoder == "attention" else model.decoder.output.bias)[-1] = -30
    return model


def make_batch(seed: int = 0) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(1, 13, (2 * IMAGES, 6), generator=generator)
    labels[::3, 4:] = 0
    images = torch.randint(0, 256, (IMAGES, 3, 256, 256), dtype=torch.uint8, generator=generator)
    inputs = PixelInputs(images, torch.randint(0, 33, (IMAGES, 2), generator=generator))
    captions = KnownCaptions(labels, torch.arange(IMAGES).repeat_interleave(2))
    return Batch([{}] * IMAGES, list(range(IMAGES)), inputs, captions)


@pytest.mark.parametrize("decoder", ["lstm", "attention"])
def test_a_training_iteration_never_makes_the_host_wait(decoder, monkeypatch):
    wanted = update(make_trainer(make_model(decoder), "adam", 0.01), make_batch(), 0, rate_factor=1.0, finetune=True)

    def backward(_: torch.Tensor) -> None:  # torch's own needs a driver for GPUs
        for parameter in trainer.model.parameters():
            parameter.grad = torch.zeros_like(parameter)

    monkeypatch.setattr(torch.Tensor, "backward", backward)
    with pretend_gpu(monkeypatch) as gpu:
        trainer = make_trainer(make_model(decoder).to(GPU), "adam", 0.01)
        batch = next(iter(pinned_ahead([make_batch()])))
        gpu.begin()
        loss = update(trainer, batch, 0, rate_factor=1.0, finetune=True)
        assert not gpu.lines("wait", "download", "upload, pageable"), gpu.book
        assert gpu.count("upload") <= 7, gpu.book  # pixels, crops, and what the decoder arranges
        assert float(loss) == pytest.approx(float(wanted), rel=1e-5)


def test_the_loss_of_an_iteration_is_fetched_once_and_read_while_the_next_is_under_way(monkeypatch):
    with pretend_gpu(monkeypatch) as gpu:
        monitor = LossMonitor(TrainingHistory(), None, 1, str, LossTrend(12))
        queue = torch.cuda.current_stream(GPU)
        for iteration in range(3):
            loss = torch.full((), 2.5, device=GPU)
            for _ in range(5):  # the iteration's work
                loss = loss + 0
            monitor.note(iteration, loss)
        assert len(queue.left_behind) == 2 and min(queue.left_behind) >= 5, "the host waits for what was just queued"
        monitor.flush()
        assert monitor.history.loss_history == {0: 2.5, 1: 2.5, 2: 2.5}
        assert gpu.lines("download", "wait") == {"runtime/transfers.py: __init__"}
        assert gpu.count("download", "wait") == 3


def test_features_to_keep_are_fetched_once_a_batch_whatever_their_crops(tiny_dataset, monkeypatch):
    dataset, form = Dataset.open(*tiny_dataset), CacheForm(2, mirrored=True)
    indices = np.arange(3, 9)
    (wanted,) = Views(make_model("attention").eval(), dataset, form, torch.device("cpu"), 0).of(indices)
    with pretend_gpu(monkeypatch) as gpu:
        views = Views(make_model("attention").eval().to(GPU), dataset, form, GPU, 0)
        gpu.begin()
        (found,) = views.of(indices)
        assert not gpu.lines("upload, pageable"), gpu.book
        assert gpu.count("upload") == 1 and gpu.count("download", "wait") == 1, gpu.book
    assert found.shape == (6, 4, 49, 4) and torch.allclose(found, wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("beam_size", [1, 3])
@pytest.mark.parametrize("decoder", ["lstm", "attention"])
def test_a_search_asks_once_a_step_and_fetches_what_it_found_in_one_piece(decoder, beam_size, monkeypatch):
    options = SearchOptions(beam_size=beam_size)
    vocab, bare = Vocab(WORDS), Batch([{}] * IMAGES, list(range(IMAGES)), make_batch().inputs)
    plain = Captioner([make_model(decoder)], vocab, torch.device("cpu"), torch.float32)
    wanted = [[h.tokens for h in own] for own in evaluate_batch(plain, bare, options, 0).hypotheses]
    with pretend_gpu(monkeypatch) as gpu:
        captioner = Captioner([make_model(decoder)], vocab, GPU, torch.float32)
        batch = next(iter(pinned_ahead([bare])))
        gpu.begin()
        found = evaluate_batch(captioner, batch, options, 0)
        assert [[h.tokens for h in own] for own in found.hypotheses] == wanted
        steps = 6
        assert not gpu.lines("upload, pageable"), gpu.book
        assert gpu.count("upload") <= 4, gpu.book  # pixels and crops, and which words are never said or never last
        # Once a step whether all have ended; in the end ids and numbers.
        assert gpu.count("download", "wait") <= steps + 2, gpu.book
        assert gpu.kernels <= KERNELS[decoder, beam_size], gpu.kernels


def findings(captioner: Captioner, batches: list[Batch]) -> list:
    return [
        ([[h.tokens for h in own] for own in found.hypotheses], round(found.loss_sum, 3))
        for found in evaluate(captioner, batches, SearchOptions(beam_size=2))
    ]


@pytest.mark.parametrize("decoder", ["lstm", "attention"])
def test_the_next_batch_is_encoded_beside_the_search_of_this_one(decoder, monkeypatch):
    """In queues of their own, none of which uses what another has not finished yet."""
    vocab, batches = Vocab(WORDS), [make_batch(seed) for seed in range(4)]
    plain = Captioner([make_model(decoder)], vocab, torch.device("cpu"), torch.float32)
    wanted = findings(plain, batches)
    with pretend_gpu(monkeypatch) as gpu:
        captioner = Captioner([make_model(decoder)], vocab, GPU, torch.float32)
        gpu.begin()
        assert findings(captioner, batches) == wanted
        assert not gpu.races, gpu.races
        assert gpu.stream is gpu.default
        turns = [queue for queue, _ in itertools.groupby(queue for queue, _ in gpu.queued)]
        assert turns == ["uploads", "default"] + 3 * ["uploads", "default", "searches"]  # the last search is two
        assert all("search" not in line for queue, line in gpu.queued if queue != "searches")
        assert not gpu.lines("upload, pageable"), gpu.book
        assert sum(times for (what, line), times in gpu.book.items() if what == "upload" and "batch.py" in line) == 8


def test_where_memory_is_too_small_for_two_batches_they_come_one_after_the_other(monkeypatch):
    vocab, batches = Vocab(WORDS), [make_batch(seed) for seed in range(4)]
    plain = Captioner([make_model("lstm")], vocab, torch.device("cpu"), torch.float32)
    wanted = findings(plain, batches)
    with pretend_gpu(monkeypatch) as gpu:
        captioner = Captioner([make_model("lstm")], vocab, GPU, torch.float32)
        calls, see = [], captioner.see

        def two_are_too_many(batch: Batch, with_grid: bool):
            calls.append(len(batch.positions))
            if len(calls) == 2:
                raise torch.OutOfMemoryError("injected")
            return see(batch, with_grid)

        monkeypatch.setattr(captioner, "see", two_are_too_many)
        gpu.begin()
        assert findings(captioner, batches) == wanted and not gpu.races
        assert calls == [4] * 5 and captioner.pieces.count == 1  # one in vain, and nothing in smaller pieces
        turns = [queue for queue, _ in itertools.groupby(queue for queue, _ in gpu.queued)]
        assert turns == ["uploads", "default", "uploads", "searches", "default"]  # the others in one queue


def test_a_batch_that_cannot_be_read_costs_none_before_it(monkeypatch):
    def batches():
        yield from (make_batch(seed) for seed in range(2))
        raise InputError("the file is cut off")

    with pretend_gpu(monkeypatch):
        found = evaluate(Captioner([make_model("lstm")], Vocab(WORDS), GPU, torch.float32), batches(), SearchOptions())
        assert [len(next(found).positions) for _ in range(2)] == [4, 4]
        with pytest.raises(InputError, match="cut off"):
            next(found)


def test_what_one_queue_uses_of_another_unsaid_is_found(monkeypatch):
    """The pretended GPU itself."""
    with pretend_gpu(monkeypatch) as gpu:
        other = torch.cuda.Stream(GPU)
        made = torch.ones(3, device=GPU)
        with torch.cuda.stream(other):
            made + 1
        assert len(gpu.races) == 2 and "does not wait for default" in gpu.races[0] and "unsaid" in gpu.races[1]
        gpu.races.clear()
        made.record_stream(other)
        other.wait_stream(torch.cuda.current_stream(GPU))
        with torch.cuda.stream(other):
            made + 1
        assert not gpu.races
        made.add_(1)  # which the other queue may not have read yet
        assert len(gpu.races) == 1
