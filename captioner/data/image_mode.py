"""What becomes of a picture that is no square; it travels with datasets and models.

squash  its aspect changes, as in the original
crop    its middle square is kept
pad     it is kept whole, with a border
"""

from typing import Literal, get_args

ImageMode = Literal["squash", "crop", "pad"]
IMAGE_MODES: tuple[ImageMode, ...] = get_args(ImageMode)
