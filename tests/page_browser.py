"""Headless Chromium and a web server, for the tests that look at pages."""

import functools
import http.server
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from page_rows import ABOUT, EXAMPLES, described
from selenium import webdriver
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By
from selenium.webdriver.remote.webelement import WebElement
from selenium.webdriver.support.ui import WebDriverWait

from captioner.output.page import VisWriter

TESTS = Path(__file__).parent


class Browser:
    """One Chromium for all tests, and what they ask of it."""

    def __init__(self, driver: webdriver.Chrome) -> None:
        self.driver = driver

    def open(self, address: str) -> None:
        self.driver.get("about:blank")  # an address that differs in its fragment only would not be loaded anew
        self.driver.get_log("browser")
        self.driver.get(address)

    def all(self, selector: str) -> list[WebElement]:
        return self.driver.find_elements(By.CSS_SELECTOR, selector)

    def one(self, selector: str) -> WebElement:
        return self.driver.find_element(By.CSS_SELECTOR, selector)

    def texts(self, selector: str) -> list[str]:
        return self.driver.execute_script(
            "return [...document.querySelectorAll(arguments[0])].map((element) => element.textContent)", selector
        )

    def wait(self, condition: Callable[[], Any]) -> Any:
        return WebDriverWait(self.driver, 30, poll_frequency=0.02).until(lambda _: condition())

    def run(self, script: str) -> Any:
        return self.driver.execute_script(script)

    def press(self, *keys: str) -> None:
        webdriver.ActionChains(self.driver).send_keys(*keys).perform()

    def look(self, width: int = 1300, height: int = 800, scheme: str = "light") -> None:
        """Set the size of the view and the colour scheme of the reader."""
        metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})

    def barriers(self) -> list[str]:
        """What axe-core (WCAG 2.2 A and AA, and good practice) finds on the page as it is now."""
        self.driver.execute_script((TESTS / "data" / "axe" / "axe.min.js").read_text(encoding="utf-8"))
        found = self.driver.execute_async_script(
            "const done = arguments[0];"
            "axe.run(document, { runOnly: ['wcag2a', 'wcag2aa', 'wcag21a', 'wcag21aa', 'wcag22aa', 'best-practice'] })"
            ".then((results) => done(results.violations), (error) => done([{ id: String(error), nodes: [] }]))"
        )
        return [f"{one['id']}: {[node['html'][:150] for node in one['nodes'][:3]]}" for one in found]

    def complaints(self) -> list[str]:
        """What the page left on the browser's console: errors, and what its content policy stopped."""
        return [entry["message"] for entry in self.driver.get_log("browser")]


@pytest.fixture(scope="session")
def chromium() -> Iterator[Browser]:
    program, driver_program = shutil.which("chromium"), shutil.which("chromedriver")
    assert program and driver_program, "install Debian's chromium and chromium-driver (scripts/test does)"
    options = webdriver.ChromeOptions()
    options.binary_location = program
    # Containers run as root and have little shared memory.
    for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(driver_program))
    yield Browser(driver)
    driver.quit()


@pytest.fixture
def browser(chromium: Browser) -> Browser:
    chromium.look()
    return chromium


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three photos as caption-eval leaves them: with words, alternatives and scores."""
    writer = VisWriter(tmp_path / "vis")
    captions = [("a cat sits", 0.9, 0.5, 0.8), ("a red cup", 0.9, 0.03, 0.1), ("two dogs play", 0.99, 0.99, 0.99)]
    rows = []
    for number, (photo, caption) in enumerate(zip(EXAMPLES[3:6], captions, strict=True), start=1):
        best, other = described(*caption), described("something else", 0.2, 0.2)
        (added,) = writer.add_pictures([(number, photo)])
        rows.append({"image_id": number, **best, "file_name": f"{number}.jpg", **added, "n_best": [best, other]})
    writer.finish(rows, {"Bleu_1": 0.61, "CIDEr": 0.5}, ABOUT)
    return writer.folder


class Server(http.server.ThreadingHTTPServer):
    """`python -m http.server`, with a list of what was asked for."""

    def __init__(self, folder: Path) -> None:
        self.requests: list[str] = []
        super().__init__(("127.0.0.1", 0), functools.partial(_Handler, directory=str(folder)))
        self.address = f"http://127.0.0.1:{self.server_port}/"


class _Handler(http.server.SimpleHTTPRequestHandler):
    server: Server

    def log_request(self, *_: object) -> None:
        self.server.requests.append(self.path)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def serve() -> Iterator[Callable[[Path], Server]]:
    servers = []

    def start(folder: Path) -> Server:
        servers.append(Server(folder))
        threading.Thread(target=servers[-1].serve_forever, daemon=True).start()
        return servers[-1]

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()
