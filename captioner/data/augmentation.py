"""Training photos changed a little, so that what is said of them stays true: mirrored, turned, other light.

A mirrored photo has its left where its right was: its captions exchange the two words. Off by default; the original
has none of it.

Letters: N images, M captions of an image, D words per caption, V words of the vocabulary.
"""

import math
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageEnhance

from captioner.data.vocabulary import Vocab

# English; each is the other's mirror image.
SIDES = (
    ("left", "right"),
    ("leftmost", "rightmost"),
    ("left-hand", "right-hand"),
    ("lefthand", "righthand"),
    ("left-handed", "right-handed"),
    ("left-side", "right-side"),
)
# "left" is also what somebody did, and "right" what is not wrong ("left the room", "right next to it"). They are sides
# for sure after one of these or before one of those. (Of 95,755 captions of Flickr8k and COCO 339 say left or right.)
BEFORE_A_SIDE = (
    "the his her its their my your 's on to from far top bottom upper lower turn turning turns look looking looks "
    "facing pointing".split()
)
AFTER_A_SIDE = "hand arm side turn lane leg foot shoulder ear eye knee handed wing paw corner half".split()


class MirroredCaptions:
    """What is said of a mirrored photo, by word ids.

    Args:
        vocab: whose words the captions consist of; one without any of the words for sides leaves all as they are.
    """

    def __init__(self, vocab: Vocab) -> None:
        ids = {word: number for number, word in enumerate(vocab.words, start=1)}
        size = vocab.size + 1
        self._mirror = np.arange(size)  # 0 is padding
        self._side, self._known = np.zeros(size, bool), np.zeros(size, bool)
        for pair in SIDES:
            here = [ids[word] for word in pair if word in ids]
            self._side[here] = True
            if len(here) == 2:
                self._mirror[here] = here[::-1]
                self._known[here] = True
        self._ambiguous = np.isin(np.arange(size), [ids[word] for word in SIDES[0] if word in ids])
        self._before = np.isin(np.arange(size), [ids[word] for word in BEFORE_A_SIDE if word in ids])
        self._after = np.isin(np.arange(size), [ids[word] for word in AFTER_A_SIDE if word in ids])

    def __call__(self, captions: np.ndarray) -> np.ndarray:
        """Captions (M, D), 0-padded, of a photo → those of them that can be told of the mirrored photo, so told.

        Left out are captions with "left" or "right" in what may be another sense, and with a word for a side whose
        counterpart is not in the vocabulary.
        """
        before, after = np.zeros(captions.shape, bool), np.zeros(captions.shape, bool)
        before[:, 1:] = self._before[captions[:, :-1]]
        after[:, :-1] = self._after[captions[:, 1:]]
        unclear = self._side[captions] & (~self._known[captions] | (self._ambiguous[captions] & ~before & ~after))
        return self._mirror[captions[~unclear.any(axis=1)]].astype(captions.dtype)


@dataclass(frozen=True)
class Change:
    """What becomes of one photo.

    Attributes:
        mirrored: left and right exchanged.
        degrees: turned by, anticlockwise.
        brightness, contrast, saturation: factors.
    """

    mirrored: bool
    degrees: float = 0.0
    brightness: float = 1.0
    contrast: float = 1.0
    saturation: float = 1.0

    def __call__(self, image: np.ndarray) -> np.ndarray:
        """uint8 (3, 256, 256) → the same, changed."""
        changed = image[:, :, ::-1] if self.mirrored else image
        light = (self.brightness, self.contrast, self.saturation)
        if self.degrees == 0 and light == (1.0, 1.0, 1.0):
            return changed
        picture = Image.fromarray(np.ascontiguousarray(changed.transpose(1, 2, 0)))
        if self.degrees:
            picture = _turn(picture, self.degrees)
        enhancers = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)
        for enhancer, factor in zip(enhancers, light, strict=True):
            if factor != 1:
                picture = enhancer(picture).enhance(factor)
        return np.asarray(picture).transpose(2, 0, 1)


@dataclass(frozen=True)
class Augmentation:
    """How training photos are changed.

    Attributes:
        flip: share of the photos that are mirrored.
        rotation: degrees up to which photos are turned, to either side, and enlarged so that no corner is empty.
        colour: up to which part brightness, contrast and saturation are raised or lowered.
    """

    flip: float = 0.0
    rotation: float = 0.0
    colour: float = 0.0

    @property
    def needs_pixels(self) -> bool:
        """Whether cached features, which know of mirrored photos alone, are not enough."""
        return bool(self.rotation or self.colour)

    def draw(self, rng: np.random.Generator, count: int) -> list[Change]:
        """Independent changes for so many photos."""
        mirrored = rng.random(count) < self.flip
        degrees = rng.uniform(-self.rotation, self.rotation, count)
        light = rng.uniform(1 - self.colour, 1 + self.colour, (count, 3))
        return [
            Change(bool(flip), float(turn), *map(float, factors))
            for flip, turn, factors in zip(mirrored, degrees, light, strict=True)
        ]


def _turn(picture: Image.Image, degrees: float) -> Image.Image:
    """Turned about its centre, and enlarged just enough for the turned picture to fill the square."""
    angle = math.radians(degrees)
    zoom = abs(math.cos(angle)) + abs(math.sin(angle))
    cos, sin = math.cos(angle) / zoom, math.sin(angle) / zoom
    middle = picture.width / 2
    # Pillow asks where each pixel of the result comes from; y points down.
    matrix = (cos, -sin, middle - middle * cos + middle * sin, sin, cos, middle - middle * sin - middle * cos)
    return picture.transform(picture.size, Image.Transform.AFFINE, matrix, Image.Resampling.BILINEAR)
