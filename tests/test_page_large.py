"""The large view of the page: one picture, judged, corrected, copied, compared, explained."""

import base64
import csv
import io
import json
import os
import time

import pytest
from page_rows import EXAMPLES, described, write_page
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.keys import Keys

from captioner.cli import prepro
from captioner.output.page import VisWriter

pytest_plugins = ["page_browser"]
pytestmark = pytest.mark.browser


def _open(browser, address: str, place: int = 0) -> None:
    browser.open(address)
    browser.run("localStorage.clear()")
    browser.wait(lambda: browser.all(".card"))
    browser.all(".open")[place].click()


def test_a_picture_opens_and_closes_from_the_keyboard(browser, serve, folder):
    browser.open(serve(folder).address)
    browser.wait(lambda: browser.all(".card"))
    for _ in range(16):
        browser.press(Keys.TAB)
        if browser.run("return document.activeElement.className") == "open":
            break
    browser.press(Keys.ENTER)
    browser.wait(lambda: browser.one("#large").is_displayed())
    assert browser.one("#large-caption").text == "a cat sits"
    assert browser.texts("#alternatives li") == ["something else 20 % sure, log p \N{MINUS SIGN}3.22"]
    assert browser.texts("#word-chips li") == ["a90 %", "cat50 %", "sits80 %"]
    assert "photo=1.jpg" in browser.driver.current_url
    browser.press(Keys.ARROW_RIGHT)
    browser.press(Keys.ARROW_RIGHT)
    browser.press(Keys.ARROW_RIGHT)  # there is no fourth
    assert browser.one("#large-caption").text == "two dogs play"
    browser.press(Keys.ARROW_LEFT)
    assert browser.one("#large-caption").text == "a red cup"
    browser.press(Keys.ESCAPE)
    browser.wait(lambda: not browser.one("#large").is_displayed())
    # The focus is on the picture that was last seen, not on the first that was opened.
    assert browser.run("return document.activeElement.querySelector('img').alt") == "a red cup"
    browser.wait(lambda: "photo" not in browser.driver.current_url)


def test_a_small_photo_is_scaled_up_and_the_buttons_stay(browser, serve, tmp_path):
    writer = VisWriter(tmp_path)
    added = writer.add_pictures([(i, EXAMPLES[i]) for i in range(2)])
    writer.finish([{"image_id": i, "caption": "a", **picture} for i, picture in enumerate(added)])
    browser.look(2000, 1200)
    _open(browser, serve(tmp_path).address)
    box = "return document.querySelector(arguments[0]).getBoundingClientRect().toJSON()"
    stage, image = (browser.driver.execute_script(box, name) for name in ("#stage", "#picture img"))
    assert image["width"] == stage["width"] > 1400 and image["height"] == stage["height"] == 1200
    before = browser.driver.execute_script(box, "#next")
    browser.one("#next").click()
    assert browser.driver.execute_script(box, "#next") == before


def test_links_lead_to_a_picture_and_back_closes_it(browser, serve, folder):
    address = serve(folder).address
    browser.open(address + "#search=dogs&photo=3.jpg")
    browser.wait(lambda: browser.one("#large").is_displayed())
    assert browser.one("#large-caption").text == "two dogs play"
    browser.one("#close").click()
    assert browser.driver.current_url.endswith("#search=dogs")
    browser.one(".open").click()
    assert browser.driver.current_url.endswith("#search=dogs&photo=3.jpg")
    browser.driver.back()
    browser.wait(lambda: not browser.one("#large").is_displayed())
    assert browser.driver.current_url.endswith("#search=dogs")


def test_slash_goes_to_the_search(browser, serve, folder):
    browser.open(serve(folder).address)
    browser.wait(lambda: browser.all(".card"))
    browser.press("/")
    browser.press("dogs")
    assert browser.texts(".card .caption") == ["two dogs play"]


def test_a_swipe_turns_to_the_next_picture(browser, serve, folder):
    _open(browser, serve(folder).address)
    browser.run(
        "const stage = document.getElementById('stage');"
        "for (const [type, clientX] of [['pointerdown', 300], ['pointerup', 120]])"
        "  stage.dispatchEvent(new PointerEvent(type, { clientX, clientY: 200, pointerType: 'touch', bubbles: true }))"
    )
    assert browser.one("#large-caption").text == "a red cup"


def test_captions_are_judged_and_corrected_and_stay_so(browser, serve, folder):
    address = serve(folder).address
    _open(browser, address)
    browser.press("1")
    browser.press(Keys.ARROW_RIGHT)
    browser.press("3")
    browser.press("e")
    browser.press('a "red", cup', Keys.ENTER)
    assert browser.one("#large").is_displayed()
    assert browser.one("#correction").text == 'corrected: a "red", cup'
    browser.press("e")
    browser.press("thrown away", Keys.ESCAPE)  # leaves the field, not the picture
    assert browser.one("#large").is_displayed()
    browser.press(Keys.ARROW_RIGHT, "2", "2")  # twice takes it back
    browser.press(Keys.ESCAPE)
    browser.open(address)
    browser.wait(lambda: browser.all(".card"))
    assert browser.one("#judged summary").text == "Judged 2 of 3"
    # Wilson's interval of 1 of 2 at 95 %: 9.5 % to 90.5 %.
    assert "right 1: 50 % (9.5 % to 91 %) · partly 0:" in browser.run(
        "return document.getElementById('tally').textContent"
    )
    assert [mark.get_attribute("aria-label") for mark in browser.all(".badge")] == ["right", "wrong, corrected"]
    browser.one("#show [value=wrong]").click()
    assert browser.texts(".card .caption") == ["a red cup"]

    judged = {kind: browser.run(f"return EXPORTS.{kind}[2]()") for kind in ("json", "csv", "raw")}
    assert [row["verdict"] for row in json.loads(judged["json"])] == ["right", "wrong"]
    assert [row["correction"] for row in csv.DictReader(io.StringIO(judged["csv"]))] == ["", 'a "red", cup']
    assert json.loads(judged["raw"]) == [
        {"file_path": "1.jpg", "captions": ["a cat sits"], "id": 1},
        {"file_path": "2.jpg", "captions": ['a "red", cup'], "id": 2},
    ]


def test_a_judgement_does_not_outlive_the_caption_it_was_of(browser, serve, folder):
    address = serve(folder).address
    _open(browser, address)
    browser.press("1", Keys.ESCAPE)
    rows = json.loads((folder / "vis.json").read_text())
    rows[0]["caption"] = "a dog sits"
    (folder / "vis.json").write_text(json.dumps(rows))
    later = time.time() + 10  # a server tells versions apart by whole seconds
    os.utime(folder / "vis.json", (later, later))
    browser.open(address)
    browser.wait(lambda: browser.texts(".card .caption")[:1] == ["a dog sits"])
    assert not browser.all(".badge")
    assert not browser.one("#judged").is_displayed()


def test_what_is_saved_goes_through_caption_prepro(browser, serve, folder, tmp_path):
    _open(browser, serve(folder).address)
    browser.press("1", Keys.ARROW_RIGHT, "1")
    raw = tmp_path / "corrected.json"
    raw.write_text(browser.run("return EXPORTS.raw[2]()"))
    for number, photo in enumerate(EXAMPLES[3:5], start=1):
        (tmp_path / f"{number}.jpg").write_bytes(photo.read_bytes())
    argv = ["--input_json", str(raw), "--num_val", "1", "--images_root", str(tmp_path), "--word_count_threshold", "0"]
    argv += ["--output_json", str(tmp_path / "data.json"), "--output_h5", str(tmp_path / "data.h5")]
    assert prepro.main(argv) == 0
    assert len(json.loads((tmp_path / "data.json").read_text())["images"]) == 2


def test_two_results_stand_side_by_side(browser, serve, folder):
    rows = json.loads((folder / "vis.json").read_text())
    changed = [described("a dog sits", 0.9, 0.9, 0.9), described("a red cup", 0.9, 0.9, 0.9)]
    other = [
        {"image_id": row["image_id"], "file_name": row["file_name"], **new}
        for row, new in zip(rows[:2], changed, strict=True)
    ]
    (folder / "other.json").write_text(json.dumps(other[::-1]))  # in another order, and one picture is missing
    browser.open(serve(folder).address + "#a=vis.json&b=other.json&sort=differing")
    browser.wait(lambda: browser.all(".card"))
    # Confidence falls most between the red cups: 0.14 to 0.9.
    assert browser.texts(".card .name") == ["2.jpg", "1.jpg", "3.jpg"]
    assert browser.texts(".card:nth-child(2) .caption") == ["A a cat sits", "B a dog sits"]
    assert browser.texts(".card:nth-child(2) mark") == ["cat", "dog"]
    assert browser.texts(".card:nth-child(3) .caption") == ["A two dogs play", "B –"]
    assert browser.texts(".card .confidence") == ["A 14 %, B 90 % sure", "A 71 %, B 90 % sure", "A 99 % sure"]
    assert browser.one("#about").text.startswith("A: vis, B: other · ")
    browser.one("#show [value=differing]").click()
    assert browser.texts(".card .name") == ["1.jpg", "3.jpg"]
    assert "a=vis.json&b=other.json" in browser.driver.current_url


def test_caption_score_shows_two_systems_on_the_page_of_their_pictures(browser, serve, folder, command, tmp_path):
    other = [{"image_id": 1, "caption": "two cats"}, {"image_id": 2, "caption": "a red cup"}]
    (tmp_path / "other.json").write_text(json.dumps(other))
    references = [{"id": i, "captions": [caption, "it"]} for i, caption in ((1, "a cat sits"), (2, "a red cup"))]
    (tmp_path / "references.json").write_text(json.dumps(references))
    argv = ["--predictions", folder / "vis.json", "--references", tmp_path / "references.json", "--metrics", "rouge_l"]
    done = command("score", *argv, "--compare", tmp_path / "other.json", "--view", folder)
    assert done.returncode == 0, done.stderr
    address = done.stdout.split("side by side: ")[1].strip()
    assert address == f"{folder / 'index.html'}#a=compare-vis.json&b=compare-other.json&sort=differing"
    browser.open(f"file://{address}")  # as it is printed
    browser.wait(lambda: browser.run("return [...document.images].filter((i) => i.naturalWidth > 100).length") == 2)
    assert browser.texts(".card .caption") == ["A a cat sits", "B two cats", "A a red cup", "B a red cup"]
    browser.one(".open").click()
    assert browser.texts("#answers li") == [
        "A a cat sits vis, ROUGE_L 1.00",
        "B two cats other, ROUGE_L 0.00",
        "a cat sits by people",
        "it by people",
    ]
    done = command("score", *argv, "--view", folder)
    assert done.returncode == 1 and "--compare" in done.stderr


@pytest.mark.parametrize("mode", ["squash", "crop", "pad"])
def test_heat_lies_over_the_part_of_the_picture_the_model_sees(browser, serve, folder, mode):
    (folder / "about.json").write_text(json.dumps({"image_mode": mode}))
    rows = json.loads((folder / "vis.json").read_text())
    heat = bytearray(49)
    heat[7 * 3 + 1] = 255  # the fourth row, the second column
    rows[0]["words"][1]["heat"] = base64.b64encode(heat).decode()
    rows[0]["words"][2]["heat"] = "no base64 of a square"
    (folder / "vis.json").write_text(json.dumps(rows))
    _open(browser, serve(folder).address)
    assert not browser.all(".heat")
    chips = browser.all("#word-chips button")
    assert [chip.text.split()[0] for chip in chips] == ["cat"]
    ActionChains(browser.driver).move_to_element(chips[0]).perform()
    browser.wait(lambda: browser.all(".heat"))
    ActionChains(browser.driver).move_to_element(browser.one("#large-caption")).perform()
    browser.wait(lambda: not browser.all(".heat"))
    chips[0].click()
    ActionChains(browser.driver).move_to_element(browser.one("#large-caption")).perform()
    assert browser.all(".heat")  # a tap holds it
    hottest = browser.run(
        "const canvas = document.querySelector('.heat');"
        "const pixels = canvas.getContext('2d').getImageData(0, 0, 7, 7).data;"
        "const opaque = [...Array(49).keys()].map((i) => pixels[4 * i + 3]);"
        "return opaque.indexOf(Math.max(...opaque))"
    )
    assert hottest == 22
    place, image, natural = browser.run(
        "const box = (e) => e.getBoundingClientRect().toJSON();"
        "const image = document.querySelector('#picture img');"
        "return [box(document.querySelector('.heat')), box(image), [image.naturalWidth, image.naturalHeight]]"
    )
    scale = min(image["width"] / natural[0], image["height"] / natural[1])
    width, height = natural[0] * scale, natural[1] * scale
    assert width != pytest.approx(height, rel=0.05)
    if mode != "squash":
        width = height = {"crop": min, "pad": max}[mode](width, height)
    assert place["x"] == pytest.approx(image["x"] + (image["width"] - width) / 2 + width * 15 / 256, abs=1)
    assert place["y"] == pytest.approx(image["y"] + (image["height"] - height) / 2 + height * 15 / 256, abs=1)
    assert place["width"] == pytest.approx(width * 224 / 256, abs=1)
    assert place["height"] == pytest.approx(height * 224 / 256, abs=1)

    browser.one("#play").click()
    browser.wait(lambda: browser.one("#play").text == "▶ Where it looked")  # it ends by itself
    assert not browser.all(".heat")


def test_nothing_bars_readers_who_cannot_see_or_point(browser, serve, folder):
    address = serve(folder).address
    for width, scheme in ((1280, "light"), (1280, "dark"), (390, "light"), (390, "dark")):
        browser.look(width, 800, scheme)
        _open(browser, address)
        browser.press("1", "e")
        assert browser.barriers() == []
        browser.press(Keys.ESCAPE, Keys.ESCAPE)
        browser.wait(lambda: not browser.one("#large").is_displayed())
        if width == 390:
            browser.one("#view").click()
        browser.one("#shade").click()
        assert browser.barriers() == []
        small = browser.run(
            "return [...document.querySelectorAll('button, input, select, summary, a')].filter((e) => e.offsetParent)"
            ".filter((e) => e.offsetHeight < 24 || e.offsetWidth < 24).map((e) => e.outerHTML)"
        )
        assert small == []
    browser.open(serve(write_page(folder.parent, "[")).address)
    browser.wait(lambda: browser.one("#notice").is_displayed())
    assert browser.barriers() == []


def test_only_files_beside_the_page_are_linked(browser, serve, tmp_path):
    links = ["../clip%20one.mp4#t=2.000", "javascript:alert(1)", "https://example.org/clip.mp4", "http://[", 3]
    rows = [{"image_id": i, "caption": "a", "file_name": f"{i}.jpg", "link": link} for i, link in enumerate(links)]
    (tmp_path / "page").mkdir()
    VisWriter(tmp_path / "page").finish(rows)
    address = serve(tmp_path).address
    _open(browser, f"{address}page/")
    assert browser.one("#facts a").get_attribute("href") == f"{address}clip%20one.mp4#t=2.000"
    for _ in links[1:]:
        browser.press(Keys.ARROW_RIGHT)
        assert not browser.all("#facts a")
