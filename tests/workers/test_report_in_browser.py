"""What a reader of the report sees, in a real browser: skipped where there is no Chromium."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Page, sync_playwright

from tests.workers.demo_merge import TASKS, merge_demo, report_of
from tests.workers.made_up_report import made_up
from workers.palette import COLORS
from workers.report import render_html

NAMES = ("chromium", "chromium-browser", "google-chrome")
CHROMIUM = next((path for path in map(shutil.which, NAMES) if path), "")
QUIET = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
PHONE, DESK = 390, 1280
CHARTS = (
    "retention",
    "scores-accuracy",
    "scores-perplexity",
    "disturbance",
    "cosine",
    "energy",
    "conflict",
    "spectrum",
    "search",
    "importance",
)
CHAPTERS = {
    "en": ("What each task keeps", "Gates", "The search", "The recipe", "Inputs", "Limits and warnings"),
    "ja": ("タスクごとの性能", "品質ゲート", "パラメータ探索", "レシピ", "入力ファイル", "制約と警告"),
}
READY_MILLISECONDS = 60_000

pytestmark = [
    pytest.mark.skipif(not CHROMIUM, reason="no chromium on PATH: apt-get install chromium"),
    pytest.mark.slow,
]


@dataclass
class Reader:
    """A page as someone opened it, and everything that went wrong or out while it loaded."""

    page: Page
    complaints: list[str] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)

    def sees(self, text: str) -> bool:
        """Whether a text is on the page to be read: not hidden, nor in the other language."""
        return text in self.page.locator("body").inner_text()

    def color(self, selector: str, of: str = "color") -> str:
        return str(
            self.page.locator(selector).first.evaluate(f"element => getComputedStyle(element).getPropertyValue('{of}')")
        )


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=CHROMIUM, args=QUIET)
        yield opened
        opened.close()


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A page with every chapter."""
    path = tmp_path_factory.mktemp("made") / "report.html"
    path.write_text(render_html(made_up()), encoding="utf-8")
    return path


def read(browser: Browser, path: Path, *, query: str = "", width: int = DESK, scheme: str = "light") -> Reader:
    context = browser.new_context(
        viewport={"width": width, "height": 900},
        color_scheme="dark" if scheme == "dark" else "light",
        reduced_motion="reduce",
    )
    reader = Reader(context.new_page())
    reader.page.on("console", lambda message: reader.complaints.append(f"{message.type}: {message.text}"))
    reader.page.on("pageerror", lambda error: reader.complaints.append(str(error)))
    reader.page.on("request", lambda request: reader.requests.append(request.url))
    reader.page.goto(path.as_uri() + query)
    reader.page.wait_for_selector("html[data-ready]", timeout=READY_MILLISECONDS)
    return reader


@pytest.mark.parametrize(
    ("width", "scheme", "language"),  # every two of them meet
    [(PHONE, "light", "en"), (PHONE, "dark", "ja"), (DESK, "light", "ja"), (DESK, "dark", "en")],
)
def test_every_chart_is_drawn_and_nothing_overflows_or_complains(
    browser: Browser, made: Path, width: int, scheme: str, language: str
) -> None:
    reader = read(browser, made, query=f"?lang={language}", width=width, scheme=scheme)
    page = reader.page
    assert reader.complaints == []
    assert [url for url in reader.requests if not url.startswith(("file:", "data:"))] == []
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    for name in CHARTS:
        chart = page.locator(f"#chart-{name}")
        assert chart.locator("svg").count() == 1, name
        assert chart.locator(".mark-symbol path, .mark-rect path, .mark-line path").count() > 0, name
        box = chart.locator("svg").bounding_box()
        assert box is not None
        assert 0.5 * width < box["width"] <= width or width == DESK, (name, box)
        assert chart.get_attribute("data-drawn") == language
    assert [chapter for chapter in CHAPTERS[language] if not reader.sees(chapter)] == []
    other = CHAPTERS["ja" if language == "en" else "en"]
    assert [chapter for chapter in other if reader.sees(chapter)] == []
    assert page.evaluate("document.documentElement.lang") == language
    assert reader.color("body", "background-color") == rgb(getattr(COLORS["paper"], scheme))


def test_an_analysis_opens_with_its_verdict(browser: Browser, tmp_path: Path) -> None:
    result = merge_demo(tmp_path, mode="analysis", evaluation=None, gates=[])
    reader = read(browser, report_of(result), query="?lang=ja", width=PHONE)
    assert reader.complaints == []
    assert reader.page.evaluate("document.documentElement.scrollWidth") <= PHONE
    assert "注意して統合してください" in reader.page.locator(".verdict").inner_text()
    rows = reader.page.locator("#analysis > .wide").first.locator("tbody tr").all_inner_texts()
    assert [row.split()[0] for row in rows] == list(TASKS)
    for name in ("disturbance", "disturbance_after", "cosine", "energy", "conflict"):
        assert reader.page.locator(f"#chart-{name} svg").count() == 1, name


def test_charts_take_their_colors_from_the_theme_and_say_what_they_show(browser: Browser, made: Path) -> None:
    reader = read(browser, made)
    point = "#chart-retention .mark-symbol path"
    assert reader.color(point, "fill") == rgb(COLORS["merged"].light)
    reader.page.emulate_media(color_scheme="dark")
    assert reader.color(point, "fill") == rgb(COLORS["merged"].dark)
    said = reader.page.locator("#chart-retention[role=graphics-document]").get_attribute("aria-label")
    assert "confidence interval" in (said or "")
    texts = reader.page.locator("#chart-scores-accuracy svg text").all_text_contents()
    assert {"cars", "Base", "Expert", "Merged", "task_arithmetic", "100%"} <= set(texts)


def test_the_language_can_be_changed_and_the_charts_follow(browser: Browser, made: Path) -> None:
    reader = read(browser, made)
    assert reader.sees("Rejected: 1 of 6 gates missed.")
    reader.page.get_by_text("日本語").click()
    reader.page.wait_for_selector("html[data-ready=ja]", timeout=READY_MILLISECONDS)
    assert reader.sees("不合格：6 件の品質ゲートのうち 1 件を満たしませんでした。")
    assert not reader.sees("Rejected")
    warnings = reader.page.locator("#limits ul").last.inner_text()
    assert "統合モデルの正解率（0.8）" in warnings
    assert not re.search(r"samples|head", warnings)
    assert "ワーカーの最大メモリ（実測）" in reader.page.locator("#cost").inner_text()
    assert reader.page.url.endswith("?lang=ja")
    assert "統合モデル" in (reader.page.locator("#chart-scores-accuracy svg").text_content() or "")
    assert reader.page.title() == "4 個のモデルを cat で 1 個に統合"
    assert reader.complaints == []


def test_a_layer_and_a_role_can_be_chosen(browser: Browser, made: Path) -> None:
    page = read(browser, made).page
    for name in ("spectrum", "conflict"):
        marks = f"#chart-{name} .mark-symbol path"
        before = page.locator(marks).evaluate_all("marks => marks.map(mark => mark.getAttribute('transform'))")
        options = page.locator(f"#chart-{name} select option").all_inner_texts()
        page.locator(f"#chart-{name} select").select_option(options[-1])
        page.wait_for_timeout(200)
        after = page.locator(marks).evaluate_all("marks => marks.map(mark => mark.getAttribute('transform'))")
        assert after
        assert after != before


def test_all_is_there_to_be_read_without_scripts(browser: Browser, made: Path) -> None:
    context = browser.new_context(java_script_enabled=False, viewport={"width": PHONE, "height": 900})
    page = context.new_page()
    page.goto(made.as_uri())
    text = page.locator("body").inner_text()
    assert "Rejected: 1 of 6 gates missed." in text
    assert "Charts need scripts" in text
    page.locator("details summary", has_text="The same as a table").nth(3).click()
    assert page.locator("details[open] td").count() > 4
    page.get_by_text("日本語").click()
    assert "不合格" in page.locator("body").inner_text()
    assert "Rejected" not in page.locator("body").inner_text()


def test_a_dark_screen_prints_dark_ink_on_light_paper_within_the_page(browser: Browser, made: Path) -> None:
    reader = read(browser, made, scheme="dark")
    reader.page.emulate_media(media="print", color_scheme="dark")
    assert reader.color("body", "color") == rgb(COLORS["ink"].light)
    assert reader.color("#chart-retention .mark-symbol path", "fill") == rgb(COLORS["merged"].light)
    assert not reader.page.locator(".language").is_visible()
    pages = reader.page.pdf(format="A4")
    assert pages.startswith(b"%PDF")
    reader.page.set_viewport_size({"width": 720, "height": 1000})  # A4 between its margins
    assert reader.page.evaluate("document.documentElement.scrollWidth") <= 720


def test_a_keyboard_reaches_the_language_and_the_tables(browser: Browser, made: Path) -> None:
    page = read(browser, made).page
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.id") == "lang-en"
    page.keyboard.press("ArrowRight")
    page.wait_for_selector("html[data-ready=ja]", timeout=READY_MILLISECONDS)
    assert page.evaluate("document.querySelectorAll('h1, h2').length") >= 8


@pytest.mark.parametrize("width", [PHONE, DESK])
def test_the_report_of_a_real_merge(browser: Browser, demo: Path, width: int) -> None:
    reader = read(browser, report_of(demo), width=width)
    assert reader.complaints == []
    assert reader.page.evaluate("document.documentElement.scrollWidth") <= width
    assert reader.sees("Accepted: every gate is met (1 of 1).")
    assert reader.sees("4 → 1")
    rows = reader.page.locator("#quality > .wide tbody tr").all_inner_texts()
    assert [re.split(r"\s", row)[0] for row in rows] == [*TASKS, "Mean"]
    assert reader.page.locator("#chart-scores-accuracy .mark-rect path").count() == 3 * len(TASKS)
    assert reader.page.locator("#inputs tbody tr").count() >= 1 + 2 * len(TASKS)
    layers = reader.page.locator("#chart-energy svg").text_content()
    assert "encoder.layer.0" in (layers or "")


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The result of a real merge, in which trimming did something."""
    return merge_demo(tmp_path_factory.mktemp("demo"))


def rgb(color: str) -> str:
    return f"rgb({int(color[1:3], 16)}, {int(color[3:5], 16)}, {int(color[5:7], 16)})"
