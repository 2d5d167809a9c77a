"""The page in headless Chromium, and what --explain costs.

10,000 results: until the first pictures are there, the longest task of the page's thread while a reader scrolls, turns
pages and searches (Chromium's long-task entries), and its memory. A shared file of 1,000 photos: until its first
pictures are there. Captioning photos with and without --explain, with a model that attends and one that does not.
"""

import contextlib
import functools
import http.server
import math
import os
import shutil
import statistics
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from selenium import webdriver
from selenium.webdriver.chrome.service import Service

from bench.eval import make_photos
from bench.timing import interleave, ratio
from captioner import load_model
from captioner.inference.model import Model
from captioner.model.caption_model import CaptionModel
from captioner.model.checkpoint_content import Checkpoint
from captioner.model.config import ModelConfig
from captioner.output.album import write_album
from captioner.output.page import VisWriter

NUM_RESULTS = 10_000
NUM_SHARED = 1000
NUM_EXPLAINED = 32
ROUNDS = 2  # of captioning with and without --explain
SEARCHES = ("small dog", "grass 77", "zebra")
WORDS = "a small brown dog is running through the green grass".split()

# Runs before the page's own scripts: when all pictures within the window were there, and every task above 50 ms.
WATCH = """
window.tasks = [];
new PerformanceObserver((list) => tasks.push(...list.getEntries().map((e) => [e.startTime, e.duration])))
  .observe({ type: "longtask", buffered: true });
const watch = () => {
  const seen = [...document.querySelectorAll(".card img")].filter((i) => i.getBoundingClientRect().top < innerHeight);
  if (seen.length && seen.every((image) => image.complete && image.naturalWidth)) window.shownAfter = performance.now();
  else requestAnimationFrame(watch);
};
requestAnimationFrame(watch);
"""


def run() -> None:
    """Print three Markdown tables."""
    with tempfile.TemporaryDirectory() as name, _chromium() as browser:
        folder = Path(name)
        _write_results(folder / "many", NUM_RESULTS)
        _many_results(browser, folder / "many")
        shutil.rmtree(folder / "many")
        _write_results(folder / "shared", NUM_SHARED)
        _shared_file(browser, folder)
    _explaining()


def _many_results(browser: webdriver.Chrome, folder: Path) -> None:
    with _server(folder) as address:
        shown = statistics.median(_seconds_to_first_pictures(browser, address) for _ in range(3))
        first = _memory(browser)
        loading = _longest_task(browser)
        _scroll(browser)
        for _ in range(9):
            browser.execute_script("document.querySelector('.pager .next').click()")
            _scroll(browser)
        scrolling = _longest_task(browser)
        for words in SEARCHES:
            _search(browser, words)
        searching = _longest_task(browser)
        for _ in range(NUM_RESULTS // 100):
            browser.execute_script("document.querySelector('.pager .next').click()")
        last = _memory(browser)
    print(f"| {NUM_RESULTS:,} results with words and probabilities | value |\n|---|---|")
    print(f"| until the first pictures are there, s (target 2) | {shown:.2f} |")
    print(f"| longest task while loading, ms | {loading:.0f} |")
    print(f"| longest task while scrolling through 10 pages, ms (target 200) | {scrolling:.0f} |")
    print(f"| longest task while searching, a letter at a time, ms (target 200) | {searching:.0f} |")
    print(f"| memory of scripts after loading, and after all pages, MB | {first[0]:.0f}, {last[0]:.0f} |")
    print(f"| elements after loading, and after all pages | {first[1]:.0f}, {last[1]:.0f} |\n")


def _shared_file(browser: webdriver.Chrome, folder: Path) -> None:
    album = folder / "album.html"
    began = time.perf_counter()
    size = write_album(folder / "shared", album)
    written = time.perf_counter() - began
    shown = statistics.median(_seconds_to_first_pictures(browser, album.as_uri()) for _ in range(3))
    print(f"| a shared file of {NUM_SHARED:,} photos, {size / 1e6:.0f} MB | value |\n|---|---|")
    print(f"| writing it, s | {written:.1f} |")
    print(f"| until the first pictures are there, s (target 3) | {shown:.2f} |\n")


def _explaining() -> None:
    attending = load_model(device="cpu", precision="fp32")
    models = {"attends (target 1.2)": attending, "LSTM with fc7, random weights (target 3)": _lstm_like(attending)}
    print(f"| {NUM_EXPLAINED} photos, fp32 | with --explain, times without |\n|---|---|")
    with tempfile.TemporaryDirectory() as name:
        make_photos(Path(name))
        photos = sorted(Path(name).iterdir())[:NUM_EXPLAINED]
        for label, model in models.items():

            def caption(explain: bool, model: Model = model) -> None:
                model.caption(photos, explain=explain, batch_size=8, num_workers=1)

            seconds = interleave({"plain": lambda: caption(False), "explained": lambda: caption(True)}, ROUNDS)
            print(f"| {label} | {ratio(seconds['explained'], seconds['plain'])} |", flush=True)


def _lstm_like(model: Model) -> Model:
    """The original's kind of model at its size. It never ends a caption early: more words to explain than usual."""
    torch.manual_seed(0)
    config = ModelConfig(vocab_size=model.vocab.size, encoding_size=512, rnn_size=512, cnn_layer="fc7")
    return Model([Checkpoint(config, model.vocab, CaptionModel(config).state_dict())], torch.device("cpu"), "fp32")


def _write_results(folder: Path, count: int) -> None:
    """As caption-eval --n_best 2 leaves them; the pictures are the example photos, each under many names."""
    writer = VisWriter(folder)
    photos = sorted((Path(__file__).parents[1] / "examples").glob("*.jpg"))
    pictures = writer.add_pictures(list(enumerate(photos)))
    rows: list[dict[str, Any]] = []
    for number in range(count):
        picture, name = pictures[number % len(pictures)], f"imgs/img{number}.jpg"
        if number >= len(pictures):
            os.link(folder / picture["image"], folder / name)
        caption = _caption(number)
        rows.append({"image_id": number, **caption, "file_name": f"photo {number}.jpg", **picture, "image": name})
        rows[-1]["n_best"] = [caption, _caption(number + 1)]
    writer.finish(rows)


def _caption(number: int) -> dict[str, Any]:
    words = [{"word": word, "logprob": -((number + place) * 7919 % 100) / 40} for place, word in enumerate(WORDS)]
    words.append({"word": str(number), "logprob": -0.1})
    logprob = sum(float(word["logprob"]) for word in words)
    text = " ".join(str(word["word"]) for word in words)
    return {"caption": text, "logprob": logprob, "confidence": math.exp(logprob / len(words)), "words": words}


@contextlib.contextmanager
def _chromium() -> Iterator[webdriver.Chrome]:
    program, driver = shutil.which("chromium"), shutil.which("chromedriver")
    assert program and driver, "install Debian's chromium and chromium-driver"
    options = webdriver.ChromeOptions()
    options.binary_location = program
    # Containers run as root and have little shared memory.
    for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--window-size=1280,800"):
        options.add_argument(argument)
    browser = webdriver.Chrome(options=options, service=Service(driver))
    browser.set_script_timeout(120)
    browser.execute_cdp_cmd("Page.enable", {})
    browser.execute_cdp_cmd("Page.addScriptToEvaluateOnNewDocument", {"source": WATCH})
    try:
        yield browser
    finally:
        browser.quit()


@contextlib.contextmanager
def _server(folder: Path) -> Iterator[str]:
    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(folder)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/"
    finally:
        server.shutdown()
        server.server_close()


def _seconds_to_first_pictures(browser: webdriver.Chrome, address: str) -> float:
    browser.get("about:blank")
    browser.execute_cdp_cmd("Network.clearBrowserCache", {})
    browser.get(address)
    while (after := browser.execute_script("return window.shownAfter ?? null")) is None:
        time.sleep(0.05)
    return after / 1000


def _longest_task(browser: webdriver.Chrome) -> float:
    """Milliseconds of the longest task since the last call; what takes less than 50 is not reported, and is 0 here."""
    _frames(browser, 4)
    return browser.execute_script("const all = tasks.splice(0); return Math.max(0, ...all.map((task) => task[1]))")


def _frames(browser: webdriver.Chrome, count: int) -> None:
    browser.execute_async_script(
        "let left = arguments[0]; const done = arguments[1];"
        "const next = () => (left-- > 0 ? requestAnimationFrame(next) : done()); next()",
        count,
    )


def _scroll(browser: webdriver.Chrome) -> None:
    """From the top of the page to its end, 200 pixels a frame."""
    browser.execute_async_script(
        "const done = arguments[0]; scrollTo(0, 0);"
        "const next = () => {"
        "  const before = scrollY; scrollBy({ top: 200, behavior: 'instant' });"
        "  if (scrollY > before) requestAnimationFrame(next); else done();"
        "}; requestAnimationFrame(next)"
    )


def _search(browser: webdriver.Chrome, words: str) -> None:
    browser.execute_script("const field = document.getElementById('search'); field.focus(); field.select()")
    browser.execute_cdp_cmd("Input.dispatchKeyEvent", {"type": "keyDown", "key": "Delete", "windowsVirtualKeyCode": 46})
    for letter in words:
        browser.execute_cdp_cmd("Input.dispatchKeyEvent", {"type": "keyDown", "text": letter})
        _frames(browser, 2)


def _memory(browser: webdriver.Chrome) -> tuple[float, float]:
    """MB of the page's scripts and their data, and the number of elements, after a garbage collection."""
    browser.execute_cdp_cmd("HeapProfiler.collectGarbage", {})
    browser.execute_cdp_cmd("Performance.enable", {})
    metrics = browser.execute_cdp_cmd("Performance.getMetrics", {})["metrics"]
    found = {metric["name"]: metric["value"] for metric in metrics}
    return found["JSHeapUsedSize"] / 1e6, found["Nodes"]
