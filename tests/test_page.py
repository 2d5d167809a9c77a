"""The page of captions in a real browser: Chromium looks at folders that VisWriter, or the original, wrote."""

import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from selenium.webdriver.common.keys import Keys

from captioner.output.page import VisWriter, page_files

pytest_plugins = ["page_browser"]
pytestmark = pytest.mark.browser

EXAMPLES = sorted((Path(__file__).parents[1] / "examples").glob("*.jpg"))
PER_PAGE = 100


def _described(caption: str, *probabilities: float) -> dict[str, Any]:
    words = [{"word": word, "logprob": math.log(p)} for word, p in zip(caption.split(), probabilities, strict=True)]
    logprob = sum(word["logprob"] for word in words)
    return {"caption": caption, "logprob": logprob, "confidence": math.exp(logprob / len(words)), "words": words}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three photos as caption-eval leaves them: with words, alternatives and scores."""
    writer = VisWriter(tmp_path / "vis")
    captions = [("a cat sits", 0.9, 0.5, 0.8), ("a red cup", 0.9, 0.03, 0.1), ("two dogs play", 0.99, 0.99, 0.99)]
    rows = []
    for number, (photo, described) in enumerate(zip(EXAMPLES[2:5], captions, strict=True), start=1):
        best, other = _described(*described), _described("something else", 0.2, 0.2)
        (image,) = writer.add_pictures([(number, photo)])
        rows.append({"image_id": number, **best, "file_name": f"{number}.jpg", "image": image, "n_best": [best, other]})
    writer.finish(rows, {"Bleu_1": 0.61, "CIDEr": 0.5})
    return writer.folder


def _write_page(folder: Path, content: str) -> Path:
    """The page beside a vis.json that is not from us."""
    for source in page_files():
        shutil.copy(source, folder)
    (folder / "vis.json").write_text(content, encoding="utf-8")
    return folder


def test_pictures_stand_with_captions_and_file_names(browser, serve, folder):
    browser.open(serve(folder).address)
    browser.wait(lambda: len(browser.all(".card img")) == 3)
    assert browser.texts(".card .caption") == ["a cat sits", "a red cup", "two dogs play"]
    assert browser.texts(".card .name") == ["1.jpg", "2.jpg", "3.jpg"]
    browser.wait(lambda: browser.run("return [...document.images].every((i) => i.complete && i.naturalWidth > 100)"))
    assert browser.one("#count").text == "3 images"
    assert browser.complaints() == []


def test_folders_of_the_original_show_too(browser, serve, tmp_path):
    _write_page(tmp_path, '[{"image_id": "184613", "caption": "a man riding a wave"}, {"caption":"b","image_id":7}]')
    (tmp_path / "imgs").mkdir()
    for name in ("img184613.jpg", "img7.jpg"):
        shutil.copy(EXAMPLES[0], tmp_path / "imgs" / name)
    browser.open(serve(tmp_path).address)
    browser.wait(lambda: browser.run("return [...document.images].filter((i) => i.naturalWidth > 100).length") == 2)
    assert browser.texts(".card .caption") == ["a man riding a wave", "b"]
    assert browser.texts(".card .name") == ["image 184613", "image 7"]
    assert not browser.one("#scores").is_displayed()
    assert not browser.one("#shade").is_displayed()


def test_captions_and_names_are_text_and_never_markup(browser, serve, tmp_path):
    attack = '<img src=x onerror="window.hacked=1"><script>window.hacked=1</script>&amp;'
    words = [{"word": word, "logprob": -1} for word in attack.split()]
    row = {
        "caption": attack,
        "words": words,
        "file_name": f"'{attack}.jpg",
        "n_best": [{"caption": "x"}, {"caption": attack}],
    }
    addresses = ["javascript:window.hacked=1", "https://example.org/x.jpg", "//example.org/x.jpg", "imgs/a#b?c.jpg"]
    rows = [{"image_id": attack, "image": address, **row} for address in addresses]
    _write_page(tmp_path, json.dumps(rows))
    (tmp_path / "imgs").mkdir()
    shutil.copy(EXAMPLES[0], tmp_path / "imgs" / "a#b?c.jpg")
    server = serve(tmp_path)
    browser.open(server.address)
    browser.wait(lambda: len(browser.all(".card")) == len(rows))
    browser.one(".open").click()
    assert browser.texts(".card .caption") == [attack] * len(rows)
    assert set(browser.texts(".card .name")) == {f"'{attack}.jpg"}
    assert browser.one("#detail-caption").text == attack
    browser.wait(lambda: browser.run("return [...document.images].map((i) => i.naturalWidth > 100)") == [True])
    assert browser.run("return window.hacked") is None
    assert not browser.all("#grid script")
    assert not [path for path in server.requests if "example.org" in path]


def test_many_images_come_page_by_page_and_pictures_as_they_scroll_in(browser, serve, tmp_path):
    writer = VisWriter(tmp_path)
    images = writer.add_pictures([(i, np.zeros((3, 30, 40), np.uint8)) for i in range(250)])
    rows = [
        {"image_id": i, "caption": f"caption {i}", "file_name": f"{i}.jpg", "image": image}
        for i, image in enumerate(images)
    ]
    writer.finish(rows)
    server = serve(tmp_path)
    browser.look(1000, 500)
    browser.open(server.address)
    browser.wait(lambda: len(browser.all(".card")) == PER_PAGE)
    browser.wait(lambda: browser.run("return document.images[0].complete"))
    assert 0 < sum("imgs/" in path for path in server.requests) < PER_PAGE
    assert browser.one("#count").text == "250 images, 1 to 100 on this page"

    browser.one("#next").click()
    assert browser.texts(".card .caption")[0] == "caption 100"
    browser.one("#page").send_keys(Keys.CONTROL, "a")
    browser.one("#page").send_keys("3", Keys.ENTER)
    assert browser.texts(".card .caption") == [f"caption {i}" for i in range(200, 250)]
    assert not browser.one("#next").is_enabled()
    assert browser.driver.current_url.endswith("#page=3")

    browser.open(server.address + "#page=2&search=caption+1")
    browser.wait(lambda: browser.all(".card"))
    matching = [f"caption {i}" for i in range(250) if "1" in str(i)]
    assert browser.texts(".card .caption") == matching[100:]


def test_search_and_order(browser, serve, folder):
    browser.open(serve(folder).address)
    browser.wait(lambda: browser.all(".card"))
    for order, expected in {
        "confident": ["3.jpg", "1.jpg", "2.jpg"],
        "unsure": ["2.jpg", "1.jpg", "3.jpg"],
        "name": ["1.jpg", "2.jpg", "3.jpg"],
    }.items():
        browser.one(f"#sort [value={order}]").click()
        assert browser.texts(".card .name") == expected
    browser.one("#search").send_keys("CAT a")
    assert browser.texts(".card .caption") == ["a cat sits"]
    assert browser.one("#count").text == "1 of 3 images match"
    browser.one("#search").send_keys(" zebra")
    assert browser.texts(".card .caption") == []
    assert browser.one("#count").text == "0 of 3 images match"


def test_scores_of_caption_score_show_with_their_intervals(browser, serve, folder, command):
    references = [{"id": n, "captions": ["a cat sits", "two dogs play"]} for n in (1, 2, 3)]
    (folder / "references.json").write_text(json.dumps(references))
    arguments = ("--references", folder / "references.json", "--metrics", "rouge_l", "--output", folder / "scores.json")
    assert command("score", "--predictions", folder / "vis.json", *arguments).returncode == 0
    browser.open(serve(folder).address)
    browser.wait(lambda: browser.all(".card"))
    browser.one("#scores summary").click()
    assert browser.texts("#scores th") == ["ROUGE_L"]
    low, high = json.loads((folder / "scores.json").read_text())["intervals"]["ROUGE_L"]
    assert browser.texts("#scores td")[0].endswith(f" ({low:.3f} to {high:.3f})")


def test_unsure_words_are_shaded_and_scores_shown(browser, serve, folder):
    browser.open(serve(folder).address)
    browser.wait(lambda: browser.all(".card"))
    assert browser.texts("#scores th") == ["Bleu_1", "CIDEr"]
    assert browser.texts("#scores td") == ["0.610", "0.500"]
    browser.one("#shade").click()
    strength = browser.run(
        "return [...document.querySelectorAll('.card')].map((card) => [...card.querySelectorAll('.caption .word')]"
        ".map((word) => Number((getComputedStyle(word).backgroundColor.match(/[\\d.]+/g) ?? [])[3] ?? 1)))"
    )
    sure, red, cup = strength[1]
    assert sure < 0.05 < cup < red
    assert max(strength[2]) < 0.05
    assert browser.all(".word")[0].get_attribute("title") == "probability 90 %"


def test_a_picture_opens_and_closes_from_the_keyboard(browser, serve, folder):
    browser.open(serve(folder).address)
    browser.wait(lambda: browser.all(".card"))
    for _ in range(12):
        browser.press(Keys.TAB)
        if browser.run("return document.activeElement.className") == "open":
            break
    browser.press(Keys.ENTER)
    browser.wait(lambda: browser.one("#detail").is_displayed())
    assert browser.one("#detail-caption").text == "a cat sits"
    assert browser.texts("#detail-alternatives li") == ["something else 20 %"]
    assert browser.texts("#detail-words tr") == ["a90 %", "cat50 %", "sits80 %"]
    browser.press(Keys.ARROW_RIGHT)
    browser.press(Keys.ARROW_RIGHT)
    browser.press(Keys.ARROW_RIGHT)  # there is no fourth
    assert browser.one("#detail-caption").text == "two dogs play"
    browser.press(Keys.ARROW_LEFT)
    assert browser.one("#detail-caption").text == "a red cup"
    browser.press(Keys.ESCAPE)
    browser.wait(lambda: not browser.one("#detail").is_displayed())
    assert browser.run("return document.activeElement.className") == "open"


def test_rows_with_holes_are_shown_as_far_as_they_go(browser, serve, tmp_path):
    rows = [
        {"image_id": 1, "caption": "", "image": ""},
        {
            "image_id": 2,
            "caption": "",
            "abstained": True,
            "confidence": 0.1,
            "n_best": [{"caption": "a"}, {"caption": "b"}],
        },
        {
            "image_id": 3,
            "caption": "gone",
            "image": "imgs/gone.jpg",
            "confidence": None,
            "words": "no list",
            "n_best": 1,
        },
        None,
        {},
    ]
    browser.open(serve(_write_page(tmp_path, json.dumps(rows))).address)
    browser.wait(
        lambda: (
            browser.texts(".no-picture")
            == ["no picture", *(f"no picture: imgs/{n}.jpg" for n in ("img2", "gone", "img4"))]
        )
    )
    assert browser.texts(".card > .text > .caption") == [
        "empty caption",
        "no caption: the model was not sure enough",
        "gone",
        "empty caption",
    ]
    assert browser.texts(".card .alternatives li") == ["a ", "b "]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "There is no vis.json beside this page"),
        ('[{"image_id": 1,', "vis.json is not valid JSON"),
        ('{"captions": []}', "vis.json is not a list of captions"),
    ],
)
def test_a_missing_or_wrong_vis_json_is_explained(browser, serve, tmp_path, content, said):
    _write_page(tmp_path, content or "")
    if content is None:
        (tmp_path / "vis.json").unlink()
    browser.open(serve(tmp_path).address)
    browser.wait(lambda: said in browser.one("#notice").text)


def test_opened_as_a_file_the_page_says_what_to_do_and_takes_a_chosen_file(browser, folder):
    browser.open((folder / "index.html").as_uri())
    assert "python -m http.server" in browser.one("#notice").text
    browser.one("#notice input").send_keys(str(folder / "vis.json"))
    browser.wait(lambda: browser.run("return [...document.images].filter((i) => i.naturalWidth > 100).length") == 3)
    assert not browser.one("#notice").is_displayed()
    assert browser.complaints() == []


def test_dark_and_narrow_views(browser, serve, folder):
    address = serve(folder).address

    def background() -> str:
        browser.open(address)
        browser.wait(lambda: browser.all(".card"))
        return browser.run("return getComputedStyle(document.body).backgroundColor")

    light = background()
    browser.look(scheme="dark")
    assert background() != light
    for width in (320, 700, 2000):
        browser.look(width)
        background()
        assert browser.run("return document.documentElement.scrollWidth") <= width
