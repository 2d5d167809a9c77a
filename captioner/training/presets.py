"""Presets, that is training recipes: what `caption-train --preset` sets, stage by stage.

First the attending language model learns from people's words, on a CNN that stays as it is; then the CNN learns, too;
last the model's own captions are rewarded (`--self_critical_after`). Each stage starts from the best model of the one
before. neuraltalk2's README has the first two of them: on COCO the first tops out a bit below CIDEr 0.7, it says, and
the second gets to about 0.9. docs/recipes.md says what each part brought.

A recipe gives values to options of caption-train, by name; options it leaves out keep their defaults.
"""

from collections.abc import Mapping
from typing import Any

STAGES = {
    1: "the language model learns from words, the CNN stays as it is",
    2: "from the best model of the stage before on, the CNN learns too",
    3: "from the best model of the stage before on, its own captions are rewarded",
}
STAGE_LISTS = ("1", "2", "3", "1,2", "1,3", "2,3", "1,2,3")

# A stage is what it is by these, whatever else is asked for.
FROZEN: dict[str, Any] = {"finetune_cnn_after": -1, "self_critical_after": -1}
FINETUNED: dict[str, Any] = {"finetune_cnn_after": 0, "self_critical_after": -1}
REWARDED: dict[str, Any] = {"finetune_cnn_after": -1, "self_critical_after": 0}
OF_A_STAGE = tuple(FROZEN)

# What all learning from words has in common. Mirrored grids cost nothing, 8 bits half the disk of 16.
WORDS: dict[str, Any] = {
    "optim": "adamw",
    "weight_decay": 0.01,
    "grad_norm": 1.0,
    "lr_schedule": "cosine",
    "label_smoothing": 0.1,
    "drop_prob_lm": 0.4,
    "augment_flip": 0.5,
    "val_images_use": -1,
    "language_eval": True,
}
# What a new model is: for every word it looks at 14×14 cells of the picture.
NEW: dict[str, Any] = {"decoder": "attention", "cnn_layer": "conv5_3"}
CACHED: dict[str, Any] = {"cache_features": 1, "cache_type": "uint8", "flip_features": "grid"}
# The reward wants no dropout: what is sampled is what the model says. The loss rises here, so CIDEr chooses the best.
REWARDS: dict[str, Any] = {
    **REWARDED,
    **CACHED,
    "self_critical_temperature": 0.6,
    "optim": "adamw",
    "grad_norm": 1.0,
    "lr_schedule": "cosine",
    "learning_rate": 5e-5,
    "warmup": 50,
    "ema": 0.99,
    "drop_prob_lm": 0.0,
    "drop_prob_words": 0.0,
    "drop_prob_features": 0.0,
    "augment_flip": 0.5,
    "batch_size": 24,
    "val_images_use": -1,
    "language_eval": True,
}

PRESETS: Mapping[str, Mapping[int, Mapping[str, Any]]] = {
    # Stage 2 wants a GPU: it trains the whole CNN on random crops.
    "coco": {
        1: {
            **FROZEN,
            **WORDS,
            **CACHED,
            **NEW,
            "epochs": 10.0,
            "batch_size": 32,
            "learning_rate": 1e-3,
            "warmup": 1000,
            "ema": 0.999,
            "save_checkpoint_every": 2500,
        },
        2: {
            **FINETUNED,
            **WORDS,
            "cache_features": 0,
            "epochs": 5.0,
            "batch_size": 32,
            "learning_rate": 2e-4,
            "warmup": 1000,
            "cnn_learning_rate": 1e-5,
            "ema": 0.999,
            "save_checkpoint_every": 2500,
        },
        3: {**REWARDS, "epochs": 5.0, "save_checkpoint_every": 2500},
    },
    # An evaluation per epoch of 6,000 photos. In stage 2 the lower convolution blocks stay: edges and textures are the
    # same in all photos, and 6,000 of them are few; what the last block sees is computed once.
    "flickr8k": {
        1: {
            **FROZEN,
            **WORDS,
            **CACHED,
            **NEW,
            "epochs": 15.0,
            "batch_size": 32,
            "learning_rate": 1e-3,
            "warmup": 200,
            "ema": 0.999,
            "save_checkpoint_every": 188,
        },
        2: {
            **FINETUNED,
            **WORDS,
            **CACHED,
            "finetune_cnn_layers": 5,
            "epochs": 3.0,
            "batch_size": 32,
            "learning_rate": 2e-4,
            "warmup": 50,
            "cnn_learning_rate": 1e-5,
            "ema": 0.99,
            "save_checkpoint_every": 188,
        },
        3: {**REWARDS, "epochs": 5.0, "save_checkpoint_every": 250},
    },
    # A few hundred photos teach no language: it comes from the bundled model, and VGG16's weights with it. Nor are they
    # enough for the other stages, which made captions of other photos worse (docs/recipes.md). The bundled model takes
    # part in the choice of the best. That is by the loss: CIDEr of a few dozen photos is chance.
    "small": {
        1: {
            **FROZEN,
            **WORDS,
            **CACHED,
            "start_from": "bundled",
            "grow_vocab": True,
            "language_eval": False,
            "cache_features": 3,
            "epochs": 5.0,
            "batch_size": 16,
            "learning_rate": 3e-5,  # 1e-4 undoes what rewards have taught the bundled model (docs/recipes.md)
            "warmup": 10,
            "save_checkpoint_every": 25,
        },
    },
}


def describe(preset: str, stage: int, values: Mapping[str, Any]) -> str:
    """One line for the log: what the stage does, and each of its values; `values` are those in force, by option."""
    shown = []
    for name, recommended in PRESETS[preset][stage].items():
        instead = "" if values[name] == recommended else f" (instead of {_text(recommended)})"
        shown.append(f"--{name} {_text(values[name])}{instead}")
    if values["max_iters"] >= 0:
        shown.append(f"--max_iters {values['max_iters']}")
    return f"preset {preset}, stage {stage}: {STAGES[stage]}: {', '.join(shown)}"


def _text(value: Any) -> str:
    if isinstance(value, bool):
        return str(int(value))
    return f"{value:g}" if isinstance(value, float) else str(value) or "''"
