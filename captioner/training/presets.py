"""Presets, that is training recipes: what `caption-train --preset` sets, stage by stage.

The two stages are those of neuraltalk2's README: first the language model alone, on a CNN that stays as it is; then
both together, from the best model of the first stage on (`--finetune_cnn_after 0` with `--start_from`). On COCO the
first stage tops out a bit below CIDEr 0.7, it says, and the second gets to about 0.9.

A recipe gives values to options of caption-train, by name; options it leaves out keep their defaults.
"""

from collections.abc import Mapping
from typing import Any

STAGES = {
    1: "the language model learns, the CNN stays as it is",
    2: "from the best model of stage 1 on, the CNN learns too",
}

# A stage is what it is by these, whatever else is asked for.
FROZEN: dict[str, Any] = {"finetune_cnn_after": -1}
FINETUNED: dict[str, Any] = {"finetune_cnn_after": 0, "cache_features": 0}

PRESETS: Mapping[str, Mapping[int, Mapping[str, Any]]] = {
    # The original's values; its README gives stage 1 some 70,000 iterations (10 epochs), and stage 2 two days.
    # Unlike there stage 1 sees the centre crops alone: their features are computed once, not in every epoch.
    "coco": {
        1: {
            **FROZEN,
            "cnn_layer": "fc7",
            "cache_features": 1,
            "epochs": 10.0,
            "batch_size": 16,
            "learning_rate": 4e-4,
            "save_checkpoint_every": 2500,
            "language_eval": True,
        },
        2: {
            **FINETUNED,
            "epochs": 20.0,
            "batch_size": 16,
            "learning_rate": 4e-4,
            "cnn_learning_rate": 1e-5,
            "save_checkpoint_every": 2500,
            "language_eval": True,
        },
    },
    # Stage 1 is how the first bundled model was trained. An evaluation per epoch of 6,000 photos. In stage 2 the lower
    # convolution blocks stay: edges and textures are the same in all photos, and 6,000 of them are few.
    "flickr8k": {
        1: {
            **FROZEN,
            "cnn_layer": "pool5",
            "cache_features": 1,
            "epochs": 12.0,
            "batch_size": 32,
            "learning_rate": 6e-4,
            "learning_rate_decay_start": 0,
            "learning_rate_decay_every": 1500,
            "save_checkpoint_every": 188,
            "val_images_use": -1,
            "language_eval": True,
        },
        2: {
            **FINETUNED,
            "finetune_cnn_layers": 4,
            "epochs": 5.0,
            "batch_size": 32,
            "learning_rate": 2e-4,
            "learning_rate_decay_start": 0,
            "learning_rate_decay_every": 500,
            "cnn_learning_rate": 1e-5,
            "save_checkpoint_every": 188,
            "val_images_use": -1,
            "language_eval": True,
        },
    },
    # A few hundred photos teach no language: it comes from the bundled model, and VGG16's weights with it. (After 13
    # epochs of 300 photos of Flickr8k alone 100 others had 10 different captions and a loss of 3.49; the bundled model
    # begins with 92 and 2.60.) At twice this rate the validation loss rose from the start. The loss chooses the best
    # model, since CIDEr over a few dozen photos is mostly chance.
    "small": {
        1: {
            **FROZEN,
            "start_from": "bundled",
            "grow_vocab": True,
            "cnn_layer": "pool5",
            "cache_features": 5,
            "epochs": 20.0,
            "batch_size": 16,
            "learning_rate": 1e-4,
            "save_checkpoint_every": 25,
            "val_images_use": -1,
            "language_eval": False,
        },
        2: {
            **FINETUNED,
            "finetune_cnn_layers": 5,
            "epochs": 5.0,
            "batch_size": 16,
            "learning_rate": 5e-5,
            "cnn_learning_rate": 1e-5,
            "save_checkpoint_every": 25,
            "val_images_use": -1,
            "language_eval": False,
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
