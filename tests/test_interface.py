"""The Python interface: the same captions for the same picture in whatever form, in order, from many threads."""

import io
import json
import logging
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import captioner

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def model(tiny_model):
    return captioner.load_model(tiny_model, device="cpu", precision="fp32")


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("photos")
    rng = np.random.default_rng(5)
    for number in range(1, 12):
        small = Image.fromarray(rng.integers(0, 256, size=(1, 2, 3), dtype=np.uint8))
        small.resize((256, 256), Image.Resampling.BICUBIC).save(folder / f"img{number}.png")
    return folder


def python(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True).stdout


def test_import_brings_in_nothing_heavy():
    loaded = python("import captioner, sys; print(*sys.modules)").split()
    assert not {"torch", "numpy", "PIL", "h5py", "captioner.inference", "captioner.data"} & set(loaded)


def test_every_public_name_is_there_and_documented():
    assert set(captioner.__all__) <= set(dir(captioner))
    for name in captioner.__all__:
        assert getattr(captioner, name).__doc__, name
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        captioner.nothing  # noqa: B018


def test_one_picture_in_every_form_has_one_caption(model, photos):
    path = photos / "img3.png"
    with Image.open(path) as opened:
        array = np.asarray(opened.convert("RGB"))
        captions = model.caption([path, str(path), path.read_bytes(), array, Image.fromarray(array), opened])
    assert len(captions) == 6
    assert {(caption.text, round(caption.logprob, 4)) for caption in captions} == {
        (captions[0].text, round(captions[0].logprob, 4))
    }
    assert [caption.file_name for caption in captions] == [str(path)] * 2 + [""] * 4
    assert [caption.image_id for caption in captions] == ["1", "2", "3", "4", "5", "6"]
    alone = model.caption(path)
    assert isinstance(alone, captioner.Caption) and alone.text == str(alone) == captions[0].text


def test_grey_and_transparent_arrays_are_pictures_too(model):
    grey = np.full((40, 60), 200, np.uint8)
    colour = np.repeat(grey[..., None], 3, axis=2)
    opaque = np.dstack([colour, np.full((40, 60), 255, np.uint8)])
    assert len({caption.text for caption in model.caption([grey, colour, opaque])}) == 1


def test_a_caption_says_how_sure_the_model_is(model, photos):
    best = model.caption(photos / "img1.png", beam_size=4, n_best=3)
    ranked = [best, *best.alternatives]
    assert len(ranked) == 3 and [c.logprob for c in ranked] == sorted((c.logprob for c in ranked), reverse=True)
    for caption in ranked:
        assert caption.text == " ".join(word.word for word in caption.words)
        assert 0 < caption.confidence <= 1
    withheld = model.caption(photos / "img1.png", min_confidence=1.0)
    assert withheld.text == "" and withheld.abstained and withheld.words


def test_the_command_gives_what_the_function_gives(model, tiny_model, photos, command, tmp_path):
    done = command(
        "eval", "--model", tiny_model, "--image_folder", photos, "--gpuid", -1, "--precision", "fp32", "--vis_dir", "",
        "--output", tmp_path / "o.json", "--beam_size", 3, "--n_best", 2,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "o.json").read_text())
    captions = list(model.caption_folder(photos, beam_size=3, n_best=2))
    assert [(row["image_id"], row["file_name"], row["caption"], row["logprob"]) for row in rows] == [
        (caption.image_id, caption.file_name, caption.text, caption.logprob) for caption in captions
    ]
    assert [row["n_best"][1]["caption"] for row in rows] == [caption.alternatives[0].text for caption in captions]
    assert [caption.file_name for caption in captions] == [f"img{number}.png" for number in range(1, 12)]


def test_batches_and_workers_do_not_matter(model, photos):
    pictures = sorted(photos.iterdir())
    expected = [model.caption(picture) for picture in pictures]
    for batch_size, num_workers in ((1, 0), (3, 2), (100, 1)):
        found = model.caption(pictures, batch_size=batch_size, num_workers=num_workers)
        assert [caption.text for caption in found] == [caption.text for caption in expected]


def test_unreadable_pictures_raise_or_come_back_in_their_place(model, photos, tmp_path, caplog):
    bad = tmp_path / "bad.jpg"
    bad.write_text("no picture")
    pictures = [photos / "img1.png", bad, b"", np.zeros((2, 2), np.float32), tmp_path / "gone.jpg", photos / "img2.png"]
    with pytest.raises(captioner.InputError, match=r"bad\.jpg: is text, not a picture"):
        model.caption(pictures)
    found = model.caption(pictures, on_error="return", batch_size=2)
    assert [type(one).__name__ for one in found] == ["Caption"] + ["InputError"] * 4 + ["Caption"]
    assert found[5].text == model.caption(photos / "img2.png").text
    reasons = [str(one) for one in found[1:5]]
    assert [reason.split(": ")[0] for reason in reasons] == [
        str(bad), "picture 3 of 6", "picture 4 of 6", str(tmp_path / "gone.jpg")
    ]  # fmt: skip
    assert "float32" in reasons[2] and "no such file" in reasons[3]
    assert isinstance(model.caption(bad, on_error="return"), captioner.InputError)

    Image.open(photos / "img1.png").save(tmp_path / "good.png")
    with caplog.at_level(logging.WARNING):
        assert [caption.file_name for caption in model.caption_folder(tmp_path)] == ["good.png"]
    assert "bad.jpg" in caplog.text
    with pytest.raises(captioner.InputError, match=r"bad\.jpg"):
        list(model.caption_folder(tmp_path, on_error="raise"))


def test_a_folder_streams_and_can_be_left_early(model, photos):
    captions = model.caption_folder(photos, batch_size=2)
    assert next(captions).file_name == "img1.png"
    captions.close()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda model, folder: model.caption("x.jpg", beam_size=0), "beam_size 0"),
        (lambda model, folder: model.caption("x.jpg", min_confidence=2), "min_confidence 2"),
        (lambda model, folder: model.caption("x.jpg", batch_size=0), "batch_size 0"),
        (lambda model, folder: model.caption("x.jpg", on_error="skip"), "on_error 'skip'"),
        (lambda model, folder: model.caption(5), "int is no picture"),
        (lambda model, folder: model.caption_folder(folder / "gone"), "gone"),
        (lambda model, folder: model.logprob(folder / "gone.jpg", "a"), "no such file"),
        (lambda model, folder: captioner.load_model(folder / "gone.pt"), "gone.pt: no such file"),
        (lambda model, folder: captioner.load_model([]), "no model is named"),
        (lambda model, folder: captioner.load_model(device="abacus"), "device abacus"),
    ],
)
def test_mistakes_are_told_at_once_in_one_line(call, message, model, tmp_path):
    with pytest.raises(captioner.InputError) as raised:
        call(model, tmp_path)
    assert message in str(raised.value) and "\n" not in str(raised.value)


def test_several_models_are_averaged(model, tiny_model, photos):
    twice = captioner.load_model([tiny_model, str(tiny_model)], device="cpu", precision="fp32")
    one, two = model.caption(photos / "img4.png"), twice.caption(photos / "img4.png")
    assert one.text == two.text and one.logprob == pytest.approx(two.logprob, abs=1e-5)


def test_many_threads_share_a_model(model, photos):
    pictures = sorted(photos.iterdir())
    expected = {picture: model.caption(picture) for picture in pictures}
    judged = {picture: model.logprob(picture, expected[picture].text) for picture in pictures}
    sampled = [caption.text for caption in model.caption(pictures, sample=True, seed=7)]

    def work(number: int) -> None:
        picture = pictures[number % len(pictures)]
        own = expected[picture]
        if number % 3 == 0:
            found = model.caption(picture)
            assert (found.text, found.logprob) == (own.text, pytest.approx(own.logprob, abs=1e-4))
        elif number % 3 == 1:
            assert [caption.text for caption in model.caption(pictures, sample=True, seed=7)] == sampled
        else:
            assert model.logprob(picture, own.text) == pytest.approx(judged[picture], abs=1e-4)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(work, range(33)))


def test_one_lazily_opened_picture_in_many_places(model, photos):
    data = io.BytesIO((photos / "img5.png").read_bytes())
    with Image.open(data) as opened:
        assert len({caption.text for caption in model.caption([opened] * 8, num_workers=4)}) == 1


def test_the_bundled_model_captions_an_example_and_judges_as_it_searched():
    cat = ROOT / "examples" / "cat.jpg"
    model = captioner.load_model(device="cpu", precision="fp32")
    best = model.caption(cat, n_best=3)
    assert "cat" in best.text
    ranked = [best, *best.alternatives]
    judged = model.logprob(cat, [caption.text for caption in ranked])
    assert judged == pytest.approx([caption.logprob for caption in ranked], abs=1e-3)
    assert model.logprob(cat, best.text) == pytest.approx(judged[0], abs=1e-4)
    assert model.logprob(cat, "a red rocket") < judged[-1]


REFERENCES = [["a red picture", "it is all red"], ["a green picture", "it is all green"], ["a blue picture"]]
TEXTS = ["a red picture", "a picture", "it is all blue"]


def test_scores_are_those_of_the_command(command, tmp_path):
    files = [f"img{number}.png" for number in range(1, 4)]
    rows = [{"file_name": file, "caption": text} for file, text in zip(files, TEXTS, strict=True)]
    known = [{"file_path": file, "captions": captions} for file, captions in zip(files, REFERENCES, strict=True)]
    (tmp_path / "p.json").write_text(json.dumps(rows))
    (tmp_path / "r.json").write_text(json.dumps(known))
    done = command(
        "score", "--predictions", tmp_path / "p.json", "--references", tmp_path / "r.json", "--metrics",
        "Bleu,ROUGE_L,CIDEr", "--output", tmp_path / "s.json", "--per_caption", 1,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    written = json.loads((tmp_path / "s.json").read_text())
    captions = [captioner.Caption(text, -1.0, 0.5, (), (), file) for text, file in zip(TEXTS, files, strict=True)]
    for predictions, references in (
        (str(tmp_path / "p.json"), tmp_path / "r.json"),
        (rows, known),
        (captions, known),
        (TEXTS, REFERENCES),
    ):
        scored = captioner.score(predictions, references)
        assert scored.corpus == pytest.approx({name: written[name] for name in scored.corpus})
        assert {name: list(interval) for name, interval in scored.intervals.items()} == written["intervals"]
        assert [row["caption"] for row in scored.per_caption] == TEXTS
        assert scored.diversity == written["diversity"]
    assert {row["CIDEr"] for row in scored.per_caption} == {row["CIDEr"] for row in written["imgToEval"].values()}


@pytest.mark.parametrize(
    ("predictions", "references", "message"),
    [
        (TEXTS, [], "references: holds no captions"),
        ([], REFERENCES, "no captions to score"),
        ([5], REFERENCES, "prediction 1 is 5"),
        (TEXTS, ["a red picture"], "reference 1 is 'a red picture'"),
        ([{"caption": "a"}], REFERENCES, "prediction 1: has neither image_id nor file_name"),
        ([{"image_id": 1, "caption": None}], REFERENCES, "prediction 1: caption"),
        ([{"image_id": 9, "caption": "a"}], REFERENCES, "no prediction belongs to any reference"),
    ],
)
def test_rows_that_cannot_be_scored_are_named(predictions, references, message):
    with pytest.raises(captioner.InputError, match=message):
        captioner.score(predictions, references)
