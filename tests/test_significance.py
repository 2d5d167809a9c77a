"""Intervals and paired tests against textbook answers and brute force."""

import itertools

import numpy as np
import pytest

from captioner.metrics import score
from captioner.metrics.measure import Measure, mean_measure
from captioner.metrics.significance import bootstrap_intervals, compare

WORDS = ["a", "dog", "cat", "runs", "sits", "on", "grass", "the", "red", "chair"]


def random_captions(generator: np.random.Generator, number: int) -> list[str]:
    return [" ".join(generator.choice(WORDS, size=generator.integers(3, 9))) for _ in range(number)]


def test_interval_of_a_mean_is_the_normal_one() -> None:
    values = np.random.default_rng(0).normal(5, 2, size=2000)
    low, high = bootstrap_intervals({"x": mean_measure(values)}, num_samples=4000)["x"]
    margin = 1.96 * values.std() / np.sqrt(len(values))
    assert low == pytest.approx(values.mean() - margin, abs=0.1 * margin)
    assert high == pytest.approx(values.mean() + margin, abs=0.1 * margin)


def test_a_resample_scores_as_its_captions_do() -> None:
    """Weighing rows is the same as scoring the drawn captions anew, for BLEU too, which is no mean."""
    generator = np.random.default_rng(1)
    predictions = random_captions(generator, 12)
    references = [random_captions(generator, 3) for _ in predictions]
    drawn = generator.integers(12, size=12)
    measures = score(predictions, references, metrics=["Bleu", "ROUGE_L"]).measures
    again = score([predictions[i] for i in drawn], [references[i] for i in drawn], metrics=["Bleu", "ROUGE_L"]).corpus
    for name, measure in measures.items():
        assert float(measure.combine(measure.rows[drawn].sum(axis=0))) == pytest.approx(again[name])


def test_identical_systems_do_not_differ() -> None:
    measures = {"x": mean_measure(np.arange(10.0))}
    found = compare(measures, measures, num_swaps=500)["x"]
    assert (found.difference, found.low, found.high, found.p) == (0, 0, 0, 1)


def test_p_is_the_share_of_all_swaps() -> None:
    first, second = np.array([3.0, 1, 4, 1, 5, 9, 2, 6]), np.array([2.0, 2, 3, 1, 3, 5, 3, 4])
    differences = [
        abs(np.mean(np.where(swap, second - first, first - second)))
        for swap in itertools.product([False, True], repeat=8)
    ]
    exact = np.mean([value >= abs(np.mean(first - second)) - 1e-12 for value in differences])
    found = compare({"x": mean_measure(first)}, {"x": mean_measure(second)}, num_swaps=40_000)["x"]
    assert found.p == pytest.approx(exact, abs=0.01)
    assert found.difference == pytest.approx(np.mean(first - second))


def test_pairing_finds_what_separate_intervals_hide() -> None:
    """A small steady gain on images of very different difficulty."""
    generator = np.random.default_rng(2)
    hard = generator.normal(0, 10, size=300)
    first = mean_measure(hard + 0.3 + generator.normal(0, 0.5, size=300))
    second = mean_measure(hard)
    intervals = bootstrap_intervals({"first": first, "second": second})
    assert intervals["second"][1] > intervals["first"][0]
    found = compare({"x": first}, {"x": second}, num_swaps=2000)["x"]
    assert found.low > 0
    assert found.p < 0.01


def test_the_seed_decides_and_memory_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    values = mean_measure(np.random.default_rng(3).normal(size=50))
    once = bootstrap_intervals({"x": values}, seed=7)
    assert bootstrap_intervals({"x": values}, seed=7) == once
    assert bootstrap_intervals({"x": values}, seed=8) != once
    monkeypatch.setattr("captioner.metrics.significance._CELLS_AT_ONCE", 120)  # two resamples at a time
    assert bootstrap_intervals({"x": values}, seed=7)["x"] == pytest.approx(once["x"])


def test_one_image_has_no_spread() -> None:
    one = Measure(np.array([0.5]), np.array([[1.0, 2.0]]), lambda sums: sums[..., 0] / sums[..., 1])
    assert bootstrap_intervals({"x": one})["x"] == (0.5, 0.5)
