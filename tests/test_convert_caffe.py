"""Caffe's files, old and new, against arrays and features that Google's protobuf, OpenCV and numpy computed."""

import json
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch
from caffe_writer import NAMES, narrow_net, written

from captioner.convert.caffe import read_caffemodel
from captioner.convert.torchvision import read_cnn_weights
from captioner.errors import InputError
from captioner.model.encoder import CONV_NAMES, FC_NAMES, Encoder, Normalise

KINDS = ("v1", "new", "new_double")


@pytest.fixture(scope="session")
def caffe(shared: Path) -> Path:
    return shared / "reference" / "caffe"


@pytest.mark.parametrize("kind", KINDS)
def test_arrays_equal_and_conv1_1_is_rgb(caffe: Path, kind: str) -> None:
    expected = np.load(caffe / "expected.npz")
    got = read_caffemodel(caffe / f"vgg16_narrow_{kind}.caffemodel")
    assert len(got) == 30
    for theirs, ours in zip(NAMES, (*CONV_NAMES, *FC_NAMES), strict=True):
        weight = expected[f"{theirs}.weight"]
        np.testing.assert_array_equal(got[f"{ours}.weight"], weight[:, ::-1] if theirs == "conv1_1" else weight)
        np.testing.assert_array_equal(got[f"{ours}.bias"], expected[f"{theirs}.bias"])


@pytest.mark.parametrize("kind", KINDS)
def test_features_equal_opencvs(caffe: Path, kind: str) -> None:
    expected = np.load(caffe / "expected.npz")
    images = torch.from_numpy(expected["images_rgb"]).permute(0, 3, 1, 2)
    for layer, wanted in (("fc7", expected["fc7"]), ("pool5", expected["pool5"].mean((2, 3)))):
        weights = read_cnn_weights(str(caffe / f"vgg16_narrow_{kind}.caffemodel"), layer)
        encoder = Encoder(layer, weights.conv_widths, weights.fc_width or 1, 8).eval()
        encoder.load_state_dict(weights.state, strict=False)
        with torch.no_grad():
            features = encoder.cnn(Normalise(weights.pixels)(images)).numpy()
        assert np.abs(features - wanted).max() < 1e-4 * np.abs(wanted).max()


def test_every_broken_file_is_refused_at_a_byte_in_little_memory(caffe: Path) -> None:
    broken = sorted((caffe / "broken").glob("*.caffemodel"))
    assert len(broken) == len(json.loads((caffe / "broken" / "expected.json").read_text()))
    for path in broken:
        tracemalloc.start()
        with pytest.raises(InputError, match=rf"{path.name}.*byte \d+"):
            read_caffemodel(path)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 2 * path.stat().st_size + 300_000, path.name


def test_a_file_cut_at_any_of_many_bytes_is_refused(caffe: Path, tmp_path: Path) -> None:
    whole = (caffe / "vgg16_narrow_v1.caffemodel").read_bytes()
    end_of_fc7 = whole.rindex(b"fc8")
    cut = tmp_path / "cut.caffemodel"
    for length in [*range(200), *range(200, end_of_fc7 - 20, 4999)]:
        cut.write_bytes(whole[:length])
        with pytest.raises(InputError, match="cut.caffemodel"):
            read_caffemodel(cut)


@pytest.mark.parametrize("form", [{}, {"dims_packed": False}, {"in_pieces": True}, {"old": True}])
def test_every_spelling_protobuf_allows_is_read(tmp_path: Path, form: dict) -> None:
    net = narrow_net()
    (tmp_path / "x.caffemodel").write_bytes(written(net, **form))
    got = read_caffemodel(tmp_path / "x.caffemodel")
    np.testing.assert_array_equal(got["classifier.0.weight"], net["fc6"][0][1].astype(np.float32))


def test_convolutions_are_enough_for_pool5(tmp_path: Path) -> None:
    net = {name: blobs for name, blobs in narrow_net().items() if name.startswith("conv")}
    path = tmp_path / "x.caffemodel"
    path.write_bytes(written(net))
    assert read_cnn_weights(str(path), "pool5").pixels == "caffe"
    with pytest.raises(InputError, match="no layer fc6"):
        read_cnn_weights(str(path), "fc7")


def test_a_layer_twice_and_a_missing_file_are_refused(tmp_path: Path) -> None:
    data = written(narrow_net())
    (tmp_path / "x.caffemodel").write_bytes(data + data)
    with pytest.raises(InputError, match="second layer conv1_1"):
        read_caffemodel(tmp_path / "x.caffemodel")
    with pytest.raises(InputError, match="no such file|No such file"):
        read_caffemodel(tmp_path / "y.caffemodel")
