"""A real headless browser, and a page that is open in it."""

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import pytest

pytest.importorskip("selenium", reason="selenium is not installed")
from selenium import webdriver
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.by import By
from selenium.webdriver.remote.webelement import WebElement
from selenium.webdriver.support.ui import WebDriverWait

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
NEEDS_BROWSER = [
    pytest.mark.browser,
    pytest.mark.skipif(not (CHROMIUM and DRIVER), reason="Chromium or its driver is not installed"),
]

FLAGS = [
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-dev-shm-usage",
    "--window-size=1280,1000",
]
PATIENCE = 60
Page = TypeVar("Page", bound="Opened")


def launch(folder: Path) -> webdriver.Chrome:
    """A browser that keeps its files in `folder`."""
    options = webdriver.ChromeOptions()
    options.binary_location = str(CHROMIUM)
    for flag in (*FLAGS, f"--user-data-dir={folder}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    return webdriver.Chrome(options=options, service=webdriver.ChromeService(executable_path=DRIVER))


def errors(browser: webdriver.Chrome) -> list[str]:
    """What the browser complained of since the last call, but refused requests."""
    return [entry["message"] for entry in browser.get_log("browser") if "status of 4" not in entry["message"]]


@contextmanager
def visiting(page: Page) -> Iterator[Page]:
    """The page, open; at the end nothing has been complained of."""
    errors(page.browser)
    page.open()
    yield page
    assert errors(page.browser) == []


class Opened:
    """A page of `address`, in the words of tests."""

    def __init__(self, browser: webdriver.Chrome, address: str):
        self.browser, self.address = browser, address

    def open(self) -> None:
        """Open the page and wait until it has settled."""
        raise NotImplementedError

    def until(self, condition: Callable[[], object]) -> None:
        WebDriverWait(self.browser, PATIENCE, 0.05).until(lambda _: condition())

    def find(self, selector: str) -> WebElement:
        return self.browser.find_element(By.CSS_SELECTOR, selector)

    def all(self, selector: str) -> list[WebElement]:
        return self.browser.find_elements(By.CSS_SELECTOR, selector)

    def text(self, selector: str) -> str:
        return self.find(selector).text

    def press(self, *keys: str) -> None:
        ActionChains(self.browser).send_keys(*keys).perform()

    @property
    def focused(self) -> WebElement:
        return self.browser.switch_to.active_element
