"""Rows and folders for the tests that look at pages."""

import math
import shutil
from pathlib import Path
from typing import Any

from captioner.output.page_files import page_files

EXAMPLES = sorted((Path(__file__).parents[1] / "examples").glob("*.jpg"))
ABOUT = {"title": "holiday", "model": "captioner-flickr8k", "date": "2026-03-01T12:00:00+00:00"}


def described(caption: str, *probabilities: float) -> dict[str, Any]:
    """A row as caption-eval writes it, from the probability of each word."""
    words = [{"word": word, "logprob": math.log(p)} for word, p in zip(caption.split(), probabilities, strict=True)]
    logprob = sum(word["logprob"] for word in words)
    return {"caption": caption, "logprob": logprob, "confidence": math.exp(logprob / len(words)), "words": words}


def write_page(folder: Path, content: str) -> Path:
    """The page beside a vis.json that is not from us."""
    for source in page_files():
        shutil.copy(source, folder)
    (folder / "vis.json").write_text(content, encoding="utf-8")
    return folder
