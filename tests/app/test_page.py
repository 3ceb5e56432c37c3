"""The page in a real browser: ask, turn a dial, see the answer change; with mouse or keyboard alone."""

import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from torchfilm.app.scenes import RenderedScenes
from torchfilm.app.server import create_app
from torchfilm.app.serving import Running
from torchfilm.systems.visual_reasoning.answering import Answerer

pytest.importorskip("selenium", reason="selenium is not installed")
from browsing import NEEDS_BROWSER, Opened, visiting
from selenium import webdriver
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys

pytestmark = NEEDS_BROWSER

SEED, OTHER_SEED = 7, 8
QUESTION = "How many red cubes are there?"


class Page(Opened):
    """The open page, in the words of the tests."""

    def open(self, seed: int = SEED) -> None:
        """Open the page on a scene and wait for its first answer."""
        self.browser.get(f"{self.address}/?seed={seed}")
        self.until(lambda: self.verdict != "…" and not self.busy)

    def ask(self, question: str) -> None:
        box = self.find("#question")
        box.clear()
        box.send_keys(question, Keys.ENTER)
        self.until(lambda: not self.busy)

    @property
    def verdict(self) -> str:
        return self.text("#verdict")

    @property
    def busy(self) -> bool:
        return any(self.find(part).get_attribute("aria-busy") == "true" for part in ("#picture", "#answer"))

    @property
    def answer(self) -> str:
        """Everything that the page says about the answer."""
        return self.text("#answer")


@pytest.fixture(scope="module")
def address(answerer: Answerer, scenes: RenderedScenes) -> Iterator[str]:
    running = Running(create_app(answerer, scenes), port=0)
    yield running.address
    running.stop()


@pytest.fixture
def page(browser: webdriver.Chrome, address: str) -> Iterator[Page]:
    with visiting(Page(browser, address)) as page:
        yield page


@pytest.fixture(scope="module")
def small(scenes: RenderedScenes) -> np.ndarray:
    return scenes.make(SEED).small


def test_the_page_opens_with_a_scene_a_question_and_its_answer(page, answerer, small):
    question = page.find("#question").get_attribute("value")
    assert question in [button.text for button in page.all("#examples button")]
    assert page.find("#examples [aria-current=true]").text == question
    assert page.verdict == answerer.answer(small, question).answer
    assert page.browser.execute_script("return document.getElementById('image').naturalWidth") == 480
    assert re.search("✓ right|✗ truth: ", page.text("#truth"))
    assert page.browser.execute_script("return document.getElementById('question').labels.length") == 1


def test_an_asked_question_gets_the_networks_answer_and_probabilities(page, answerer, small):
    page.ask("what color is the large sphere")
    expected = answerer.answer(small, "What color is the large sphere?")
    assert page.verdict == expected.answer
    assert page.text("#truth") == ""
    rows = [row.text.split("\n") for row in page.all("#bars li")]
    assert [row[0] for row in rows] == [answer for answer, _ in expected.probabilities]
    for row, (_, probability) in zip(rows, expected.probabilities, strict=True):
        assert float(row[1].strip("<> %")) == pytest.approx(100 * probability, abs=0.11)
    assert expected.answer in page.find("#live").get_attribute("textContent")


def test_an_example_is_asked_by_a_click(page, answerer, small):
    button = page.all("#examples button")[-1]
    question = button.text
    button.click()
    page.until(lambda: button.get_attribute("aria-current") == "true")
    page.until(lambda: page.verdict == answerer.answer(small, question).answer)
    assert page.find("#question").get_attribute("value") == question


def test_a_dragged_bar_changes_the_answer_and_reset_brings_it_back(page, answerer, small):
    page.ask(QUESTION)
    original = answerer.answer(small, QUESTION)
    before = page.answer
    bar = page.all(".chart")[1].find_elements(By.CSS_SELECTOR, "[data-channel]")[3]
    was = float(bar.get_attribute("aria-valuenow"))
    ActionChains(page.browser).click_and_hold(bar).move_by_offset(0, -30).release().perform()
    page.until(lambda: page.answer != before and page.text("#turned") == "1 of 32 numbers turned")
    value = float(bar.get_attribute("aria-valuenow"))
    assert value > was + 0.5
    turned = answerer.answer(small, QUESTION, edits={"block2": {"gamma": {3: value}}})
    page.until(lambda: abs(float(page.text("#sure").strip("<> %")) - 100 * turned.probability) < 1)
    assert f"without your turning: {original.answer}" in page.text("#change")
    page.find("#reset-all").click()
    page.until(lambda: page.answer == before)


def test_a_muted_network_gives_every_question_the_same_answer(page):
    answers = set()
    for question in (QUESTION, "What color is the large sphere?"):
        page.ask(question)
        page.find("#mute-all").click()
        page.until(lambda: "without your turning" in page.text("#change"))
        assert {bar.get_attribute("aria-valuenow") for bar in page.all("[data-channel]")} == {"1.00"}
        assert "does not hear the question" in page.text(".block .state")
        answers.add(page.text("#bars"))
        page.find("#reset-all").click()
        page.until(lambda: "on its own" in page.text("#change"))
    assert len(answers) == 1


def test_the_dials_of_a_whole_block_move_all_its_bars(page, answerer, small):
    page.ask(QUESTION)
    gamma = answerer.answer(small, QUESTION).modulations["block1"]["gamma"]
    page.find(".block .strength").send_keys(Keys.HOME)
    page.until(lambda: page.text("#turned") == "8 of 32 numbers turned")
    page.find(".block .strength").send_keys(*[Keys.ARROW_RIGHT] * 10)
    page.until(lambda: page.text(".block .knobs output") == "×0.50")
    shown = [
        float(bar.get_attribute("aria-valuenow")) for bar in page.find(".chart").find_elements(By.XPATH, "*")
    ]
    assert shown == pytest.approx([1 + 0.5 * (value - 1) for value in gamma], abs=0.0051)
    page.find(".block .shift").send_keys(Keys.END)
    page.until(lambda: page.text("#turned") == "16 of 32 numbers turned")
    page.find(".tabs label:last-child").click()
    beta = answerer.answer(small, QUESTION).modulations["block1"]["beta"]
    shown = [
        float(bar.get_attribute("aria-valuenow")) for bar in page.find(".chart").find_elements(By.XPATH, "*")
    ]
    assert shown == pytest.approx([value + 2 for value in beta], abs=0.0051)


def test_everything_can_be_done_with_the_keyboard_alone(page):
    def tab_to(selector: str) -> None:
        for _ in range(40):
            if page.focused in page.all(selector):
                return
            page.press(Keys.TAB)
        pytest.fail(f"{selector} is not reached by Tab")

    tab_to("#question")
    page.focused.send_keys(Keys.CONTROL, "a")
    page.press(QUESTION, Keys.ENTER)
    page.until(lambda: page.text("#truth") == "" and not page.all("#examples [aria-current=true]"))
    before = page.answer
    tab_to(".chart [data-channel]")
    page.press(Keys.ARROW_RIGHT, Keys.ARROW_RIGHT, *[Keys.ARROW_UP] * 12)
    assert page.focused.get_attribute("aria-label") == "Block 1, γ of channel 2"
    assert "channel 2: γ = " in page.text(".block .state")
    page.until(lambda: page.text("#turned") == "1 of 32 numbers turned" and page.answer != before)
    page.press(Keys.DELETE)
    page.until(lambda: page.answer == before)
    tab_to(".block .mute")
    page.press(Keys.SPACE)
    page.until(lambda: page.answer != before)
    tab_to(".block .reset")
    page.press(Keys.ENTER)
    page.until(lambda: page.answer == before)


def test_a_new_scene_brings_another_picture_and_other_questions(page):
    picture = page.find("#image").get_attribute("src")
    questions = page.text("#examples")
    page.find("#fresh").click()
    page.until(lambda: page.find("#image").get_attribute("src") != picture and not page.busy)
    page.until(lambda: page.text("#examples") != questions)
    assert "seed=" in page.browser.current_url


@pytest.mark.parametrize("seed", [99999999999, "x"])
def test_a_seed_that_no_scene_has_gives_a_fresh_one(page, seed):
    page.open(seed)
    page.until(lambda: page.answer)
    assert int(page.browser.current_url.split("seed=")[1]) < 2**32


def test_the_facts_of_the_scene_are_shown_on_request(page, scenes):
    page.find("#facts summary").click()
    page.until(lambda: page.all("#facts li"))
    expected = ["{size} {color} {material} {shape}".format(**fact) for fact in scenes.make(SEED).facts]
    assert [item.text for item in page.all("#facts li")] == expected


def test_an_uploaded_picture_is_shown_and_asked_about(page, answerer, scenes, tmp_path: Path):
    other = scenes.make(OTHER_SEED).display
    Image.fromarray(other).save(tmp_path / "mine.png")
    page.ask(QUESTION)
    page.find("#file").send_keys(str(tmp_path / "mine.png"))
    page.until(lambda: "mine.png" in page.find("#image").get_attribute("alt") and not page.busy)
    expected = answerer.answer(other, QUESTION)
    page.until(lambda: page.verdict == expected.answer)
    assert not page.find("#try").is_displayed()


def test_an_upload_that_is_no_picture_is_refused_and_the_old_one_stays(page, tmp_path: Path):
    picture = page.find("#image").get_attribute("src")
    (tmp_path / "letter.png").write_text("Dear network,")
    page.find("#file").send_keys(str(tmp_path / "letter.png"))
    page.until(lambda: "no image: expected a PNG or JPEG file" in page.text("#notice"))
    assert page.find("#image").get_attribute("src") == picture


def test_where_it_looked_is_laid_over_the_picture(page, answerer, small):
    page.ask(QUESTION)
    assert not page.find("#heat").is_displayed()
    page.find("#look").click()
    page.until(lambda: page.find("#heat").is_displayed())
    counts = np.array(answerer.answer(small, QUESTION).looked)
    script = "return [...arguments[0].getContext('2d').getImageData(0, 0, arguments[1], arguments[2]).data]"
    height, width = counts.shape
    assert page.find("#heat").get_property("width") == width
    veil = np.array(page.browser.execute_script(script, page.find("#heat"), width, height))[3::4]
    assert veil.argmin() == counts.argmax()
    assert (veil[counts.ravel() == 0] == veil.max()).all()


def test_an_unknown_word_is_named_and_a_known_one_put_in_by_a_click(page):
    page.ask("How many red cubse are there?")
    page.until(lambda: "does not know the word “cubse”" in page.text("#notice"))
    suggestions = page.all("#notice button")
    assert len(suggestions) == 3
    next(button for button in suggestions if button.text == "cubes").click()
    page.until(
        lambda: page.find("#question").get_attribute("value") == QUESTION and page.text("#notice") == ""
    )


def test_nothing_comes_from_another_place(page):
    script = "return performance.getEntriesByType('resource').map(entry => entry.name)"
    loaded = page.browser.execute_script(script)
    assert len(loaded) >= 4
    assert [name for name in loaded if not name.startswith((page.address, "data:"))] == []


def test_the_page_fits_a_phone(page):
    size = {"width": 360, "height": 740, "deviceScaleFactor": 1, "mobile": True}
    page.browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    try:
        page.open()
        assert page.browser.execute_script("return document.documentElement.scrollWidth") <= 360
        assert page.find("#strip").is_displayed()
        assert page.text("#strip").startswith(page.verdict)
    finally:
        page.browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
