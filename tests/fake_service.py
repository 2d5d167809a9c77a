"""caption-serve with a stand-in for the model, whose captions say what it was shown. Run as a program.

Usage: fake_service.py OPTIONS_OF_CAPTION_SERVE..

A picture of the colour 0 0 N takes N hundredths of a second; 1 2 3 meets a defect. It knows no word with a "q".
"""

import base64
import time
from collections.abc import Sequence
from typing import Any

import numpy as np

import captioner.cli.serve
from captioner.errors import InputError


def describe(picture: np.ndarray) -> str:
    """ "colour 200 16 48": the mean of each channel."""
    return "colour " + " ".join(str(round(value)) for value in picture.reshape(-1, 3).mean(axis=0))


class Describer:
    image_mode = "squash"

    def check(self, options: Any) -> None:
        if "q" in options.caption_prefix:
            raise InputError(f"caption_prefix: the model does not know {options.caption_prefix!r}")

    def caption(self, pictures: Sequence[np.ndarray], options: Any) -> list[dict[str, Any]]:
        results = []
        for picture in pictures:
            assert picture.shape == (256, 256, 3) and picture.dtype == np.uint8
            text = describe(picture)
            if text == "colour 1 2 3":
                raise RuntimeError(f"a defect in {__file__}")
            if text.startswith("colour 0 0 "):
                time.sleep(int(text.split()[-1]) / 100)
            text = f"{options.caption_prefix} {text}".strip()
            heat = {"heat": base64.b64encode(bytes(range(0, 245, 5))).decode()} if options.explain else {}
            words = [{"word": word, "logprob": -0.5, **heat} for word in text.split()]
            described = {"caption": text, "logprob": -2.0, "confidence": 0.6, "words": words}
            n_best = {"n_best": [described] * options.n_best} if (options.n_best or 1) > 1 else {}
            results.append({**described, **n_best})
        return results


if __name__ == "__main__":
    captioner.cli.serve.load = lambda opt: Describer()
    raise SystemExit(captioner.cli.serve.main())
