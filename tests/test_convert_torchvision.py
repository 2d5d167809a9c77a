"""ImageNet weights from local files and from a local server standing in for torchvision's."""

import hashlib
import http.server
import threading
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torchvision

from captioner.convert.torchvision import IMAGENET_URL, read_cnn_weights
from captioner.errors import InputError
from captioner.model.encoder import CONV_NAMES, FC_NAMES, Encoder, Normalise

WIDTHS = (2, 2, 3, 3, 4, 4, 4, 5, 5, 5, 6, 6, 6)
FC = 7


def narrow_state(fc: bool = True) -> "OrderedDict[str, torch.Tensor]":
    generator = torch.Generator().manual_seed(0)
    shapes = {
        name: (out, channels, 3, 3) for name, out, channels in zip(CONV_NAMES, WIDTHS, (3, *WIDTHS), strict=False)
    }
    if fc:
        shapes |= {FC_NAMES[0]: (FC, 6 * 49), FC_NAMES[1]: (FC, FC), "classifier.6": (10, FC)}
    state = OrderedDict()
    for name, shape in shapes.items():
        state[f"{name}.weight"] = torch.randn(shape, generator=generator)
        state[f"{name}.bias"] = torch.randn(shape[0], generator=generator)
    return state


@pytest.fixture
def whole(tmp_path: Path) -> Path:
    torch.save(narrow_state(), tmp_path / "vgg16.pth")
    return tmp_path / "vgg16.pth"


def saved(path: Path, state: object) -> str:
    torch.save(state, path)
    return str(path)


def test_names_are_those_torchvision_uses() -> None:
    with torch.device("meta"):
        ours, theirs = Encoder().state_dict(), torchvision.models.vgg16().state_dict()
    for name in (*CONV_NAMES, *FC_NAMES):
        assert ours[f"{name}.weight"].shape == theirs[f"{name}.weight"].shape


def test_whole_file_gives_widths_and_values(whole: Path) -> None:
    weights = read_cnn_weights(str(whole), "fc7")
    assert (weights.conv_widths, weights.fc_width, weights.pixels) == (WIDTHS, FC, "torchvision")
    encoder = Encoder("fc7", WIDTHS, FC, 8)
    loaded = encoder.load_state_dict(weights.state, strict=False)
    assert not loaded.unexpected_keys and loaded.missing_keys == ["embed.weight", "embed.bias"]
    for name, value in narrow_state().items():
        if not name.startswith("classifier.6"):
            assert torch.equal(encoder.state_dict()[name], value)


def test_features_equal_torchvisions_own_forward(whole: Path) -> None:
    # The same arithmetic spelled by torchvision's functional ops and its transform.
    images = torch.randint(0, 256, (2, 3, 224, 224), dtype=torch.uint8)
    state = narrow_state()
    x = torchvision.transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))(images / 255)
    for name in CONV_NAMES:
        x = torch.conv2d(x, state[f"{name}.weight"], state[f"{name}.bias"], padding=1).relu()
        if name in ("features.2", "features.7", "features.14", "features.21", "features.28"):
            x = torch.max_pool2d(x, 2)
    encoder = Encoder("pool5", WIDTHS, FC, 8).eval()
    weights = read_cnn_weights(str(whole), "pool5")
    encoder.load_state_dict(weights.state, strict=False)
    torch.testing.assert_close(encoder.cnn(Normalise(weights.pixels)(images)), x.mean((2, 3)), rtol=1e-4, atol=1e-4)


def test_convolutions_only_fit_pool5_and_are_caffes(tmp_path: Path) -> None:
    path = saved(tmp_path / "conv.pth", {name: value.half() for name, value in narrow_state(fc=False).items()})
    weights = read_cnn_weights(path, "pool5")
    assert (weights.fc_width, weights.pixels) == (None, "caffe")
    assert all(value.dtype == torch.float32 for value in weights.state.values())
    assert read_cnn_weights(path, "pool5", pixels="torchvision").pixels == "torchvision"
    with pytest.raises(InputError, match="--cnn_layer pool5"):
        read_cnn_weights(path, "fc7")


def test_a_classifier_of_nan_counts_as_absent(tmp_path: Path) -> None:
    state = narrow_state()
    path = saved(tmp_path / "f.pth", {n: v * float("nan") if n.startswith("cl") else v for n, v in state.items()})
    assert read_cnn_weights(path, "pool5").pixels == "caffe"
    with pytest.raises(InputError, match="convolutions only"):
        read_cnn_weights(path, "fc7")


def test_random_has_vgg16_widths_and_no_weights() -> None:
    weights = read_cnn_weights("random", "fc7")
    assert weights.state == {} and weights.conv_widths[-1] == 512 and weights.fc_width == 4096


@pytest.mark.parametrize(
    "change, message",
    [
        ({"features.1.running_mean": torch.ones(2)}, "features.1.running_mean is not one of VGG16's"),
        ({"features.5.bias": None}, "features.5.bias is missing"),
        ({"features.5.weight": torch.ones(3, 9, 3, 3)}, r"expected \(OUT, 2, 3, 3\)"),
        ({"features.5.bias": torch.ones(4)}, "features.5 has weights"),
        ({"features.7.bias": torch.tensor([1.0, float("nan"), 2])}, "features.7.bias holds values"),
        ({"features.7.bias": torch.ones(3, dtype=torch.int64)}, "features.7.bias holds values"),
        ({"classifier.0.weight": torch.ones(7, 6)}, r"expected \(OUT, 294\)"),
        ({"classifier.3.weight": torch.ones(5, 7), "classifier.3.bias": torch.ones(5)}, "equal widths"),
    ],
)
def test_wrong_entries_are_refused(tmp_path: Path, change: dict, message: str) -> None:
    state = {name: value for name, value in {**narrow_state(), **change}.items() if value is not None}
    with pytest.raises(InputError, match=message):
        read_cnn_weights(saved(tmp_path / "x.pth", state), "fc7")


def test_other_files_are_refused(tmp_path: Path) -> None:
    (tmp_path / "text.pth").write_text("not weights")
    for content, name in [([1, 2], "list.pth"), ({"config": 1}, "ours.pth"), (hashlib.sha256, "code.pth")]:
        torch.save(content, tmp_path / name)
    for name in ("text.pth", "list.pth", "ours.pth", "code.pth", "missing.pth"):
        with pytest.raises(InputError, match=name):
            read_cnn_weights(str(tmp_path / name), "fc7")


@pytest.fixture
def server(tmp_path: Path) -> Iterator[tuple[str, Path]]:
    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *args: object) -> None:
            super().__init__(*args, directory=str(tmp_path / "www"))  # type: ignore[arg-type]

        def log_message(self, *args: object) -> None:
            pass

    (tmp_path / "www").mkdir()
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{running.server_port}", tmp_path / "www"
        running.shutdown()


def test_the_download_is_torchvisions() -> None:
    assert torchvision.models.VGG16_Weights.IMAGENET1K_V1.url == IMAGENET_URL


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "cache"))
    return tmp_path / "cache" / "checkpoints"


def test_imagenet_is_fetched_once_and_checked(
    server: tuple[str, Path], cache: Path, whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url, www = server
    name = f"vgg16-{hashlib.sha256(whole.read_bytes()).hexdigest()[:8]}.pth"
    (www / name).write_bytes(whole.read_bytes())
    monkeypatch.setattr("captioner.convert.torchvision.IMAGENET_URL", f"{url}/{name}")
    assert read_cnn_weights("imagenet", "fc7").pixels == "torchvision"
    (www / name).unlink()
    assert read_cnn_weights("imagenet", "fc7").conv_widths == WIDTHS  # from the cache
    (www / "vgg16-00000000.pth").write_bytes(whole.read_bytes())
    monkeypatch.setattr("captioner.convert.torchvision.IMAGENET_URL", f"{url}/vgg16-00000000.pth")
    with pytest.raises(InputError, match="invalid hash"):
        read_cnn_weights("imagenet", "fc7")
    assert not (cache / "vgg16-00000000.pth").exists()


@pytest.mark.parametrize("url", ["http://127.0.0.1:9/vgg16-397923af.pth", "http://none.invalid/vgg16-397923af.pth"])
def test_without_network_the_error_says_what_to_put_where(
    url: str, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("captioner.convert.torchvision.IMAGENET_URL", url)
    with pytest.raises(InputError) as caught:
        read_cnn_weights("imagenet", "fc7")
    assert str(cache / "vgg16-397923af.pth") in str(caught.value) and "--cnn_model" in str(caught.value)
    assert "\n" not in str(caught.value)
