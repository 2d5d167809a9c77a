"""The page of captions in a real browser: Chromium looks at folders that VisWriter, or the original, wrote."""

import json
import shutil

import numpy as np
import pytest
from page_rows import EXAMPLES, write_page
from selenium.webdriver.common.keys import Keys

from captioner.output.page import VisWriter

pytest_plugins = ["page_browser"]
pytestmark = pytest.mark.browser

PER_PAGE = 100


def test_pictures_stand_with_captions_and_file_names(browser, serve, folder):
    browser.open(serve(folder).address)
    browser.wait(lambda: len(browser.all(".card img")) == 3)
    assert browser.texts(".card .caption") == ["a cat sits", "a red cup", "two dogs play"]
    assert browser.texts(".card .name") == ["1.jpg", "2.jpg", "3.jpg"]
    browser.wait(lambda: browser.run("return [...document.images].every((i) => i.complete && i.naturalWidth > 100)"))
    assert browser.one("#count").text == "3 pictures"
    assert browser.one("#title").text == "holiday"
    assert browser.one("#about").text == "captioner-flickr8k · Mar 1, 2026"
    assert not browser.one("#site").is_displayed()  # there is no training to look at
    assert [image.get_attribute("alt") for image in browser.all(".card img")] == browser.texts(".card .caption")
    assert browser.complaints() == []


def test_folders_of_the_original_show_too(browser, serve, tmp_path):
    write_page(tmp_path, '[{"image_id": "184613", "caption": "a man riding a wave"}, {"caption":"b","image_id":7}]')
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
    write_page(tmp_path, json.dumps(rows))
    (tmp_path / "imgs").mkdir()
    shutil.copy(EXAMPLES[0], tmp_path / "imgs" / "a#b?c.jpg")
    server = serve(tmp_path)
    browser.open(server.address)
    browser.wait(lambda: len(browser.all(".card")) == len(rows))
    browser.one(".open").click()
    assert browser.texts(".card .caption") == [attack] * len(rows)
    assert set(browser.texts(".card .name")) == {f"'{attack}.jpg"}
    assert browser.one("#large-caption").text == attack
    browser.wait(lambda: browser.run("return [...document.images].map((i) => i.naturalWidth > 100)") == [True])
    assert browser.run("return window.hacked") is None
    assert not browser.all("#grid script")
    assert not [path for path in server.requests if "example.org" in path]


def test_many_images_come_page_by_page_and_pictures_as_they_scroll_in(browser, serve, tmp_path):
    writer = VisWriter(tmp_path)
    added = writer.add_pictures([(i, np.zeros((3, 30, 40), np.uint8)) for i in range(250)])
    rows = [
        {"image_id": i, "caption": f"caption {i}", "file_name": f"{i}.jpg", **picture}
        for i, picture in enumerate(added)
    ]
    writer.finish(rows)
    server = serve(tmp_path)
    browser.look(1000, 500)
    browser.open(server.address)
    browser.wait(lambda: len(browser.all(".card")) == PER_PAGE)
    browser.wait(lambda: browser.run("return document.images[0].complete"))
    assert 0 < sum("imgs/" in path for path in server.requests) < PER_PAGE
    assert browser.one("#count").text == "250 pictures, 1 to 100 on this page"

    browser.one(".pager .next").click()
    assert browser.texts(".card .caption")[0] == "caption 100"
    browser.one(".pager .page").send_keys(Keys.CONTROL, "a")
    browser.one(".pager .page").send_keys("3", Keys.ENTER)
    assert browser.texts(".card .caption") == [f"caption {i}" for i in range(200, 250)]
    assert not browser.one(".pager .next").is_enabled()
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
    assert browser.one("#count").text == "1 of 3 pictures match"
    browser.one("#search").send_keys(" zebra")
    assert browser.texts(".card .caption") == []
    assert browser.one("#count").text == "0 of 3 pictures match"
    browser.one("#clear").click()
    assert len(browser.all(".card")) == 3


def test_scores_of_caption_score_show_with_their_intervals(browser, serve, folder, command):
    references = [{"id": n, "captions": ["a cat sits", "two dogs play"]} for n in (1, 2, 3)]
    (folder / "references.json").write_text(json.dumps(references))
    arguments = (
        "--references",
        folder / "references.json",
        "--metrics",
        "rouge_l",
        "--output",
        folder / "scores.json",
        "--overwrite",
        1,
    )
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
    browser.open(serve(write_page(tmp_path, json.dumps(rows))).address)
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


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "There is no vis.json beside this page"),
        ('[{"image_id": 1,', "vis.json is not valid JSON"),
        ('{"captions": []}', "vis.json is not a list of captions"),
    ],
)
def test_a_missing_or_wrong_vis_json_is_explained(browser, serve, tmp_path, content, said):
    write_page(tmp_path, content or "")
    if content is None:
        (tmp_path / "vis.json").unlink()
    browser.open(serve(tmp_path).address)
    browser.wait(lambda: said in browser.one("#notice").text)


def test_the_page_opens_by_double_click(browser, folder):
    browser.open((folder / "index.html").as_uri())
    browser.wait(lambda: browser.run("return [...document.images].filter((i) => i.naturalWidth > 100).length") == 3)
    assert browser.one("#title").text == "holiday"
    assert browser.texts("#scores th") == ["Bleu_1", "CIDEr"]
    assert not browser.one("#notice").is_displayed()
    assert browser.complaints() == []


def test_a_folder_of_the_original_opened_by_double_click_takes_a_chosen_file(browser, tmp_path):
    write_page(tmp_path, '[{"image_id": "1", "caption": "a man riding a wave"}]')
    browser.open((tmp_path / "index.html").as_uri())
    browser.wait(lambda: "python -m http.server" in browser.one("#notice").text)
    browser.one("#notice input").send_keys(str(tmp_path / "vis.json"))
    browser.wait(lambda: browser.texts(".card .caption") == ["a man riding a wave"])


def test_a_result_without_pictures_says_why(browser, serve, tmp_path):
    VisWriter(tmp_path).finish(
        [{"image_id": 1, "caption": "a cat", "file_name": "1.jpg", "words": [], "logprob": -1.0}]
    )
    browser.open(serve(tmp_path).address)
    browser.wait(lambda: browser.texts(".card .caption") == ["a cat"])
    assert "--dump_images 0" in browser.one("#notice").text


def test_filters_find_what_they_are_called(browser, serve, tmp_path):
    captions = ["a cat", "a UNK", "", "a cat", "a dog"]
    rows = [
        {"image_id": i, "caption": caption, "abstained": not caption, "confidence": 0.1 * (i + 1), "image": ""}
        for i, caption in enumerate(captions)
    ]
    browser.open(serve(write_page(tmp_path, json.dumps(rows))).address)
    browser.wait(lambda: browser.all(".card"))
    shown = {}
    for name in ("unk", "abstained", "repeated", "below"):
        browser.one(f"#show [value={name}]").click()
        shown[name] = browser.texts(".card .name")
    names = [f"image {i}" for i in range(5)]
    assert shown == {"unk": [names[1]], "abstained": [names[2]], "repeated": [names[0], names[3]], "below": names[:2]}
    assert browser.driver.current_url.endswith("#show=below&below=30")
    assert not browser.all("#show [value=duplicates], #show [value=differing]")  # there are none


def test_ten_thousand_results_stay_a_small_page(browser, serve, tmp_path):
    rows = [{"image_id": i, "caption": f"caption {i} of many", "image": ""} for i in range(10_000)]
    browser.open(serve(write_page(tmp_path, json.dumps(rows))).address)
    browser.wait(lambda: browser.all(".card"))
    nodes = "return document.getElementsByTagName('*').length"
    assert browser.run(nodes) < 1200
    browser.one("#search").send_keys("777")
    assert browser.texts(".card .caption") == [f"caption {i} of many" for i in range(10_000) if "777" in str(i)]
    assert browser.run(nodes) < 1200


def test_dark_and_narrow_views(browser, serve, folder):
    address = serve(folder).address

    def background() -> str:
        browser.open(address)
        browser.wait(lambda: browser.all(".card"))
        return browser.run("return getComputedStyle(document.body).backgroundColor")

    light = background()
    browser.look(scheme="dark")
    assert background() != light
    address += "#show=below"  # with its slider
    for width in (320, 700, 1130, 1200, 1280, 1340, 2000):
        browser.look(width)
        background()
        assert browser.run("return document.documentElement.scrollWidth") <= width


def test_pictures_fill_their_rows_and_the_size_can_be_chosen(browser, serve, tmp_path):
    sizes = [(30, 40), (40, 30), (60, 30)] * 8
    writer = VisWriter(tmp_path)
    added = writer.add_pictures([(i, np.zeros((3, h, w), np.uint8)) for i, (w, h) in enumerate(sizes)])
    writer.finish([{"image_id": i, "caption": "a", **picture} for i, picture in enumerate(added)])
    browser.open(serve(tmp_path).address)
    browser.wait(lambda: len(browser.all(".card")) == 24)
    boxes = "return [...document.querySelectorAll('.open')].map((e) => e.getBoundingClientRect().toJSON())"

    def rows() -> dict[float, list[dict]]:
        found: dict[float, list[dict]] = {}
        for box in browser.run(boxes):
            found.setdefault(round(box["top"]), []).append(box)
        return found

    usual = list(rows().values())
    assert len(usual) > 1
    for row in usual:
        assert max(box["height"] for box in row) == pytest.approx(min(box["height"] for box in row), abs=1)
    right = [max(box["right"] for box in row) for row in usual[:-1]]
    assert max(right) - min(right) < 2  # no ragged edge
    browser.one("#size").send_keys(Keys.END)
    assert len(rows()) > len(usual)
    browser.look(390, 844)
    browser.one("#view").click()
    browser.one("#size").send_keys(Keys.HOME, *[Keys.ARROW_RIGHT] * 10)
    assert [len(row) for row in rows().values()] == [2] * 12
