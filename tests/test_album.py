"""--share: the page as one file, in a real browser, opened from the disk."""

import json
import re
import shutil
from pathlib import Path

import pytest
from page_rows import EXAMPLES

from captioner.errors import InputError
from captioner.output.album import expected_size, write_album
from captioner.output.page import VisWriter
from captioner.runtime.quantities import bytes_text

pytest_plugins = ["page_browser"]

ATTACK = '</script><img src=x onerror="window.hacked=1"><script>window.hacked=1</script><!-- &amp;'


@pytest.mark.browser
def test_an_album_shows_pictures_and_captions_by_itself(browser, folder, tmp_path):
    (tmp_path / "sent").mkdir()
    size = write_album(folder, tmp_path / "sent" / "album.html")
    shutil.rmtree(folder)
    assert size == (tmp_path / "sent" / "album.html").stat().st_size < expected_size(3)
    browser.open((tmp_path / "sent" / "album.html").as_uri())
    browser.wait(lambda: browser.run("return [...document.images].filter((i) => i.naturalWidth > 100).length") == 3)
    assert browser.texts(".card .caption") == ["a cat sits", "a red cup", "two dogs play"]
    assert browser.one("#title").text == "holiday"
    assert browser.texts("#scores th") == ["Bleu_1", "CIDEr"]
    browser.one(".open").click()
    assert browser.one("#large-caption").text == "a cat sits"
    assert browser.complaints() == []


@pytest.mark.browser
def test_names_and_captions_in_an_album_are_inert(browser, tmp_path):
    writer = VisWriter(tmp_path / "vis")
    (added,) = writer.add_pictures([(ATTACK, EXAMPLES[0])])
    words = [{"word": word, "logprob": -1} for word in ATTACK.split()]
    row = {"image_id": ATTACK, "caption": ATTACK, "file_name": f"{ATTACK}.jpg", "words": words, **added}
    writer.finish([row], {}, {"title": ATTACK, "model": ATTACK})
    write_album(tmp_path / "vis", tmp_path / "album.html")
    browser.open((tmp_path / "album.html").as_uri())
    browser.wait(lambda: browser.texts(".card .caption") == [ATTACK])
    browser.one(".open").click()
    assert browser.one("#large-caption").text == ATTACK
    assert browser.one("#title").get_attribute("textContent") == ATTACK
    assert browser.run("return window.hacked") is None
    assert browser.complaints() == []


@pytest.mark.browser
def test_an_albums_policy_stops_code_that_is_not_ours(browser, folder, tmp_path):
    write_album(folder, tmp_path / "album.html")
    page = (tmp_path / "album.html").read_text(encoding="utf-8")
    added = "<script>window.hacked = 1</script><img src=x onerror='window.hacked = 1'><p style='color: red'>"
    (tmp_path / "album.html").write_text(page.replace("</main>", added + "</main>"), encoding="utf-8")
    browser.open((tmp_path / "album.html").as_uri())
    browser.wait(lambda: browser.all(".card"))
    assert browser.run("return window.hacked") is None
    assert sum("Content Security Policy" in complaint for complaint in browser.complaints()) >= 3


def test_an_album_names_no_other_file_and_holds_small_pictures(folder, tmp_path):
    write_album(folder, tmp_path / "album.html")
    page = (tmp_path / "album.html").read_text(encoding="utf-8")
    head = page.split("</head>")[0]
    policy = re.search(r'http-equiv="Content-Security-Policy"\s+content="(.*?)"', head)[1]
    assert "unsafe" not in policy and "self" not in policy and "connect-src" not in policy
    assert policy.startswith("default-src 'none'; img-src data:;")
    assert not re.search(r'<(link|script)[^>]*(href|src)="(?!data:)', head)
    assert page.count('<script type="text/plain" data-picture=') == 3


def test_a_folder_without_results_is_refused(tmp_path: Path):
    with pytest.raises(InputError, match="vis.json.*run caption-eval first"):
        write_album(tmp_path, tmp_path / "album.html")
    assert not (tmp_path / "album.html").exists()


def test_a_picture_that_is_gone_leaves_the_others(folder, tmp_path, caplog):
    (folder / "imgs" / "img2.jpg").unlink()
    write_album(folder, tmp_path / "album.html")
    page = (tmp_path / "album.html").read_text(encoding="utf-8")
    assert page.count('<script type="text/plain" data-picture=') == 2
    assert "img2.jpg" in caplog.text
    rows = re.search(r'data-name="vis.json">(.*?)</script>', page)[1]
    assert len(json.loads(rows)) == 3


def test_share_writes_an_album_and_says_its_size_beforehand(tiny_model, command, tmp_path):
    photos = tmp_path / "holiday"
    photos.mkdir()
    for photo in EXAMPLES[:2]:
        shutil.copy(photo, photos)
    argv = ["--model", tiny_model, "--image_folder", photos, "--vis_dir", tmp_path / "vis", "--gpuid", -1]
    done = command("eval", *argv, "--share", tmp_path / "album.html")
    assert done.returncode == 0, done.stderr
    assert f"album.html will have up to {bytes_text(expected_size(2))} for 2 pictures" in done.stderr
    assert (tmp_path / "album.html").stat().st_size < expected_size(2)
    about = json.loads((tmp_path / "vis" / "about.json").read_text())
    assert about["title"] == "holiday" and about["model"] == tiny_model.stem and about["pictures"] is True

    for wrong, reason in (
        (["--share", tmp_path / "album.zip"], "a name that ends in .html"),
        (["--share", tmp_path / "a.html", "--dump_images", 0], "--share is made from the page"),
    ):
        done = command("eval", *argv, *wrong)
        assert done.returncode == 1
        assert reason in done.stderr
