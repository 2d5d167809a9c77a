"""A batch in pieces: each image keeps its pixels, its crop and its captions."""

import pytest
import torch

from captioner.data.batch import Batch, FeatureInputs, KnownCaptions, PixelInputs

IMAGES = torch.arange(5, dtype=torch.uint8).view(5, 1, 1, 1).expand(5, 3, 256, 256)
OF_IMAGE = [[10, 11], [], [12], [13, 14, 15], [16]]  # a caption of one word each


def make_batch(inputs: PixelInputs | FeatureInputs) -> Batch:
    labels = torch.tensor([[word] for words in OF_IMAGE for word in words])
    image_of_caption = torch.tensor([image for image, words in enumerate(OF_IMAGE) for _ in words])
    info = [{"id": image} for image in range(5)]
    return Batch(info, list(range(40, 45)), inputs, KnownCaptions(labels, image_of_caption), [("x.jpg", "no image")])


@pytest.mark.parametrize("parts", [1, 2, 3, 4, 5, 9])
def test_pieces_are_the_batch(parts):
    pieces = make_batch(PixelInputs(IMAGES, torch.arange(10).view(5, 2))).split(parts)
    assert len(pieces) <= parts
    assert [name for piece in pieces for name, _ in piece.skipped] == ["x.jpg"]
    seen = []
    for piece in pieces:
        assert isinstance(piece.inputs, PixelInputs) and piece.inputs.offsets is not None
        for row, position in enumerate(piece.positions):
            image = position - 40
            assert piece.info[row] == {"id": image}
            assert piece.inputs.images[row, 0, 0, 0] == image
            assert piece.inputs.offsets[row].tolist() == [2 * image, 2 * image + 1]
            of_image = piece.captions.labels[piece.captions.image_of_caption == row]
            assert of_image.flatten().tolist() == OF_IMAGE[image]
            seen.append(image)
    assert seen == list(range(5))
    assert sum(len(piece.captions) for piece in pieces) == 7


def test_features_and_images_without_captions():
    first, second = make_batch(FeatureInputs(torch.arange(5.0).unsqueeze(1))).split(2)
    assert isinstance(second.inputs, FeatureInputs) and second.inputs.features.flatten().tolist() == [3, 4]
    bare = Batch([{}] * 2, [0, 1], PixelInputs(IMAGES[:2]))
    assert len(bare.captions) == 0 and [len(piece.captions) for piece in bare.split(2)] == [0, 0]
