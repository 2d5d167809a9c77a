"""Scores: speed and equality against coco-caption (pycocoevalcap) on the 5,000 images of COCO val2017.

The first caption of each image is the prediction and the others are its references; for equality also the first
caption of the image before it, a prediction that is wrong but fluent.
"""

import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np

from bench.timing import interleave, milliseconds, ratio
from captioner.metrics import METRICS, score, tokenise_groups
from captioner.metrics.java import Meteor
from captioner.metrics.ngrams import NgramTable, bleu, cider
from captioner.metrics.rouge import rouge_l

ROOT = Path(__file__).resolve().parents[1]
ANNOTATIONS = ROOT.parent / "shared/data/coco/captions_val2017.json"
ROUNDS = 5

Captions = tuple[list[str], list[list[str]]]  # N predictions, N lists of references


def run() -> None:
    """Print both tables."""
    first = [own[0] for own in _captions().values()]
    others = [own[1:] for own in _captions().values()]
    print(f"{len(first):,} images, {sum(map(len, others)):,} references\n")
    _speed((first, others))
    print()
    _equality({"own caption": (first, others), "another image's": ([first[-1], *first[:-1]], others)})


def _speed(captions: Captions) -> None:
    predictions, references = captions
    groups = [predictions, *references]
    words, *truth = tokenise_groups(groups, "python")
    coco = _coco_form(words, truth)
    coco_metric = _coco_metrics()
    pairs: list[tuple[str, Callable[[], object], Callable[[], object]]] = [
        ("tokeniser", lambda: tokenise_groups(groups, "python"), lambda: _ptb(predictions, references)),
        ("BLEU-1..4", lambda: bleu(NgramTable(words, truth)), lambda: coco_metric["Bleu"]().compute_score(*coco, 0)),
        ("ROUGE_L", lambda: rouge_l(words, truth), lambda: coco_metric["ROUGE_L"]().compute_score(*coco)),
        ("CIDEr", lambda: cider(NgramTable(words, truth)), lambda: coco_metric["CIDEr"]().compute_score(*coco)),
        ("METEOR", lambda: Meteor(words, truth).measure(), lambda: coco_metric["METEOR"]().compute_score(*coco)),
    ]
    print("| ms, median (min-max) | coco-caption | captioner | times faster |\n|---|---|---|---|")
    for name, ours, theirs in pairs:
        seconds = interleave({"theirs": theirs, "ours": ours}, ROUNDS)
        times = " | ".join(milliseconds(seconds[side]) for side in ("theirs", "ours"))
        print(f"| {name} | {times} | {ratio(seconds['theirs'], seconds['ours'])} |", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        written = Path(folder) / "predictions.json"
        written.write_text(json.dumps([{"image_id": i, "caption": own[0]} for i, own in _captions().items()]))
        command = [sys.executable, "-m", "captioner.cli.score", "--metrics", "Bleu,ROUGE_L,CIDEr"]
        command += ["--predictions", str(written), "--references", str(ANNOTATIONS)]
        whole = interleave({"all": lambda: subprocess.run(command, cwd=ROOT, check=True, capture_output=True)}, ROUNDS)
    print(f"| caption-score without Java: start of Python, files, 1,000 resamples | | {milliseconds(whole['all'])} | |")


def _equality(kinds: dict[str, Captions]) -> None:
    print("| largest difference | score | PTB tokeniser, corpus | PTB, any caption | our tokeniser, corpus |")
    print("|---|---|---|---|---|")
    for kind, (predictions, references) in kinds.items():
        coco = _ptb(predictions, references)
        bleus, each = _coco_metrics()["Bleu"]().compute_score(*coco, 0)
        expected = {f"Bleu_{k + 1}": (bleus[k], each[k]) for k in range(4)}
        for name in ("METEOR", "ROUGE_L", "CIDEr"):
            expected[name] = _coco_metrics()[name]().compute_score(*coco)
        ptb = score(predictions, references, metrics=METRICS, tokenizer="ptb")
        python = score(predictions, references, metrics=METRICS)
        for name, (corpus, captions) in expected.items():
            of_caption = np.abs(np.subtract(ptb.per_caption[name], captions)).max()
            print(
                f"| {name}, {kind} | {corpus:.4f} | {abs(ptb.corpus[name] - corpus):.1e} | {of_caption:.1e}"
                f" | {python.corpus[name] - corpus:+.5f} |",
                flush=True,
            )


def _captions() -> dict[int, list[str]]:
    captions: dict[int, list[str]] = {}
    for row in json.loads(ANNOTATIONS.read_text())["annotations"]:
        captions.setdefault(row["image_id"], []).append(row["caption"])
    return captions


def _coco_metrics() -> dict[str, Callable]:
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.meteor.meteor import Meteor
    from pycocoevalcap.rouge.rouge import Rouge

    return {"Bleu": lambda: Bleu(4), "METEOR": Meteor, "ROUGE_L": Rouge, "CIDEr": Cider}


def _coco_form(words: list[str], truth: list[list[str]]) -> tuple[dict[int, list[str]], dict[int, list[str]]]:
    return dict(enumerate(truth)), {i: [caption] for i, caption in enumerate(words)}


def _ptb(predictions: list[str], references: list[list[str]]) -> tuple[dict, dict]:
    from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

    truth = {i: [{"caption": caption} for caption in captions] for i, captions in enumerate(references)}
    guess = {i: [{"caption": caption}] for i, caption in enumerate(predictions)}
    return PTBTokenizer().tokenize(truth), PTBTokenizer().tokenize(guess)
