"""Captions for photos: a VGG16 encoder, an LSTM language model and beam search.

    import captioner
    model = captioner.load_model()
    model.caption("cat.jpg").text

Names are imported when they are first asked for, so that `import captioner` takes no time.
"""

import importlib
from typing import TYPE_CHECKING, Any

from captioner.errors import InputError

if TYPE_CHECKING:
    from captioner.data.prepare import prepare
    from captioner.inference.caption import Caption, Word
    from captioner.inference.model import Model, load_model
    from captioner.metrics.scored import Scored, score
    from captioner.training.plan import plan_training
    from captioner.training.run import TrainingResult, train

__version__ = "0.1.0"

__all__ = [
    "Caption",
    "InputError",
    "Model",
    "Scored",
    "TrainingResult",
    "Word",
    "__version__",
    "load_model",
    "plan_training",
    "prepare",
    "score",
    "train",
]

_PLACES = {
    "Caption": "captioner.inference.caption",
    "Model": "captioner.inference.model",
    "Scored": "captioner.metrics.scored",
    "TrainingResult": "captioner.training.run",
    "Word": "captioner.inference.caption",
    "load_model": "captioner.inference.model",
    "plan_training": "captioner.training.plan",
    "prepare": "captioner.data.prepare",
    "score": "captioner.metrics.scored",
    "train": "captioner.training.run",
}


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_PLACES[name]), name)
    globals()[name] = value  # found without this function from now on
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
