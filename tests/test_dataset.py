import json
import pickle
from pathlib import Path

import h5py
import numpy as np
import pytest

from captioner.data.dataset import IMAGE_BYTES, IMAGE_OFFSET, Dataset
from captioner.data.dataset_writer import encode_labels, finish_h5, write_dataset_json
from captioner.data.pixel_digest import pixel_digest
from captioner.data.vocabulary import Vocab
from captioner.errors import InputError

VOCAB = Vocab(["a", "dog", "UNK"])
CAPTIONS = [[["a", "dog"], ["a", "cat", "a"]], [["dog"]], [["a"] * 9]]
INFO = [{"split": "train", "file_path": "x.jpg"}, {"split": "val", "id": 5, "captions": ["Dog!"]}, {"split": "train"}]


def write(folder: Path) -> tuple[Path, Path]:
    pixels = np.random.default_rng(0).integers(0, 256, (3, 3, 256, 256), dtype=np.uint8)
    h5_path, json_path = folder / "data.h5", folder / "data.json"
    h5_path.write_bytes(bytes(IMAGE_OFFSET) + pixels.tobytes() + b"left over")
    finish_h5(h5_path, 3, *encode_labels(CAPTIONS, VOCAB, 4), "f1")
    write_dataset_json(json_path, VOCAB, INFO, "f1", extra=1)
    return h5_path, json_path


def test_round_trip(tmp_path: Path) -> None:
    h5_path, json_path = write(tmp_path)
    dataset = Dataset.open(h5_path, json_path)
    with h5py.File(h5_path) as file:
        assert np.array_equal(file["images"], dataset.images)
        assert file["images"].id.get_offset() == IMAGE_OFFSET and file["images"].nbytes == 3 * IMAGE_BYTES
        assert file["label_length"][:].tolist() == [2, 3, 1, 4]
    assert isinstance(dataset.images, np.memmap)
    assert dataset.vocab == VOCAB and dataset.max_length == 4 and dataset.splits == ["train", "val"]
    assert dataset.captions_of(0).tolist() == [[1, 2, 0, 0], [1, 3, 1, 0]]
    assert dataset.captions_of(2).tolist() == [[1, 1, 1, 1]]
    assert dataset.references_of(0) == ["a dog", "a UNK a"] and dataset.references_of(1) == ["Dog!"]
    assert dataset.split_indices("train").tolist() == [0, 2] and dataset.split_indices("test").tolist() == []
    again = pickle.loads(pickle.dumps(dataset))
    assert np.array_equal(again.images[1], dataset.images[1])


def test_the_originals_files_are_read(tmp_path: Path) -> None:
    """h5py's defaults as prepro.py used them, also stored in chunks; a json without our further keys."""
    pixels = np.random.default_rng(0).integers(0, 256, (2, 3, 256, 256), dtype=np.uint8)
    for chunks in (None, (1, 3, 256, 256)):
        with h5py.File(tmp_path / "data.h5", "w") as file:
            file.create_dataset("labels", dtype="uint32", data=[[1, 2, 0], [2, 0, 0]])
            file.create_dataset("label_start_ix", dtype="uint32", data=[1, 2])
            file.create_dataset("label_end_ix", dtype="uint32", data=[1, 2])
            file.create_dataset("images", dtype="uint8", data=pixels, chunks=chunks)
        described = {"ix_to_word": {"1": "a", "2": "b"}, "images": [{"split": "train"}, {"split": "val"}]}
        (tmp_path / "data.json").write_text(json.dumps(described))
        dataset = Dataset.open(tmp_path / "data.h5", tmp_path / "data.json")
        assert np.array_equal(dataset.images[1], pixels[1])
        assert np.array_equal(pickle.loads(pickle.dumps(dataset)).images[0], pixels[0])
        assert dataset.vocab.tokenizer == "ascii"


def edit_h5(path: Path, name: str, value: object) -> None:
    with h5py.File(path, "r+") as file:
        del file[name]
        if value is not None:
            file[name] = value


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("labels", None, "has no dataset 'labels'"),
        ("labels", np.zeros((4, 4), np.float32), "labels is float32"),
        ("labels", np.full((4, 4), 4, np.uint32), "word id 4, but the vocabulary .* has 3"),
        ("label_end_ix", np.array([2, 3], np.uint32), "2 label_end_ix"),
        ("label_end_ix", np.array([2, 3, 5], np.uint32), "captions 4..5 of 4"),
        ("label_start_ix", np.array([0, 3, 4], np.uint32), "1-based"),
        ("images", np.zeros((3, 3, 9, 9), np.uint8), "images are uint8 of shape"),
    ],
)
def test_damaged_h5(tmp_path: Path, name: str, value: object, message: str) -> None:
    h5_path, json_path = write(tmp_path)
    edit_h5(h5_path, name, value)
    with pytest.raises(InputError, match=message):
        Dataset.open(h5_path, json_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"images": INFO[:2]}, "3 images, but .* describes 2"),
        ({"images": [{}, {}, {}]}, r"images\[0\] has no split"),
        ({"ix_to_word": {}}, "missing or empty"),
        ({"ix_to_word": None}, "missing or empty"),
        ({"fingerprint": "other"}, "different runs"),
        ({"tokenizer": "klingon"}, "klingon"),
    ],
)
def test_json_that_does_not_match(tmp_path: Path, change: dict, message: str) -> None:
    h5_path, json_path = write(tmp_path)
    json_path.write_text(json.dumps({**json.loads(json_path.read_text()), **change}))
    with pytest.raises(InputError, match=message):
        Dataset.open(h5_path, json_path)


def test_several_files_are_one_dataset(tmp_path: Path) -> None:
    first = write(tmp_path)
    (tmp_path / "more").mkdir()
    captions = [[["cat", "a"]], [["a", "bird"], ["UNK"]]]
    other = Vocab(["cat", "a", "UNK", "bird"])
    pixels = np.random.default_rng(1).integers(0, 256, (2, 3, 256, 256), dtype=np.uint8)
    more = tmp_path / "more" / "data.h5", tmp_path / "more" / "data.json"
    more[0].write_bytes(bytes(IMAGE_OFFSET) + pixels.tobytes())
    finish_h5(more[0], 2, *encode_labels(captions, other, 4), "f2")
    write_dataset_json(more[1], other, [{"split": "train", "id": 5}, {"split": "val", "id": 6, "source": "web"}], "f2")
    both = [first[0], more[0]], [first[1], more[1]]
    dataset = Dataset.open(*both)
    assert dataset.vocab.words == ("a", "dog", "UNK", "cat", "bird")
    told = [dataset.vocab.decode(row.tolist()) for index in range(5) for row in dataset.captions_of(index)]
    assert told == ["a dog", "a UNK a", "dog", "a a a a", "cat a", "a bird", "UNK"]
    assert [len(dataset.captions_of(index)) for index in range(5)] == [2, 1, 1, 1, 2]
    assert dataset.split_indices("train").tolist() == [0, 2, 3] and dataset.split_indices("val").tolist() == [1, 4]
    named = f"{tmp_path.name}/data", "more/data"
    assert [entry["source"] for entry in dataset.info] == [named[0]] * 3 + [named[1], "web"]
    assert [entry.get("id") for entry in dataset.info] == [None, 5, None, "more/data/5", 6]
    one = Dataset.open(*first)
    again = pickle.loads(pickle.dumps(dataset))
    for index in range(5):
        expected = one.images[index] if index < 3 else pixels[index - 3]
        assert np.array_equal(dataset.images[index], expected) and np.array_equal(again.images[index], expected)
    assert (
        len({pixel_digest(Dataset.open(*pair)) for pair in (first, more, both, ([*both[0]][::-1], [*both[1]][::-1]))})
        == 4
    )
    with more[0].open("r+b") as file:
        file.truncate(IMAGE_OFFSET)
    with pytest.raises(InputError, match="more/data.h5: has become shorter"):
        dataset.require_whole_file()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tokenizer": "ptb"}, "prepared with --tokenizer ptb, .* with ascii; prepare them alike"),
        ({"image_mode": "pad"}, "prepared with --image_mode pad, .* with squash"),
    ],
)
def test_files_that_do_not_go_together(tmp_path: Path, change: dict, message: str) -> None:
    h5_path, json_path = write(tmp_path)
    other = tmp_path / "other.json"
    other.write_text(json.dumps({**json.loads(json_path.read_text()), **change}))
    with pytest.raises(InputError, match=message):
        Dataset.open([h5_path, h5_path], [json_path, other])
    with pytest.raises(InputError, match="2 h5 and 1 json files; expected two of each run"):
        Dataset.open([h5_path, h5_path], json_path)


def test_missing_and_wrong_files(tmp_path: Path) -> None:
    h5_path, json_path = write(tmp_path)
    (tmp_path / "text").write_text("text")
    (tmp_path / "list.json").write_text("[]")
    for h5, described in (
        (tmp_path / "no.h5", json_path),
        (h5_path, tmp_path / "no.json"),
        (tmp_path / "text", json_path),
        (h5_path, tmp_path / "text"),
        (h5_path, tmp_path / "list.json"),
        (json_path, h5_path),
        (tmp_path, json_path),
    ):
        with pytest.raises(InputError):
            Dataset.open(h5, described)
