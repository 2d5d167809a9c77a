"""The sizes of stored pictures and of what VGG16 sees of them; centre and random crops."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

IMAGE_SIZE = 256  # stored pictures
CROP_SIZE = 224  # what VGG16 sees
CENTRE_OFFSET = 15  # the original's centre crop: rows and columns 15..238, 0-based
MAX_CROP_OFFSET = IMAGE_SIZE - CROP_SIZE - 1  # its random crop draws 0..31, never 32


def crop(images: "torch.Tensor", offsets: "torch.Tensor | None" = None) -> "torch.Tensor":
    """Cut 224×224 squares out of stored pictures, on the device where they are.

    Args:
        images: uint8 (N, 3, 256, 256).
        offsets: int64 (N, 2), top row and left column of each crop, 0..31 in training; None: the centre.

    Returns:
        uint8 (N, 3, 224, 224).
    """
    if offsets is None:
        centre = slice(CENTRE_OFFSET, CENTRE_OFFSET + CROP_SIZE)
        return images[:, :, centre, centre]
    import torch

    device = images.device
    span = torch.arange(CROP_SIZE, device=device)
    offsets = offsets.to(device)
    rows = (offsets[:, 0, None] + span)[:, None, :, None]
    columns = (offsets[:, 1, None] + span)[:, None, None, :]
    batch = torch.arange(images.shape[0], device=device)[:, None, None, None]
    channels = torch.arange(images.shape[1], device=device)[None, :, None, None]
    return images[batch, channels, rows, columns]
