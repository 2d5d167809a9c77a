"""Pictures of a kind that no photo teaches, with captions that others wrote: emoji and their names in Unicode.

    .venv/bin/python scripts/emoji_dataset.py FONT FOLDER [--seed 1]

FONT is NotoColorEmoji.ttf, Debian's fonts-noto-color-emoji (SIL Open Font License). Writes FOLDER/images/ and
FOLDER/dataset.json, a fifth of them with split "val", for scripts/measure_small.py --words "".
"""

import argparse
import json
import random
import unicodedata
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

SIZE = 109  # of the font's bitmaps
BLOCKS = [(0x2600, 0x27C0), (0x1F300, 0x1FB00)]  # symbols and dingbats; pictographs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("font", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()

    font = ImageFont.truetype(str(options.font), SIZE)
    (options.folder / "images").mkdir(parents=True, exist_ok=True)
    rows = []
    for code in (code for first, end in BLOCKS for code in range(first, end)):
        name = unicodedata.name(chr(code), "").lower()
        picture = draw(chr(code), font)
        if name and picture is not None:
            picture.save(options.folder / "images" / f"{code:x}.png")
            rows.append({"file_path": f"images/{code:x}.png", "captions": [name], "split": "train"})
    for row in random.Random(options.seed).sample(rows, len(rows) // 5):
        row["split"] = "val"
    (options.folder / "dataset.json").write_text(json.dumps(rows, indent=0), encoding="utf-8")
    print(f"{len(rows)} emoji in {options.folder}")


def draw(character: str, font: ImageFont.FreeTypeFont) -> Image.Image | None:
    """224×224 on white; None where the font has no picture in colours of it."""
    picture = Image.new("RGB", (136, 128), "white")
    ImageDraw.Draw(picture).text((0, 0), character, font=font, embedded_color=True)
    colours = picture.getcolors(maxcolors=136 * 128)
    return picture.resize((224, 224)) if colours is not None and len(colours) > 2 else None


if __name__ == "__main__":
    main()
