"""caption-prepro --view: a data set on the page before anything is trained on it."""

import json
import shutil
from pathlib import Path

import pytest
from page_rows import EXAMPLES

from captioner.cli import prepro

pytest_plugins = ["page_browser"]
pytestmark = pytest.mark.browser


@pytest.fixture
def view(tmp_path: Path, capsys) -> Path:
    """The page of five entries: two of the same photo in different splits, one broken, one rare word."""
    photos = tmp_path / "photos"
    photos.mkdir()
    for name, photo in {"a": 0, "b": 1, "c": 2, "again": 0}.items():
        shutil.copy(EXAMPLES[photo], photos / f"{name}.jpg")
    (photos / "broken.jpg").write_bytes(b"")
    entries = [
        {"file_path": "a.jpg", "captions": ["A dog, runs.", "a dog"], "split": "train"},
        {"file_path": "b.jpg", "captions": ["a Zebra! runs"], "split": "train"},
        {"file_path": "c.jpg", "captions": ["a dog runs"], "split": "val"},
        {"file_path": "again.jpg", "captions": ["a dog runs"], "split": "test"},
        {"file_path": "broken.jpg", "captions": ["a dog"], "split": "train"},
    ]
    (tmp_path / "raw.json").write_text(json.dumps(entries))
    argv = ["--input_json", str(tmp_path / "raw.json"), "--images_root", str(photos), "--num_val", "0"]
    argv += ["--word_count_threshold", "1", "--num_workers", "0", "--view", str(tmp_path / "view")]
    assert prepro.main(argv) == 0
    assert f"{tmp_path / 'view' / 'index.html'} (open it by double click)" in capsys.readouterr().out
    assert not (tmp_path / "data.h5").exists()
    return tmp_path / "view"


def test_pictures_stand_with_all_their_captions_and_rare_words_marked(browser, view):
    browser.open((view / "index.html").as_uri())
    browser.wait(lambda: browser.run("return [...document.images].filter((i) => i.naturalWidth > 100).length") == 4)
    assert browser.one("#title").text == "raw.json"
    assert browser.texts(".card:first-child .caption") == ["A dog, runs.", "a dog"]
    assert browser.texts(".unk") == ["Zebra!"]
    assert browser.texts(".card .confidence") == ["train", "train", "val", "test"]
    browser.one("#show [value=unk]").click()
    assert browser.texts(".card .name") == ["b.jpg"]
    browser.one("#show [value=val]").click()
    assert browser.texts(".card .name") == ["c.jpg"]
    browser.one(".open").click()
    assert browser.one("#large-caption").text == "a dog runs"
    assert not browser.one("#verdicts").is_displayed()  # what people wrote is not judged
    assert browser.complaints() == []
    assert browser.barriers() == []


def test_findings_lead_to_their_pictures(browser, view):
    browser.open((view / "index.html").as_uri())
    browser.wait(lambda: browser.all(".card"))
    double, unreadable = browser.all("#findings li")
    assert unreadable.text == "Cannot be read: 1 (broken.jpg)"
    assert double.text == "There twice: 1; in two splits: 1"
    browser.one("#findings a").click()
    browser.wait(lambda: browser.texts(".card .name") == ["a.jpg", "again.jpg"])


def test_words_are_listed_with_their_counts_and_searched(browser, view):
    browser.open((view / "index.html").as_uri())
    browser.wait(lambda: browser.all(".card"))
    assert browser.one("#wordlist summary").text == "Words: 3 known, 1 rare ones become UNK"
    browser.one("#wordlist summary").click()
    browser.wait(lambda: browser.all("#wordlist .chip"))
    assert browser.texts("#wordlist .chip") == ["a5", "dog4", "runs4", "zebra1"]
    browser.all("#wordlist .chip")[3].click()
    assert browser.texts(".card .name") == ["b.jpg"]
    assert browser.barriers() == []


def test_a_prepared_dataset_shows_what_the_network_sees(browser, view, tmp_path, capsys):
    argv = ["--input_json", str(tmp_path / "raw.json"), "--images_root", str(tmp_path / "photos"), "--num_val", "0"]
    files = ["--output_json", str(tmp_path / "data.json"), "--output_h5", str(tmp_path / "data.h5")]
    assert prepro.main([*argv, *files, "--word_count_threshold", "1", "--num_workers", "0"]) == 0
    prepared = ["--input_json", str(tmp_path / "data.json"), "--input_h5", str(tmp_path / "data.h5")]
    assert prepro.main(prepared) == 1
    assert "only looked at" in capsys.readouterr().err
    assert prepro.main([*prepared, "--view", str(tmp_path / "prepared")]) == 0
    browser.open((tmp_path / "prepared" / "index.html").as_uri())
    sizes = "return [...document.images].filter((i) => i.complete).map((i) => `${i.naturalWidth}×${i.naturalHeight}`)"
    browser.wait(lambda: browser.run(sizes) == ["256×256"] * 4)
    assert browser.one("#title").text == "data.h5"
    assert browser.texts(".card .name") == ["a.jpg", "b.jpg", "c.jpg", "again.jpg"]
    assert browser.texts(".card:nth-child(2) .caption") == ["a UNK runs"]
    assert browser.texts(".unk") == ["UNK"]
    assert browser.texts("#findings li") == ["Words that became UNK: 1 (7.1%)"]
    assert browser.one("#wordlist summary").text == "Words: 3 known, 0 rare ones become UNK"
    assert browser.complaints() == []
