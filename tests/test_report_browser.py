"""report.html in a real headless Chromium: 1,319 questions of four runs, one written to break the page."""

import json
import re
import shutil

import made_runs
import pytest

from posttrain.evaluation import comparison
from posttrain.records import Prediction, read_jsonl, read_rows
from posttrain.report import write_report

webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed: pip install -e .[dev]")
from selenium.webdriver.chrome.service import Service  # noqa: E402
from selenium.webdriver.common.by import By  # noqa: E402
from selenium.webdriver.common.keys import Keys  # noqa: E402

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
DRIVER = shutil.which("chromedriver")
pytestmark = pytest.mark.skipif(not (CHROMIUM and DRIVER), reason="no Chromium here: apt-get install chromium chromium-driver")

HOSTILE = 3  # index of the question whose last completion tries to break out
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    return made_runs.make_runs(tmp_path_factory.mktemp("runs"), hostile=HOSTILE)


@pytest.fixture(scope="module")
def predictions(runs):
    """[run][question], of the runs base, sft, sft-long and grpo."""
    return [read_jsonl(folder / "predictions.jsonl", Prediction) for folder in runs]


@pytest.fixture(scope="module")
def questions(runs):
    return [*read_rows(runs[0] / "questions.jsonl")]


@pytest.fixture(scope="module")
def url(runs, tmp_path_factory):
    return write_report(runs, tmp_path_factory.mktemp("report")).as_uri()


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY", "all_proxy", "ALL_PROXY"):
            patch.delenv(name, raising=False)  # the driver is on loopback
        options = webdriver.ChromeOptions()
        options.binary_location = CHROMIUM
        for flag in (*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('profile')}"):
            options.add_argument(flag)
        options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
        with webdriver.Chrome(options=options, service=Service(DRIVER)) as driver:
            yield driver


class Page:
    """The report as a reader meets it: what is shown, what can be pressed."""

    def __init__(self, driver):
        self.driver = driver

    def js(self, code, *args):
        return self.driver.execute_script(code, *args)

    def find(self, selector):
        return self.driver.find_elements(By.CSS_SELECTOR, selector)

    def press(self, *keys):
        self.driver.switch_to.active_element.send_keys(*keys)

    def chip(self, label):
        return next(chip for chip in self.find(".chip") if self.words(chip).split(" ")[0:-1] == label.split(" "))

    def click(self, label):
        self.js("arguments[0].click()", self.chip(label))

    def words(self, chip):
        return self.js("return arguments[0].firstChild.textContent + ' ' + arguments[0].lastChild.textContent", chip)

    def number_on(self, label):
        return int(self.words(self.chip(label)).split(" ")[-1].replace(",", ""))

    @property
    def count(self):
        return int(self.js("return document.getElementById('count').textContent").split(" ")[0].replace(",", ""))

    @property
    def shown(self):
        """Ids in the list's drawn part, from the top."""
        return self.js("return [...document.querySelectorAll('.row .id')].map((node) => node.textContent)")

    @property
    def open(self):
        return self.js("return document.querySelector('.detail .where').textContent.split(' · ')[0]")

    def search(self, text):
        box = self.find("#search")[0]
        self.js("arguments[0].value = ''; arguments[0].dispatchEvent(new Event('input'))", box)
        box.send_keys(text)

    def size(self, width, height=900):
        mobile = width < 700
        metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": mobile}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)

    def prefers(self, scheme):
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})


@pytest.fixture
def page(browser, url):
    page = Page(browser)
    page.size(1400)
    page.prefers("light")
    browser.get("about:blank")
    for log in ("browser", "performance"):
        browser.get_log(log)  # what earlier pages said
    browser.get(url)
    page.js("localStorage.clear(); document.documentElement.dataset.theme = ''")
    yield page
    assert browser.get_log("browser") == []  # no error, no blocked resource, in any test


def test_opens_from_disk_and_asks_the_network_for_nothing(page, url):
    page.search("marbles")
    page.click("Wrong")
    asked = []
    for entry in page.driver.get_log("performance"):
        message = json.loads(entry["message"])["message"]
        if message["method"] == "Network.requestWillBeSent":
            asked.append(message["params"]["request"]["url"])
    assert asked == [url]
    assert page.js("return performance.getEntriesByType('resource').length") == 0
    assert page.find("#questions")[0].is_displayed() and len(page.find(".row")) > 5


def test_the_page_forbids_itself_the_network(page):
    code = "fetch('http://127.0.0.1:9/').then(() => arguments[0]('sent'), () => arguments[0]('refused'))"
    said = page.driver.execute_async_script(code)
    blocked = page.driver.get_log("browser")
    assert said == "refused" and any("Content Security Policy" in entry["message"] for entry in blocked)


def test_filters_count_what_the_paired_test_counts(page, runs, questions, predictions):
    last, before = predictions[3], predictions[2]
    result = comparison.compare(questions, before, questions, last)
    expected = {
        "All": 1319,
        "Wrong": sum(not p.correct for p in last),
        "Right": sum(p.correct for p in last),
        "Fixed": result["only_second"],
        "Broken": result["only_first"],
        "Cut off": sum(p.finish == "length" for p in last),
        "Several markers": sum(p.num_markers > 1 for p in last),
    }
    for label, number in expected.items():
        assert page.number_on(label) == number > 0
        page.click(label)
        assert page.count == number, label
        if label in ("Cut off", "Several markers"):
            page.click(label)
        else:
            page.click("All")
    page.click("Broken")
    broken = [a.id for a, b in zip(before, last, strict=True) if a.correct and not b.correct]
    assert page.shown == broken[: len(page.shown)]


def test_filters_combine_and_step_bins_add_up(page, questions, predictions):
    steps = {"2": 0, "3": 0, "7+": 0}
    for question, p in zip(questions, predictions[3], strict=True):
        key = str(question["num_steps"]) if question["num_steps"] < 7 else "7+"
        if key in steps:
            steps[key] += not p.correct
    page.click("Wrong")
    page.click("2")
    assert page.count == steps["2"]
    page.click("7+")
    assert page.count == steps["2"] + steps["7+"]
    page.click("2")
    assert page.count == steps["7+"]


def test_another_pair_of_runs_changes_fixed_and_broken(page, predictions):
    choose = "const s = document.getElementById(arguments[0]); s.value = arguments[1];"
    choose += "s.dispatchEvent(new Event('change'))"
    page.js(choose, "run", "1")
    page.js(choose, "against", "0")
    pairs = list(zip(predictions[0], predictions[1], strict=True))
    assert page.number_on("Fixed") == sum(b.correct and not a.correct for a, b in pairs)
    assert page.number_on("Wrong") == sum(not b.correct for _, b in pairs)


def test_search_finds_text_of_questions_and_completions(page, questions, predictions):
    needle = "gives 19 marbles"
    hits = [q["id"] for q in questions if needle in q["question"]]
    page.search(needle.upper())
    assert page.count == len(hits) > 0 and page.shown == hits[: len(page.shown)]
    assert {mark.text for mark in page.find(".question mark.hit")} == {needle}
    looping = {p.id for run in predictions for p in run if "So there are 40 of them" in p.completion}
    page.search("So there are 40 of them")
    assert page.count == len(looping) > 0
    page.search("are 2*")  # text, not a pattern
    assert {mark.text for mark in page.find(".card mark.hit")} == {"are 2*"}
    page.search("(.*")
    assert page.count == 0 and "Nothing matches" in page.find(".list")[0].text
    page.search("")
    assert page.count == 1319


def test_hostile_completion_is_shown_as_text(page, questions):
    page.search("window.pwned")
    assert page.count == 1 and page.open == questions[HOSTILE]["id"]
    shown = page.js("return [...document.querySelectorAll('.card .text')].at(-1).textContent")
    assert shown == made_runs.HOSTILE
    assert page.js("return document.querySelector('.detail .question').textContent") == questions[HOSTILE]["question"]
    assert page.js("return typeof window.pwned") == "undefined"
    page.search('<img src=x onerror="window.pwned = 2">')  # now within a mark of its own
    assert page.count == 1 and len(page.find(".card mark.hit")) == 1
    assert page.js("return document.querySelectorAll('img, .question *:not(mark), .row b').length") == 0
    marked = page.js("return [...document.querySelectorAll('.card:last-child mark.answer')].map((m) => m.textContent)")
    assert marked == ["1,234"]  # behind an emoji that counts twice in a browser
    badges = page.find(".card:last-child .badges")[0].text
    assert "wrong" in badges and "2 markers" in badges


def test_answers_are_highlighted_in_the_colour_of_their_verdict(page, predictions):
    for index in range(12):
        for run, card in enumerate(page.find(".card")):
            p = predictions[run][index]
            marks = page.js(
                "return [...arguments[0].querySelectorAll('mark.answer')].map((mark) => [mark.textContent, mark.className])",
                card,
            )
            if p.value is not None:
                assert [text.replace(",", "") for text, _ in marks] == [p.value]
                assert marks[0][1].endswith("right" if p.correct else "wrong")
        page.press("j")


def test_keyboard(page, questions):
    page.press("j")
    assert page.open == questions[1]["id"]
    page.press(Keys.ARROW_DOWN, Keys.ARROW_DOWN, "k")
    assert page.open == questions[2]["id"]
    page.press("/")
    assert page.js("return document.activeElement.id") == "search"
    page.press("jk/")  # letters, now
    assert page.js("return document.getElementById('search').value") == "jk/" and page.count == 0
    page.press(Keys.ESCAPE)
    assert page.count == 1319 and page.js("return document.getElementById('search').value") == ""
    page.press("noah")
    page.press(Keys.ENTER, Keys.END)
    assert page.js("return document.activeElement.id") == "list"
    last = [q["id"] for q in questions if "noah" in q["question"].lower()][-1]
    assert page.open == last and last in page.shown
    page.press(Keys.HOME)
    assert page.open == next(q["id"] for q in questions if "noah" in q["question"].lower())


def test_the_address_remembers_the_question(page, url, questions):
    page.driver.get(f"{url}#{questions[700]['id'].replace('/', '%2F')}")
    page.driver.refresh()
    assert page.open == questions[700]["id"] and questions[700]["id"] in page.shown


TIMED = """
const act = new Function(arguments[0]), done = arguments[1], start = performance.now();
act();
document.body.offsetHeight;
requestAnimationFrame(() => setTimeout(() => done(performance.now() - start)));
"""


@pytest.mark.parametrize(
    "action",
    [
        "[...document.querySelectorAll('.chip')].find((c) => c.textContent.startsWith('Broken')).click()",
        "[...document.querySelectorAll('.chip')].find((c) => c.textContent.startsWith('Wrong')).click()",
        "const s = document.getElementById('search'); s.value = 'apple'; s.dispatchEvent(new Event('input'))",
        "document.getElementById('list').scrollTop = 50000",
    ],
)
def test_no_lag_and_few_nodes(page, action):
    idle = page.driver.execute_async_script(TIMED, "")  # what a frame takes on this machine, as busy as it is
    milliseconds = page.driver.execute_async_script(TIMED, action)
    assert milliseconds < 200 + 10 * idle
    assert 5 < len(page.find(".row")) < 60  # drawn as needed, however long the list


def test_scrolling_draws_the_rows_that_are_seen(page, questions):
    scroll = """
    const list = document.getElementById('list'), done = arguments[0];
    list.scrollIntoView();
    list.scrollTop = 66 * 1000;
    setTimeout(() => {
      const box = list.getBoundingClientRect();
      const row = document.elementFromPoint(box.left + 60, box.top + 20).closest('.row');
      done(row.querySelector('.id').textContent);
    }, 100);
    """
    assert page.driver.execute_async_script(scroll) == questions[1000]["id"]
    assert questions[0]["id"] not in page.shown


def luminance(rgb):
    channels = [c / 255 for c in rgb]
    linear = [c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(page, selector):
    """WCAG contrast of an element's text with what is behind it."""
    colors = page.js(
        """
        let node = document.querySelector(arguments[0]), front = getComputedStyle(node).color, back;
        do { back = getComputedStyle(node).backgroundColor; node = node.parentElement; }
        while (node && back === 'rgba(0, 0, 0, 0)');
        return [front, back];
        """,
        selector,
    )
    light, dark = sorted((luminance([float(v) for v in re.findall(r"[\d.]+", color)[:3]]) for color in colors), reverse=True)
    return (light + 0.05) / (dark + 0.05)


READ = (
    *(
        "body",
        ".chain",
        ".verdict",
        "th",
        "td small",
        ".notes",
        ".key",
        ".chip",
        ".chip span",
        ".count",
        "footer",
    ),
    *(".row .q", ".row .meta", ".row[aria-selected=true] .meta", ".dot.right", ".dot.wrong"),
    *(".badge", ".badge.right", ".badge.wrong", "mark.answer", ".text"),
)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_both_themes_can_be_read(page, scheme):
    page.prefers(scheme)
    background = page.js("return getComputedStyle(document.body).backgroundColor")
    is_dark = luminance([float(v) for v in re.findall(r"[\d.]+", background)[:3]]) < 0.2
    assert is_dark == (scheme == "dark")
    found = {selector: round(contrast(page, selector), 2) for selector in READ}
    assert {selector: ratio for selector, ratio in found.items() if ratio < 4.5} == {}


def test_theme_button_turns_and_remembers(page, url):
    dark = "return getComputedStyle(document.documentElement).colorScheme"
    page.find("#theme")[0].click()
    assert page.js(dark) == "dark"
    page.driver.get(url)
    assert page.js(dark) == "dark"
    page.find("#theme")[0].click()
    assert page.js(dark) == "light"


@pytest.mark.parametrize("width", [360, 420, 768, 1400])
def test_nothing_sticks_out(page, width):
    page.size(width)
    assert page.js("return document.documentElement.scrollWidth <= innerWidth")
    widths = "return [...document.querySelectorAll('figure svg')].map((s) => s.getBoundingClientRect().width)"
    assert min(page.js(widths)) > 200


def test_narrow_screen_opens_a_question_over_the_list(page, questions):
    page.size(420)
    detail = page.find("#detail")[0]
    assert not detail.is_displayed()
    page.js("document.querySelectorAll('.row')[2].click()")
    box = page.js(
        "const b = arguments[0].getBoundingClientRect(); return [b.width, b.height, innerWidth, innerHeight]",
        detail,
    )
    assert detail.is_displayed() and box[:2] == box[2:]
    assert page.open == questions[2]["id"]
    page.find(".detail [title^=Next]")[0].click()
    assert page.open == questions[3]["id"] and detail.is_displayed()
    page.find(".detail .back")[0].click()
    assert not detail.is_displayed() and page.js("return document.activeElement.id") == "list"
    page.press("j", Keys.ENTER)
    assert detail.is_displayed()
    page.press(Keys.ESCAPE)
    assert not detail.is_displayed()


def test_curves_tell_their_values_under_the_pointer(page):
    figure = next(f for f in page.find("figure[data-curve]") if "Rewards" in f.text)
    page.js(
        "const svg = arguments[0].querySelector('svg'), box = svg.getBoundingClientRect();"
        "const at = {clientX: box.right - 10, clientY: box.top + 30, bubbles: true};"
        "svg.dispatchEvent(new PointerEvent('pointermove', at))",
        figure,
    )
    tip = figure.find_element(By.CSS_SELECTOR, ".tip")
    assert tip.is_displayed() and re.search(r"step 2\d\d|step 300", tip.text)
    assert all(label in tip.text for label in ("total: 0.", "correctness: 0.", "format: 0."))


def test_samples_can_be_turned_over(browser, tmp_path):
    folders = made_runs.make_runs(tmp_path / "runs", num_questions=30, num_samples=3, limit=30, training=False)
    browser.get(write_report(folders, tmp_path / "out").as_uri())
    page, rows = Page(browser), read_jsonl(folders[3] / "predictions.jsonl", Prediction)
    last = "return [...document.querySelectorAll('.card .text')].at(-1).textContent"
    page.js("document.getElementById('list').focus()")
    for sample in (0, 1, 2, 0):
        assert page.js(last) == rows[sample].completion
        assert f"Sample {sample + 1} of 3" in page.find(".pager")[0].text
        page.press(Keys.ARROW_RIGHT)
    assert "30 of 30 questions (first 30 of 1,319)" in page.find("#count")[0].text
    right = sum(p.correct for p in rows[:3])
    assert f"{right} of 3 right" in page.find(".card:last-child .badges")[0].text


def test_the_list_leaves_out_what_every_question_begins_with(browser, tmp_path):
    opening = "Your task is to count how many things there are in the end.\n\n"
    folders = made_runs.make_runs(tmp_path / "runs", num_questions=12, training=False, opening=opening)
    browser.get(write_report(folders, tmp_path / "out").as_uri())
    questions = [*read_rows(folders[0] / "questions.jsonl")]
    rows = Page(browser).js("return [...document.querySelectorAll('.row .q')].map((row) => row.textContent)")
    assert rows[0] == "\N{HORIZONTAL ELLIPSIS}" + questions[0]["question"].removeprefix(opening)[:160]
    assert Page(browser).js("return document.querySelector('.question').textContent") == questions[0]["question"]
