"""The policy's page in a real browser: what it plays, an own sentence, a word that nobody knows."""

from collections.abc import Iterator

import pytest

pytest.importorskip("selenium", reason="selenium is not installed")
pytest.importorskip("mujoco")
pytest.importorskip("diffusers")
from browsing import NEEDS_BROWSER, Opened, visiting
from selenium import webdriver
from selenium.webdriver.common.keys import Keys

from torchfilm.app.policy_server import create_policy_app
from torchfilm.app.serving import Running
from torchfilm.systems.diffusion_policy import load
from torchfilm.systems.diffusion_policy.policy import Policy

pytestmark = NEEDS_BROWSER
SEED = 1


class Page(Opened):
    """The open page, in the words of the tests."""

    def open(self, seed: int = SEED) -> None:
        self.browser.get(f"{self.address}/?seed={seed}")
        self.until(lambda: len(self.all(".verdict.good, .verdict.bad")) == 4 and not self.busy)

    def write(self, take: int, text: str) -> None:
        box = self.all(".take textarea")[take]
        box.clear()
        box.send_keys(text, Keys.ENTER)
        self.until(lambda: not self.busy)

    @property
    def busy(self) -> bool:
        return self.find("#form").get_attribute("aria-busy") == "true"

    def said(self, take: int) -> str:
        return self.all(".take .verdict")[take].text


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    running = Running(create_policy_app(Policy(load())), port=0)
    yield running.address
    running.stop()


@pytest.fixture
def page(browser: webdriver.Chrome, address: str) -> Iterator[Page]:
    with visiting(Page(browser, address)) as page:
        yield page


def test_the_page_opens_with_one_deed_told_four_ways(page):
    assert all("understood: push the" in page.said(take) for take in range(4))
    assert len({box.get_attribute("value") for box in page.all(".take textarea")}) == 4
    for facts in page.all(".take .facts"):
        assert " J · " in facts.text
        assert "post" in facts.text
    sites = page.all("#sites tbody tr")
    assert len(sites) > 10
    assert all(len(row.find_elements("css selector", "canvas")) == 4 for row in sites[:2])


def test_the_arm_moves_and_a_trail_follows_it(page):
    page.until(lambda: page.find("#replay").is_enabled())
    page.find("#replay").click()
    trail = page.find(".take .trail")
    early = len(trail.get_attribute("d"))
    page.until(lambda: len(trail.get_attribute("d")) > early + 50)


def test_an_own_sentence_is_played_and_understood(page):
    name = page.all(".take .looked li span")[0].text  # of the first thing
    page.write(1, f"reach the {name}")
    assert page.said(1) == f"✓ understood: reach the {name}"
    assert "push" in page.said(0)


def test_an_unknown_word_is_named_and_nothing_is_lost(page):
    before = page.said(0)
    page.write(0, "push the blu cube to the goal")
    assert "blu" in page.text("#notice")
    assert page.said(0) == before
    assert "stale" in page.all(".take")[0].get_attribute("class")


def test_strips_show_shifts_and_differences(page):
    label = "#sites canvas"
    gamma = page.find(label).get_attribute("aria-label")
    page.find('input[value="first"] + span').click()
    assert "0.00" in page.find(label).get_attribute("aria-label")
    page.find('input[value="beta"] + span').click()
    page.find('input[value="nothing"] + span').click()
    assert "beta" in page.find(label).get_attribute("aria-label")
    assert gamma != page.find(label).get_attribute("aria-label")


def test_a_new_table_is_another_one(page):
    before = page.browser.current_url
    page.find("#fresh").click()
    page.until(lambda: page.browser.current_url != before and not page.busy)
    assert all("understood" in page.said(take) for take in range(4))


def test_a_seed_that_no_table_has_gives_a_fresh_one(page):
    page.open(seed=99999999999)
    assert int(page.browser.current_url.split("seed=")[1]) < 2**32
    page.open()
