"""What another order of the n best captions is worth: CIDEr and BLEU-4 of validation photos, and the distinct captions.

CAPTIONER_RERANK_DATA names a list of captioned pictures with splits, in any form that caption-prepro reads;
CAPTIONER_RERANK_PHOTOS how many of its photos, CAPTIONER_RERANK_MODELS the models, separated by blanks (default: the
bundled one).
"""

import os
from pathlib import Path

import torch

from captioner.data.batches import shares
from captioner.data.records import read_records
from captioner.inference.load import load_models
from captioner.inference.model import Model
from captioner.inference.run import captions_of_encodings
from captioner.inference.sources import ImageList
from captioner.metrics import score

PHOTOS = 1000
KINDS = {
    "beam 3": {"beam_size": 3},
    "beam 10": {"beam_size": 10},
    "beam 20": {"beam_size": 20},
    "consensus of 3": {"beam_size": 3, "rerank": "consensus"},
    "consensus of 10": {"beam_size": 10, "rerank": "consensus"},
    "consensus of 20": {"beam_size": 20, "rerank": "consensus"},
    "consensus of 20 samples": {"sample": True, "n_best": 20, "temperature": 0.7, "rerank": "consensus"},
}
OF_SEVERAL = {"10 of the first, ordered by all": {"beam_size": 10, "rerank": "models"}}


def run() -> None:
    """Print a Markdown table."""
    if "CAPTIONER_RERANK_DATA" not in os.environ:
        print("CAPTIONER_RERANK_DATA names no photos")
        return
    described = Path(os.environ["CAPTIONER_RERANK_DATA"])
    images = [record for record in read_records(described) if record.split == "val"]
    images = images[: int(os.environ.get("CAPTIONER_RERANK_PHOTOS", PHOTOS))]
    model = Model(load_models(os.environ.get("CAPTIONER_RERANK_MODELS", "").split()), torch.device("cpu"), "auto")
    photos = ImageList([described.parent / record.file_path for record in images])
    kinds = KINDS | (OF_SEVERAL if len(model.captioner.models) > 1 else {})
    found: dict[str, list[str]] = {kind: [] for kind in kinds}
    for batch in photos.batches(shares(len(photos), 8, 0, 1), 2, model.image_mode):
        with torch.inference_mode():
            encodings = model.captioner.encode(batch.to(model.device))
            for kind, keywords in kinds.items():
                options = model.search_options(**keywords)
                for best, *_ in captions_of_encodings(model.captioner, encodings, options, batch.positions):
                    found[kind].append(model.vocab.decode(best.tokens))
    references = [record.captions for record in images]
    print(f"{len(images)} photos, {len(model.captioner.models)} models, {model.captioner.arithmetic}\n")
    print("| captions | CIDEr | BLEU-4 | distinct |\n|---|---|---|---|")
    for kind, captions in found.items():
        scores = score(captions, references).corpus
        print(f"| {kind} | {scores['CIDEr']:.3f} | {scores['Bleu_4']:.3f} | {len(set(captions))} |")
