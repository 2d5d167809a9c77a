"""What a reader brings to the page and takes from it, by Chromium's own drop, clipboard and downloads."""

import csv
import json
from pathlib import Path

import pytest
from page_rows import described
from selenium.webdriver.common.keys import Keys

pytest_plugins = ["page_browser"]
pytestmark = pytest.mark.browser


def _open(browser, address: str) -> None:
    browser.open(address)
    browser.run("localStorage.clear()")
    browser.wait(lambda: browser.all(".card"))


def _drag(browser, files: list[Path], *events: str) -> None:
    """As if files came from the desktop."""
    data = {"items": [], "files": [str(path) for path in files], "dragOperationsMask": 1}
    for event in events:
        drag = {"type": event, "x": 300, "y": 300, "data": data}
        browser.driver.execute_cdp_cmd("Input.dispatchDragEvent", drag)


def test_a_dropped_result_is_compared_with_the_one_that_is_shown(browser, serve, folder, tmp_path):
    rows = json.loads((folder / "vis.json").read_text())
    other = [{"image_id": row["image_id"], "file_name": row["file_name"], "caption": "a dog sits"} for row in rows[:2]]
    (tmp_path / "other.json").write_text(json.dumps(other))
    (tmp_path / "broken.json").write_text("[{")
    _open(browser, serve(folder).address)
    _drag(browser, [tmp_path / "other.json"], "dragEnter", "dragOver")
    browser.wait(lambda: browser.all("body.dropping"))
    _drag(browser, [tmp_path / "other.json"], "drop")
    browser.wait(lambda: browser.texts(".card:first-child .caption") == ["A a cat sits", "B a dog sits"])
    assert not browser.all("body.dropping")
    assert browser.texts(".card:first-child mark") == ["cat", "dog"]
    assert browser.one("#about").text.startswith("A: vis, B: other · ")
    _drag(browser, [tmp_path / "broken.json"], "dragEnter", "dragOver", "drop")
    browser.wait(lambda: "broken.json is not valid JSON" in browser.one("#notice").text)
    assert len(browser.all(".card")) == 3


@pytest.mark.parametrize("secure", [True, False])
def test_captions_and_links_are_copied(browser, serve, folder, secure):
    address = serve(folder).address
    browser.driver.execute_cdp_cmd(
        "Browser.grantPermissions",
        {"origin": address.rstrip("/"), "permissions": ["clipboardReadWrite", "clipboardSanitizedWrite"]},
    )
    _open(browser, address)
    browser.run("window.kept = navigator.clipboard")
    if not secure:  # as on a page of a plain http server elsewhere
        browser.run("Object.defineProperty(navigator, 'clipboard', { value: undefined })")
    read = "const done = arguments[0]; kept.readText().then(done, (error) => done(String(error)))"
    browser.one(".open").click()
    browser.one("#copy-caption").click()
    browser.wait(lambda: browser.one("#said").get_attribute("textContent") == "caption copied")
    assert browser.driver.execute_async_script(read) == "a cat sits"
    browser.one("#copy-link").click()
    browser.wait(lambda: browser.one("#said").get_attribute("textContent") == "link copied")
    assert browser.driver.execute_async_script(read) == f"{address}#photo=1.jpg"
    assert browser.complaints() == []


def test_judgements_are_saved_as_files(browser, serve, folder, tmp_path):
    saved = tmp_path / "saved"
    saved.mkdir()
    browser.driver.execute_cdp_cmd("Browser.setDownloadBehavior", {"behavior": "allow", "downloadPath": str(saved)})
    _open(browser, serve(folder).address)
    browser.one(".open").click()
    browser.press("1", Keys.ARROW_RIGHT, "3", "e")
    browser.press('a "red", cup', Keys.ENTER)
    browser.press(Keys.ESCAPE)
    browser.wait(lambda: not browser.one("#large").is_displayed())
    browser.one("#judged summary").click()
    names = {"json": "judgements.json", "csv": "judgements.csv", "raw": "corrected.json"}
    for kind, name in names.items():
        browser.one(f"[data-export={kind}]").click()
        browser.wait((saved / name).is_file)
    assert [row["verdict"] for row in json.loads((saved / names["json"]).read_text())] == ["right", "wrong"]
    with (saved / names["csv"]).open(newline="") as stream:
        assert [row["correction"] for row in csv.DictReader(stream)] == ["", 'a "red", cup']
    assert json.loads((saved / names["raw"]).read_text())[1]["captions"] == ['a "red", cup']


def test_ten_thousand_results_keep_every_task_short(browser, serve, folder):
    """Counted, not timed: what a keystroke costs is the cards it makes, and none of the work done at the start."""
    rows = [
        {"image_id": i, "image": "", "file_name": f"{i}.jpg", **described(f"caption {i}", 0.5, 0.4)}
        for i in range(10_000)
    ]
    (folder / "vis.json").write_text(json.dumps(rows))
    _open(browser, serve(folder).address)
    browser.run("window.calls = 0; const read = readCaption; readCaption = (row) => { calls += 1; return read(row); }")
    browser.run("window.cards = 0; const one = card; card = (...all) => { cards += 1; return one(...all); }")
    browser.one("#search").send_keys("777")
    assert len(browser.all(".card")) == 19
    calls, cards = browser.run("return [calls, cards]")
    assert calls == 0 and cards <= 300
