"""The page of training runs in a real browser, beside reports as caption-train and the original write them."""

import json
import math
import re
from pathlib import Path

import pytest
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys

from captioner.output.page import VisWriter

pytest_plugins = ["page_browser"]
pytestmark = pytest.mark.browser


@pytest.fixture
def site(tmp_path: Path) -> Path:
    """vis/ with the page beside runs/ with two reports as caption-train writes them."""
    VisWriter(tmp_path / "vis").finish([])
    for name, rate, scores in (("a", 4e-4, True), ("b", 1e-3, False)):
        report = {
            "iter": 200,
            "opt": {"learning_rate": rate, "rnn_size": 512},
            "loss_history": {str(i): 5 * math.exp(-rate * i) for i in range(200, -1, -25)},
            "val_loss_history": {"0": 5.0, "100": None, "200": 4.5 if scores else 4.0},
            "val_lang_stats_history": {"0": None, "100": {"CIDEr": 0.3, "Bleu_4": 0.1}, "200": {"CIDEr": 0.25}}
            if scores
            else {},
            "val_predictions": [],
        }
        (tmp_path / "runs" / name).mkdir(parents=True)
        (tmp_path / "runs" / name / "model_id.json").write_text(json.dumps(report))
    pace = {"learning_rate": {"0": 4e-4, "200": 1e-4}, "iterations_per_second": {"0": 0.5, "200": 3}}
    (tmp_path / "runs" / "a" / "model_id_pace.json").write_text(json.dumps(pace))
    return tmp_path


TWO_RUNS = "vis/train.html#report=../runs/a/model_id.json&report=../runs/b/model_id.json"


def test_runs_are_drawn_side_by_side(browser, serve, site):
    browser.open(serve(site).address + TWO_RUNS)
    browser.wait(lambda: len(browser.all(".chart")) == 5)
    assert browser.texts(".chart h2") == ["Loss", "CIDEr", "Bleu_4", "Learning rate", "Speed"]
    assert [len(chart.find_elements(By.CSS_SELECTOR, "path.line")) for chart in browser.all(".chart")[3:]] == [1, 1]
    assert len(browser.all(".chart:first-child path.line")) == 4
    assert browser.texts("#runs tbody th") == ["a/model_id", "b/model_id"]
    a, b = browser.all("#runs tbody tr")
    assert "loss 4.500 at 200, CIDEr 0.300 at 100" in a.text
    assert "loss 4.000 at 200" in b.text
    assert browser.texts("#options tbody tr")[0] == "learning_rate0.00040.001"
    browser.run("document.querySelectorAll('.chart svg')[3].focus()")
    browser.press(Keys.END)
    browser.wait(lambda: browser.texts(".chart:nth-child(4) .met") == ["iteration 200", "a/model_id 1.00e-4"])
    assert [one for one in browser.complaints() if "b/model_id_pace.json" not in one] == []  # there is none


def test_a_line_stands_where_its_numbers_say(browser, serve, site):
    browser.open(serve(site).address + TWO_RUNS)
    browser.wait(lambda: browser.all(".chart"))
    # CIDEr: 0.3 at iteration 100, 0.25 at 200: the first point is at the top left, the second at the bottom right.
    path = browser.all(".chart")[1].find_element(By.CSS_SELECTOR, "path.line").get_attribute("d")
    (x1, y1), (x2, y2) = (map(float, point.split()) for point in path[1:].split("L"))
    assert x1 < x2
    assert y1 < y2
    ticks = browser.run(
        "return [...document.querySelectorAll('.chart')[1].querySelectorAll('text[text-anchor=end]')]"
        ".map((text) => [Number(text.textContent), Number(text.getAttribute('y')) - 4])"
    )
    for value, y in ticks:
        assert y == pytest.approx(y1 + (0.3 - value) / 0.05 * (y2 - y1), abs=0.2)


def test_values_are_read_with_keys_and_runs_can_be_hidden(browser, serve, site):
    browser.open(serve(site).address + TWO_RUNS)
    browser.wait(lambda: browser.all(".chart svg"))
    browser.run("document.querySelector('#smooth').value = 0; document.querySelector('.chart svg').focus()")
    browser.press(Keys.HOME)
    assert browser.texts(".chart:first-child .met") == [
        "iteration 0",
        "a/model_id, training 5.000",
        "a/model_id, validation 5.000",
        "b/model_id, training 5.000",
        "b/model_id, validation 5.000",
    ]
    browser.all("#runs input")[0].click()
    assert browser.texts(".chart h2") == ["Loss"]
    assert len(browser.all("path.line")) == 2
    browser.one("#log").click()
    assert len(browser.all("path.line")) == 2


def test_reports_of_the_original_can_be_chosen(browser, serve, site, reference):
    browser.open(serve(site).address + "vis/train.html")
    browser.wait(lambda: browser.all("#notice input"))
    chooser = browser.one("#notice input")
    chooser.send_keys(f"{reference / 'train_run_report.json'}\n{site / 'runs' / 'a' / 'model_id.json'}")
    browser.wait(lambda: len(browser.all("#runs tbody tr")) == 2)
    assert browser.texts("#runs tbody th") == ["train_run_report", "model_id"]
    assert "loss 1.411 at 150" in browser.all("#runs tbody tr")[0].text


def test_runs_beside_the_page_are_listed(browser, serve, site):
    browser.open(serve(site).address + "vis/train.html")
    browser.wait(lambda: browser.all(".reports a"))
    names = [f"../runs/{name}/model_id.json" for name in "ab"]
    assert browser.texts(".reports a") == [*names, "all 2 side by side"]
    browser.all(".reports a")[2].click()
    browser.wait(lambda: browser.texts("#runs tbody th") == ["a/model_id", "b/model_id"])
    assert not browser.one("#notice").is_displayed()
    browser.open(serve(site / "vis").address + "train.html")  # a server that does not show the runs
    browser.wait(lambda: "report=../runs" in browser.one("#notice").text)


def test_wrong_reports_are_named_and_the_others_drawn(browser, serve, site):
    (site / "runs" / "list.json").write_text("[]")
    (site / "runs" / "cut.json").write_text('{"loss_history": {"0": ')
    wrong = ["../runs/list.json", "../runs/cut.json", "../runs/gone.json", "https://example.org/x.json"]
    query = "&".join(f"report={name}" for name in ["../runs/a/model_id.json", *wrong])
    browser.look(360)
    browser.open(serve(site).address + "vis/train.html#" + query)
    browser.wait(lambda: browser.all(".chart"))
    for name in wrong:
        assert name in browser.one("#notice").text
    assert browser.texts("#runs tbody th") == ["model_id"]
    assert browser.run("return document.documentElement.scrollWidth") <= 360


def test_both_pages_have_the_same_head():
    """A page that works from a disk cannot include a common part: what repeats itself must not drift apart."""
    heads = []
    for name in ("index.html", "train.html"):
        head = (Path(__file__).parents[1] / "vis" / name).read_text(encoding="utf-8").split("<body>")[0]
        head = re.sub(r"(?s)<!--.*?-->|<title>.*?</title>", "", head)
        own = re.compile(r'(src|href)="(?!page\.js|base\.css|data:)')
        heads.append([line for line in head.split("\n") if line.strip() and not own.search(line)])
    assert heads[0] == heads[1] and len(heads[0]) > 8


def test_caption_train_writes_its_curves_beside_the_report(browser, tiny_dataset, tiny_cnn, command, tmp_path):
    h5, described = tiny_dataset
    argv = ["--input_h5", h5, "--input_json", described, "--cnn_model", tiny_cnn, "--cnn_layer", "pool5"]
    argv += ["--cnn_pixels", "caffe", "--rnn_size", 8, "--input_encoding_size", 8, "--batch_size", 4, "--gpuid", -1]
    argv += ["--max_iters", 6, "--save_checkpoint_every", 3, "--losses_log_every", 1, "--num_workers", 0]
    done = command("train", *argv, "--checkpoint_path", tmp_path / "runs")
    assert done.returncode == 0, done.stderr
    assert f"curves: {tmp_path / 'runs' / 'model_id.html'} (open it by double click)" in done.stderr
    browser.open((tmp_path / "runs" / "model_id.html").as_uri())
    browser.wait(lambda: browser.all(".chart"))
    assert browser.texts("#runs tbody th") == ["model_id"]
    assert browser.texts(".chart h2")[-2:] == ["Learning rate", "Speed"]
    assert browser.texts(".chart:first-child .axis") == ["iteration", "−log p per word"]
    assert {"Loss", "Top-1 accuracy", "Top-5 accuracy"} <= set(browser.texts(".chart h2"))
    report = json.loads((tmp_path / "runs" / "model_id.json").read_text())
    pace = json.loads((tmp_path / "runs" / "model_id_pace.json").read_text())
    assert [list(history) for history in pace.values()] == [[str(i) for i in range(6)]] * 2
    assert set(pace["learning_rate"].values()) == {4e-4} and min(pace["iterations_per_second"].values()) > 0
    said = [row["caption"] for row in report["val_predictions"]]
    assert browser.texts("#captions tbody td") == said and said
    assert not browser.one("#notice").is_displayed() and not browser.one("#site").is_displayed()
    assert browser.complaints() == []
    for scheme in ("light", "dark"):
        browser.look(scheme=scheme)
        browser.run("for (const part of document.querySelectorAll('details')) part.open = true")
        assert browser.barriers() == []
