"""Changed training photos and what is said of them; the order of the epochs."""

import numpy as np
import pytest
import torch
from PIL import Image

from captioner.data.augmentation import Augmentation, Change, MirroredCaptions
from captioner.data.batch import PixelInputs
from captioner.data.batches import TrainingBatches
from captioner.data.cached_features import mirror_grids
from captioner.data.dataset import Dataset
from captioner.data.epoch_order import EpochOrder, weights_by_source
from captioner.data.vocabulary import Vocab
from captioner.errors import InputError

WORDS = "a man raises his left right hand on the room dog leftmost stands next to of cup UNK".split()
VOCAB = Vocab(WORDS)


def ids(*captions: str) -> np.ndarray:
    rows = [[WORDS.index(word) + 1 for word in caption.split()] for caption in captions]
    return np.array([row + [0] * (9 - len(row)) for row in rows], np.uint32)


MIRRORED = {
    "a man raises his left hand": "a man raises his right hand",
    "a dog stands on the right": "a dog stands on the left",
    "left hand of a man": "right hand of a man",
    "a cup to the left of a dog on the right": "a cup to the right of a dog on the left",
    "a dog on a cup": "a dog on a cup",
    "a man left the room": None,  # went out
    "a dog stands right next to a man": None,  # close by
    "the leftmost cup": None,  # its counterpart is not among the words
}


@pytest.mark.parametrize("caption", [caption for caption in MIRRORED if len(caption.split()) < 10])
def test_a_mirrored_photo_has_its_left_on_the_right(caption):
    expected = [text for text in [MIRRORED[caption]] if text]
    found = MirroredCaptions(VOCAB)(ids(caption))
    assert found.dtype == np.uint32 and np.array_equal(found, ids(*expected) if expected else np.empty((0, 9)))


def test_of_several_captions_those_without_a_mirror_image_are_left_out():
    captions = ids("a dog", "a man left the room", "his left hand")
    assert np.array_equal(MirroredCaptions(VOCAB)(captions), ids("a dog", "his right hand"))


def test_words_without_sides_stay():
    captions = np.array([[1, 2, 0], [2, 2, 2]], np.uint32)
    assert np.array_equal(MirroredCaptions(Vocab(["un", "chien"]))(captions), captions)


def test_a_mirrored_photo_is_the_photo_read_from_the_right():
    image = np.random.default_rng(0).integers(0, 256, (3, 256, 256), np.uint8)
    assert np.array_equal(Change(mirrored=True)(image), np.flip(image, 2))
    assert Change(mirrored=False)(image) is image


@pytest.mark.parametrize("degrees", [20, -35])
def test_a_turned_photo_is_turned_about_its_centre_and_fills_the_square(degrees):
    image = np.zeros((3, 256, 256), np.uint8)
    image[:, 124:132, 164:172] = 255  # a dot 40 pixels to the right of the centre
    turned = Change(mirrored=False, degrees=degrees)(image)[0].astype(float)
    rows, columns = np.mgrid[:256, :256]
    found = np.array([(turned * rows).sum(), (turned * columns).sum()]) / turned.sum() - 127.5
    angle = np.radians(degrees)
    distance = 40 * (np.cos(angle) + abs(np.sin(angle)))  # enlarged until no corner is empty
    assert found == pytest.approx([-distance * np.sin(angle), distance * np.cos(angle)], abs=1)
    white = np.full((3, 256, 256), 255, np.uint8)
    assert Change(mirrored=False, degrees=degrees)(white).min() == 255


def test_light_changes_as_pillow_says():
    grey = np.full((3, 256, 256), 100, np.uint8)
    assert (Change(mirrored=False, brightness=1.5)(grey) == 150).all()
    red = np.zeros((3, 256, 256), np.uint8)
    red[0] = 200
    assert np.ptp(Change(mirrored=False, saturation=0)(red), axis=0).max() == 0
    as_float = np.asarray(Image.fromarray(red.transpose(1, 2, 0)).convert("L"), float).mean()
    assert (Change(mirrored=False, contrast=0)(red) == round(as_float)).all()


def test_changes_are_drawn_as_widely_as_asked():
    drawn = Augmentation(flip=0.25, rotation=10, colour=0.2).draw(np.random.default_rng(0), 2000)
    assert np.mean([change.mirrored for change in drawn]) == pytest.approx(0.25, abs=0.04)
    for values, low, high in (
        ([change.degrees for change in drawn], -10, 10),
        ([change.contrast for change in drawn], 0.8, 1.2),
    ):
        assert low <= min(values) < low + 0.1 * (high - low) and high - 0.1 * (high - low) < max(values) <= high


def batches(dataset: Dataset, **options: object) -> TrainingBatches:
    indices = dataset.captioned_indices("train")
    return TrainingBatches(dataset, indices, batch_size=5, seq_per_img=2, seed=1, shuffle=True, **options)


def test_batches_have_mirrored_images_and_else_the_same(tiny_dataset):
    dataset = Dataset.open(*tiny_dataset)
    plain, mirrored = batches(dataset)(3), batches(dataset, augmentation=Augmentation(flip=1.0))(3)
    assert isinstance(plain.inputs, PixelInputs) and isinstance(mirrored.inputs, PixelInputs)
    assert torch.equal(mirrored.inputs.images, plain.inputs.images.flip(3))
    assert torch.equal(mirrored.captions.labels, plain.captions.labels)  # which name no sides
    again = batches(dataset, augmentation=Augmentation(flip=0.5, rotation=5, colour=0.1))
    assert torch.equal(again(7).inputs.images, again(7).inputs.images)


def test_a_photo_without_a_caption_for_its_mirror_image_stays(tiny_dataset):
    dataset = Dataset.open(*tiny_dataset)
    dataset.vocab = Vocab([*dataset.vocab.words[:1], "left", *dataset.vocab.words[2:]])  # instead of "picture"
    mirrored = batches(dataset, augmentation=Augmentation(flip=1.0), all_captions_from=0)
    plain = batches(dataset, all_captions_from=0)
    for number in range(4):
        changed, same = mirrored(number), plain(number)
        for row, (image, before) in enumerate(zip(changed.inputs.images, same.inputs.images, strict=True)):
            known = same.captions.labels[same.captions.image_of_caption == row]
            left_out = (known == 2).any(1)
            stays = bool(left_out.all())
            assert torch.equal(image, before if stays else before.flip(2))
            kept = changed.captions.labels[changed.captions.image_of_caption == row]
            assert torch.equal(kept, known if stays else known[~left_out])


def test_grids_are_mirrored_cell_by_cell():
    grid = torch.arange(2 * 9 * 4.0).view(2, 9, 4)
    expected = grid[:, [2, 1, 0, 5, 4, 3, 8, 7, 6]]
    assert torch.equal(mirror_grids(grid), expected)
    assert torch.equal(mirror_grids(grid.view(2, 3, 3, 4)), expected.view(2, 3, 3, 4))


def test_an_epoch_has_the_images_of_a_source_as_often_as_its_weight_says():
    infos = [{"source": "few"}] * 4 + [{"source": "many"}] * 10 + [{"source": "none"}] * 3
    weights = weights_by_source(infos, {"few": 2.5, "none": 0})
    order = EpochOrder(np.arange(17), seed=0, shuffle=True, weights=weights)
    assert len(order) == 4 * 2 + 2 + 10
    counts = np.zeros((50, 17), int)
    for epoch in range(50):
        images = order(epoch)
        assert len(images) == len(order)
        counts[epoch] = np.bincount(images, minlength=17)
    assert set(counts[:, :4].flat) == {2, 3} and (counts[:, 4:14] == 1).all() and (counts[:, 14:] == 0).all()
    assert counts[:, :4].mean(0) == pytest.approx(2.5, abs=0.3)
    assert not np.array_equal(order(0), order(1))


def test_without_weights_every_epoch_is_a_permutation():
    order = EpochOrder(np.array([3, 5, 9]), seed=0, shuffle=True)
    assert sorted(order(4)) == [3, 5, 9]
    assert list(EpochOrder(np.array([3, 5, 9]), seed=0, shuffle=False)(4)) == [3, 5, 9]


def test_a_source_that_is_not_there_is_named():
    with pytest.raises(InputError, match="'flikr', which no training image comes from; expected coco, flickr8k"):
        weights_by_source([{"source": "flickr8k"}, {"source": "coco"}], {"flikr": 2})
    with pytest.raises(InputError, match="leaves no training image"):
        weights_by_source([{"source": "coco"}], {"coco": 0})
