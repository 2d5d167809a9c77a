"""What `caption-train --preset small` brings on a few hundred photos of one kind: CIDEr of held-out photos.

    .venv/bin/python scripts/measure_small.py DATASET.json WORK [--words "kitchen food .."] [--seeds 1,2,3]

DATASET.json lists photos beside it (file_path, captions, split). Photos are of the kind if at least two of their
captions have one of the words. Of those with split "train" --photos are taken, a fifth of them to choose the best model
by; all those with split "val" are held out. Each seed draws other photos and trains anew. Captions are those of
caption-eval with the model's own search options, scores those of caption-score. A killed run goes on when the command
is repeated.
"""

import argparse
import json
import random
import re
from pathlib import Path
from typing import Any

import captioner

KITCHENS_AND_FOOD = (
    "kitchen stove oven refrigerator fridge sink counter microwave food plate pizza sandwich bowl cake fruit "
    "vegetables salad meal dish broccoli banana bananas apple apples orange oranges donut donuts bread cheese meat "
    "soup chicken fries dessert table pan cup coffee"
).split()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("dataset", type=Path)
    parser.add_argument("work", type=Path)
    parser.add_argument("--words", type=str.split, default=KITCHENS_AND_FOOD, help='of the kind; "": every photo is')
    parser.add_argument("--photos", type=int, default=300)
    parser.add_argument("--held_out", type=int, default=10**6, help="at most so many held-out photos")
    parser.add_argument("--seeds", type=lambda text: [int(seed) for seed in text.split(",")], default=[1, 2, 3])
    parser.add_argument("--stages", default=None, help="of the preset; by default all")
    parser.add_argument("--start_from", default="bundled")
    parser.add_argument("--max_iters", type=int, default=-1, help="iterations of each stage, to try the script")
    options = parser.parse_args()

    listed = json.loads(options.dataset.read_text(encoding="utf-8"))
    photos = [row for row in listed if is_of_kind(row["captions"], set(options.words))]
    known = [row for row in photos if row["split"] == "train"]
    held_out = [row for row in photos if row["split"] == "val"][: options.held_out]
    print(f"{len(known)} photos of the kind to train on, {len(held_out)} held out", flush=True)
    root = options.dataset.parent
    before = cider(None if options.start_from == "bundled" else options.start_from, held_out, root)
    print(f"before: CIDEr {before:.3f}", flush=True)
    print("| seed | before | after | gain |\n|---|---|---|---|", flush=True)
    for seed in options.seeds:
        model = train(random.Random(seed).sample(known, min(options.photos, len(known))), seed, options)
        after = cider(model, held_out, root)
        print(f"| {seed} | {before:.3f} | {after:.3f} | {after - before:+.3f} |", flush=True)


def is_of_kind(captions: list[str], words: set[str]) -> bool:
    """Whether at least two captions, or all there are, have one of the words, or there are no words."""
    having = sum(bool(words & set(re.findall("[a-z]+", caption.lower()))) for caption in captions)
    return not words or having >= min(2, len(captions))


def train(chosen: list[dict[str, Any]], seed: int, options: argparse.Namespace) -> Path:
    """The best model of the preset, trained on the chosen photos but for a fifth, which says which is the best."""
    folder = options.work / f"seed{seed}"
    folder.mkdir(parents=True, exist_ok=True)
    rows = [{**row, "split": "val" if place % 5 == 0 else "train"} for place, row in enumerate(chosen)]
    (folder / "raw.json").write_text(json.dumps(rows), encoding="utf-8")
    files = {"input_h5": str(folder / "data.h5"), "input_json": str(folder / "data.json")}
    if not Path(files["input_json"]).exists():
        start = captioner.load_model(None if options.start_from == "bundled" else options.start_from)
        captioner.prepare(
            folder / "raw.json",
            images_root=str(options.dataset.parent),
            num_val=0,
            tokenizer=start.vocab.tokenizer,
            word_count_threshold=0,  # words that the model knows are words, however rare here
            max_length=18,
            output_h5=files["input_h5"],
            output_json=files["input_json"],
        )
    more: dict[str, Any] = {} if options.max_iters < 0 else {"max_iters": options.max_iters}
    result = captioner.train(
        **files,
        preset="small",
        stages=options.stages,
        start_from=options.start_from,
        checkpoint_path=str(folder),
        seed=seed,
        resume="auto",
        **more,
    )
    return result.best


def cider(model: str | Path | None, photos: list[dict[str, Any]], root: Path) -> float:
    """Of the captions of photos that have references."""
    captions = captioner.load_model(model).caption([str(root / row["file_path"]) for row in photos])
    return captioner.score([caption.text for caption in captions], [row["captions"] for row in photos]).corpus["CIDEr"]


if __name__ == "__main__":
    main()
