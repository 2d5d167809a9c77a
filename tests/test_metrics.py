"""Scores against hand-worked values and against coco-caption's own code."""

import math
import subprocess
import sys

import numpy as np
import pytest

from captioner.data.tokenizers import tokenise
from captioner.errors import InputError
from captioner.metrics import score


def test_a_perfect_caption_scores_one() -> None:
    scores = score(["A dog runs fast."], [["a dog runs fast"]]).corpus
    for name in ("Bleu_1", "Bleu_4", "ROUGE_L"):
        assert scores[name] == pytest.approx(1.0)


def test_bleu_by_hand() -> None:
    # 4 words against 5: two right words, one right pair, brevity exp(1 - 5/4).
    scores = score(["a dog eats cake"], [["a dog is running fast"]]).corpus
    brevity = math.exp(1 - 5 / 4)
    assert scores["Bleu_1"] == pytest.approx(2 / 4 * brevity, rel=1e-6)
    assert scores["Bleu_2"] == pytest.approx(math.sqrt(2 / 4 * 1 / 3) * brevity, rel=1e-6)


def test_bleu_clips_counts_by_the_richest_reference_and_takes_the_closest_length() -> None:
    scores = score(["the the the the"], [["the cat on the mat", "the dog"]]).corpus
    assert scores["Bleu_1"] == pytest.approx(2 / 4 * math.exp(1 - 5 / 4), rel=1e-6)
    # 3 and 5 words are equally far from 4: the shorter counts, so there is no penalty.
    assert score(["a b c d"], [["a b c", "a b c d e"]]).corpus["Bleu_1"] == pytest.approx(1.0)


def test_rouge_l_by_hand() -> None:
    # Longest common subsequence "a dog fast": precision 3/4, recall 3/5.
    precision, recall = 3 / 4, 3 / 5
    expected = (1 + 1.2**2) * precision * recall / (recall + 1.2**2 * precision)
    assert score(["a dog fast eats"], [["a dog is running fast"]]).corpus["ROUGE_L"] == pytest.approx(expected)


def test_cider_by_hand() -> None:
    # Two images, one reference each; "a" is in both documents and weighs nothing, every other word log 2.
    scores = score(["a dog", "a tree"], [["a dog"], ["a cat"]])
    assert scores.per_caption["CIDEr"] == pytest.approx(
        [10 * (1 + 1) / 4, 0.0]
    )  # orders 1 and 2 match, 3 and 4 are empty
    assert scores.corpus["CIDEr"] == pytest.approx(2.5)


def test_cider_counts_documents_where_it_is_told() -> None:
    alone = score(["a dog runs"], [["a dog runs"]])
    assert alone.corpus["CIDEr"] == 0
    assert "one image" in alone.notes[0]
    others = [["a dog runs"], ["a cat sits"], ["a bird sings"]]
    informed = score(["a dog runs"], [["a dog runs"]], df_references=others)
    assert informed.corpus["CIDEr"] == pytest.approx(10 * 3 / 4)
    assert not informed.notes
    # The same documents as evaluated references give the same number.
    predictions = ["a dog runs", "a cat flies", "two birds sing"]
    assert score(predictions, others, df_references=others).corpus == score(predictions, others).corpus


ODD = {
    "one image": (["a dog"], [["a dog runs", "the dog"]]),
    "empty prediction": (["", "a cat"], [["a dog"], ["a cat sits"]]),
    "all predictions empty": (["", ""], [["a dog"], ["a cat"]]),
    "punctuation only": (["...!?", "a cat"], [["a dog"], ["!!", "a cat"]]),
    "everything empty": (["", "."], [["", "!"], ["?"]]),
    "unicode": (["ein Mädchen läuft", "一个人 骑马"], [["Ein Mädchen läuft."], ["一个人 骑马", "馬"]]),
    "very long": (["a dog " * 700, "cat"], [["the dog runs " * 400], ["a cat"]]),
    "duplicates": (["a dog"] * 4, [["a dog"] * 5] * 4),
    "repeated words": (["a a a a", "b b"], [["a a b", "a a a"], ["b a b"]]),
    "longer than three bigrams": (["a b c d e f g h i j k l m n", "x"], [["a b"], ["x y z"]]),
}


@pytest.mark.parametrize("predictions, references", ODD.values(), ids=ODD.keys())
def test_odd_cases_equal_coco_caption(predictions: list[str], references: list[list[str]]) -> None:
    assert_equals_coco_caption(predictions, references)


def test_random_corpora_equal_coco_caption() -> None:
    generator = np.random.default_rng(4)

    def caption() -> str:
        return " ".join(generator.choice(list("abcdefg"), size=generator.integers(0, 12)))

    for _ in range(40):
        number = generator.integers(1, 8)
        references = [[caption() for _ in range(generator.integers(1, 6))] for _ in range(number)]
        assert_equals_coco_caption([caption() for _ in range(number)], references)


def assert_equals_coco_caption(predictions: list[str], references: list[list[str]]) -> None:
    pytest.importorskip("pycocoevalcap", reason="needs the extra `metrics`")
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.rouge.rouge import Rouge

    ours = score(predictions, references)
    truth = {i: [" ".join(tokenise(c, "ptb")) for c in captions] for i, captions in enumerate(references)}
    guess = {i: [" ".join(tokenise(caption, "ptb"))] for i, caption in enumerate(predictions)}
    bleu, bleus = Bleu(4).compute_score(truth, guess, verbose=0)
    expected = {f"Bleu_{k + 1}": (bleu[k], bleus[k]) for k in range(4)}
    expected["ROUGE_L"] = Rouge().compute_score(truth, guess)
    expected["CIDEr"] = _cider(Cider(), truth, guess)
    for name, (corpus, each) in expected.items():
        assert ours.corpus[name] == pytest.approx(corpus, abs=1e-9), name
        np.testing.assert_allclose(ours.per_caption[name], each, atol=1e-9, err_msg=name)


def _cider(metric: object, truth: dict, guess: dict) -> tuple[float, list[float]]:
    try:
        return metric.compute_score(truth, guess)  # type: ignore[attr-defined]
    except ValueError:  # it takes the maximum of no document frequencies when no reference has a word
        return 0.0, [0.0] * len(truth)


def test_predictions_without_references_are_refused() -> None:
    with pytest.raises(InputError, match="caption 2 of 2 has no references"):
        score(["a", "b"], [["a"], []])
    with pytest.raises(InputError, match="no captions to score"):
        score([], [])


def test_scoring_does_not_import_torch() -> None:
    program = "import sys; from captioner.metrics import score; score(['a'], [['a']]); print('torch' in sys.modules)"
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "False"
