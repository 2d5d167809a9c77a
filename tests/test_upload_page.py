"""The upload page of caption-serve in headless Chromium."""

import base64

import pytest
from test_service import BLUE, RED, Server, picture

pytest_plugins = ["page_browser"]
pytestmark = pytest.mark.browser

# A page cannot be dropped files on or pasted into from outside: the events are made in it, with what browsers put in.
TRANSFER = """
const bytes = Uint8Array.from(atob(arguments[0]), (character) => character.charCodeAt(0));
const transfer = new DataTransfer();
transfer.items.add(new File([bytes], arguments[1], { type: "image/png" }));
const event = arguments[2] === "drop"
  ? new DragEvent("drop", { dataTransfer: transfer, bubbles: true, cancelable: true })
  : new ClipboardEvent("paste", { clipboardData: transfer, bubbles: true });
document.body.dispatchEvent(event);
"""


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    token = tmp_path_factory.mktemp("token") / "token"
    token.write_text("open-sesame")
    running = Server("--token_file", str(token), token="open-sesame")
    yield running
    assert running.stop()[0] == 0


def give_token(browser, token):
    browser.one("#token").clear()
    browser.one("#token").send_keys(token)
    browser.one("#access button").click()


def test_photos_chosen_dropped_and_pasted_get_captions(browser, server, tmp_path):
    (tmp_path / "red.png").write_bytes(picture(RED))
    (tmp_path / "text.png").write_bytes(b"no picture at all")
    browser.look(390, 800)
    browser.open(f"http://127.0.0.1:{server.port}/")
    browser.one("#files").send_keys(str(tmp_path / "red.png"))
    browser.wait(lambda: browser.one("#access").is_displayed())
    give_token(browser, "wrong")
    browser.wait(lambda: browser.texts("#status") == ["That token is not right."])
    give_token(browser, "open-sesame")
    browser.wait(lambda: browser.all("#results .done"))
    assert browser.texts("#results .caption") == ["colour 200 16 48"]
    assert "confidence 60 %" in browser.texts("#results .facts")[0]
    assert len(browser.all("#results .alternatives li")) == 2
    for how, colour in (("drop", BLUE), ("paste", (7, 8, 9))):
        encoded = base64.b64encode(picture(colour)).decode()
        browser.driver.execute_script(TRANSFER, encoded, f"{how}.png", how)
    browser.wait(lambda: len(browser.all("#results .done")) == 3)
    assert browser.texts("#results .caption")[:2] == ["colour 7 8 9", "colour 10 20 220"]  # the newest first
    assert not browser.all("#results .words button")
    browser.one("#explain").click()
    browser.one("#files").send_keys(str(tmp_path / "red.png"))
    browser.wait(lambda: len(browser.all("#results .words button")) == 4)
    assert browser.texts("#results .words button") == ["colour", "200", "16", "48"]
    browser.run("document.querySelector('#results .words button').focus()")
    assert browser.run("const c = document.querySelector('#results canvas'); return [c.width, c.height]") == [7, 7]
    browser.run("document.activeElement.blur()")
    assert not browser.all("#results canvas")
    browser.one("summary").click()
    browser.one("#caption_prefix").send_keys("a photo of")
    browser.one("#files").send_keys(str(tmp_path / "red.png"))
    browser.wait(lambda: browser.texts("#results .caption")[0] == "a photo of colour 200 16 48")
    browser.one("#caption_prefix").send_keys(" a quagga")
    browser.one("#files").send_keys(str(tmp_path / "red.png"))
    browser.wait(lambda: browser.all("#results .failed"))
    assert browser.texts("#results .caption")[0] == "caption_prefix: the model does not know 'a photo of a quagga'"
    browser.one("#caption_prefix").clear()
    browser.one("#files").send_keys(str(tmp_path / "text.png"))
    browser.wait(lambda: len(browser.all("#results .failed")) == 2)
    assert "is text, not a picture" in browser.texts("#results .caption")[0]
    assert browser.one("#camera").get_attribute("capture") == "environment"
    assert browser.run("return document.documentElement.scrollWidth <= innerWidth")
    refused = [one for one in browser.complaints() if "401" not in one and "422" not in one and "400" not in one]
    assert not refused
