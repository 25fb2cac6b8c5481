"""Reports in a headless Chromium: they open, draw what the data says, and can be read and used by everyone.

Skipped, with the reason, where there is no Chromium.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from surgery.report import drawing
from surgery.report.charts import PALETTE
from surgery.report.curves import POINTS, read_entries
from surgery.report.page import build_page, render, report
from surgery.report.parts import Figure, Page
from surgery.runs import LOG_FILE
from tests.conftest import TinyModel
from tests.reporting import browsing, make_read_run, make_results, make_run
from tests.test_report import figures, hostile_page, rows_of

MAX_BYTES, MAX_SECONDS = 3_000_000, 2.0
LIGHT, DARK = (255, 255, 255), (21, 24, 28)


@dataclass
class Opened:
    """A page in a browser, and what it said and asked for meanwhile."""

    page: Any
    clock: Any
    said: list[str] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)

    def call(self, script: str, *arguments: Any) -> Any:
        return self.page.evaluate(script, *arguments)

    def worked_seconds(self) -> float:
        """How long the page's main thread has been at work."""
        metrics = self.clock.send("Performance.getMetrics")["metrics"]
        return float(next(metric["value"] for metric in metrics if metric["name"] == "TaskDuration"))


Open = Callable[..., Opened]
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """One for all tests."""
    with browsing() as running:
        yield running


@pytest.fixture
def browse(browser: Any) -> Iterator[Open]:
    """Open a file, and wait until its charts are drawn."""
    contexts = []

    def run(path: Path, *, width: int = 1000, scheme: str = "light", waits: bool = True) -> Opened:
        context = browser.new_context(viewport={"width": width, "height": 800}, color_scheme=scheme)
        contexts.append(context)
        page = context.new_page()
        opened = Opened(page, context.new_cdp_session(page))
        opened.clock.send("Performance.enable", {"timeDomain": "threadTicks"})
        opened.page.on("console", lambda message: opened.said.append(f"{message.type}: {message.text}"))
        opened.page.on("pageerror", lambda error: opened.said.append(f"error: {error}"))
        opened.page.on("request", lambda request: opened.requests.append(request.url))
        opened.page.goto(path.as_uri())
        if waits:
            opened.page.wait_for_selector("html[data-drawn]", state="attached", timeout=60_000)
        return opened

    yield run
    for context in contexts:
        context.close()


@pytest.fixture(scope="module")
def reports(tiny_model: TinyModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a page of each kind, and the runs that they are on."""
    folder = tmp_path_factory.mktemp("reports")
    shutil.copytree(tiny_model("llama", overrides={"num_hidden_layers": 3}), folder / "model")
    make_run(folder / "model", folder / "paca")
    make_run(folder / "model", folder / "other", seed=1, rank=8)
    make_run(folder / "model", folder / "long", steps=10_000)
    make_read_run(folder / "model", folder / "read")
    (folder / "bench").mkdir()
    make_results().write(folder / "bench")
    for name, listed in PAGES.items():
        report([folder / part for part in listed], folder / f"{name}.html")
    return folder


PAGES = {
    "run": ("paca",),
    "side": ("read",),
    "bench-page": ("bench",),
    "compared": ("paca", "other", "read"),
    "long-page": ("long",),
}
EVERY_PAGE = pytest.mark.parametrize("name", PAGES)


def marks(opened: Opened, title: str, kind: str) -> list[dict[str, float]]:
    """The boxes of the marks of one kind (`mark-rect`) of the chart with that title, as they are drawn."""
    found: list[dict[str, float]] = opened.call(
        """([title, kind]) => {
            const figure = [...document.querySelectorAll("figure")].find(
                (f) => f.querySelector("h3").textContent === title);
            return [...figure.querySelectorAll(`.${kind}.role-mark > *`)].map((mark) => {
                const box = mark.getBoundingClientRect();
                return {x: box.x, y: box.y, width: box.width, height: box.height, fill: mark.getAttribute("fill")};
            });
        }""",
        [title, kind],
    )
    return found


CHART_TITLED = """(title) => {
    const figure = [...document.querySelectorAll("figure")].find((f) => f.querySelector("h3").textContent === title);
"""


def drawn_data(opened: Opened, title: str) -> list[dict[str, Any]]:
    """What the chart's view holds as its data."""
    data = "return JSON.parse(JSON.stringify(window.charts[figure.dataset.chart].data('rows')));"
    found: list[dict[str, Any]] = opened.call(f"{CHART_TITLED} {data} }}", title)
    return found


def all_figures(reports: Path, name: str) -> list[Figure]:
    """Every chart of a page, in its order."""
    return [part for s in page_of(reports, name).sections for part in s.parts if isinstance(part, Figure)]


def page_of(reports: Path, name: str) -> Page:
    """What the page says, built again."""
    return build_page([reports / part for part in PAGES[name]])


# --- it opens


@EVERY_PAGE
@pytest.mark.parametrize("scheme", ("light", "dark"))
def test_it_opens_without_a_word_and_fetches_nothing(reports: Path, browse: Open, name: str, scheme: str) -> None:
    """Every chart is drawn, nothing stands on the console, and the page is the only thing that was asked for."""
    path = reports / f"{name}.html"
    opened = browse(path, scheme=scheme)
    assert opened.said == []
    assert [url for url in opened.requests if not url.startswith("data:")] == [path.as_uri()]
    count_marks = "(c) => c.querySelectorAll('svg .role-mark').length"
    drawn = opened.call(f"[...document.querySelectorAll('.chart')].map({count_marks})")
    assert len(drawn) == len(all_figures(reports, name))
    assert all(count > 0 for count in drawn)


def test_what_the_page_would_fetch_is_refused(reports: Path, browse: Open) -> None:
    """The policy holds: no request leaves the page, whatever runs in it."""
    opened = browse(reports / "run.html")
    failed: dict[str, str] = {}
    opened.page.on("requestfailed", lambda request: failed.update({request.url: request.failure}))
    result = opened.call("() => fetch('http://127.0.0.1:9/x').then(() => 'fetched', (error) => String(error))")
    assert "TypeError" in result
    opened.call("() => { const image = new Image(); image.src = 'http://127.0.0.1:9/y.png'; }")
    opened.call("() => { const script = document.createElement('script'); script.src = 'http://127.0.0.1:9/z.js';"
                " document.body.append(script); }")  # fmt: skip
    opened.call("() => { const script = document.createElement('script'); script.textContent = 'window.ran = true';"
                " document.body.append(script); }")  # fmt: skip
    opened.page.wait_for_timeout(200)
    left = [url for url in opened.requests if "127.0.0.1" in url]
    assert {failed.get(url) for url in left} <= {"csp"}
    assert opened.call("window.ran") is None
    assert sum("Content Security Policy" in text for text in opened.said) >= 4


def test_ten_thousand_steps_open_in_two_seconds(reports: Path, browse: Open) -> None:
    """Until all charts are drawn, the best of three; and the file is below 3 MB.

    Seconds of the page's main thread: on a machine that does other things the clock on the wall says more about those.
    """
    path = reports / "long-page.html"
    assert len(read_entries(reports / "long" / LOG_FILE)) > 10_000
    assert path.stat().st_size < MAX_BYTES
    times = [browse(path).worked_seconds() for _ in range(3)]
    assert min(times) < MAX_SECONDS, times
    assert len(drawn_data(browse(path), "Learning rate")) == POINTS


def test_hostile_names_do_nothing(browse: Open, tmp_path: Path) -> None:
    """A model called <script> is shown as such, also in a chart and in its tooltip."""
    page = hostile_page()
    (tmp_path / "hostile.html").write_text(render(page, drawing.bundle()), encoding="utf-8")
    opened = browse(tmp_path / "hostile.html")
    assert opened.said == []
    assert opened.page.title() == page.title
    assert opened.call("document.querySelector('h1').textContent") == page.title
    box = marks(opened, page.title, "mark-rect")[0]
    opened.page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    opened.page.wait_for_selector("#vg-tooltip-element.visible")
    assert page.title in opened.call("document.querySelector('#vg-tooltip-element').textContent")
    assert opened.call("document.querySelectorAll('#vg-tooltip-element script').length") == 0
    assert opened.said == []


# --- the charts have the data's values


@EVERY_PAGE
def test_each_chart_holds_its_data_and_its_table_says_the_same(reports: Path, browse: Open, name: str) -> None:
    """The view's data is the figure's, and the table below it has as many rows."""
    opened = browse(reports / f"{name}.html")
    shown = opened.call(
        "[...document.querySelectorAll('figure')].map((f) => [f.querySelector('h3').textContent, f.dataset.chart,"
        " f.querySelectorAll('tbody tr').length])"
    )
    wanted = all_figures(reports, name)
    assert [title for title, _, _ in shown] == [figure.title for figure in wanted]
    for (_, chart, rows), figure in zip(shown, wanted, strict=True):
        held = opened.call("(chart) => JSON.parse(JSON.stringify(window.charts[chart].data('rows')))", chart)
        assert held == [dict(row) for row in rows_of(figure)]
        assert rows == len(figure.table.rows)


def test_bars_are_as_long_as_their_values(reports: Path, browse: Open) -> None:
    """Bars begin at the axis' 0, each is its value's part of the largest; lines reach from quartile to quartile."""
    opened = browse(reports / "bench-page.html")
    for title in ("Step time", "Saved for backward", "Peak memory", "Ratio to the floor"):
        rows, boxes = drawn_data(opened, title), marks(opened, title, "mark-rect")
        assert len(rows) == len(boxes) > 8
        assert opened.call(f"{CHART_TITLED} return window.charts[figure.dataset.chart].scale('x')(0); }}", title) == 0
        most = max(row["value"] for row in rows)
        longest = max(box["width"] for box in boxes)
        for row, box in zip(rows, boxes, strict=True):
            assert box["width"] == pytest.approx(longest * row["value"] / most, abs=1.0), row["name"]
    rows, boxes = drawn_data(opened, "Step time"), marks(opened, "Step time", "mark-rect")
    lines = marks(opened, "Step time", "mark-rule")
    scale = boxes[0]["width"] / rows[0]["value"]
    for row, line in zip(rows, lines, strict=True):
        assert line["width"] == pytest.approx(scale * (row["high"] - row["low"]), abs=1.0)


def test_lines_go_through_their_values(reports: Path, browse: Open) -> None:
    """The evaluation's points lie where two of them say that the axes are."""
    opened = browse(reports / "run.html")
    rows = [row for row in drawn_data(opened, "Accuracy") if row["kind"] == "evaluation"]
    boxes = marks(opened, "Accuracy", "mark-symbol")
    assert len(rows) == len(boxes) == 6
    places = [(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2) for box in boxes]
    (x0, y0), (x1, y1) = places[0], places[-1]
    for row, (x, y) in zip(rows, places, strict=True):
        part = (row["step"] - rows[0]["step"]) / (rows[-1]["step"] - rows[0]["step"])
        assert x == pytest.approx(x0 + part * (x1 - x0), abs=1.0)
        part = (row["value"] - rows[0]["value"]) / (rows[-1]["value"] - rows[0]["value"])
        assert y == pytest.approx(y0 + part * (y1 - y0), abs=1.0)


def test_the_map_has_a_cell_for_each_layer_and_tells_more_from_less(reports: Path, browse: Open) -> None:
    """Layers across, projections down; the darker, the less; what moved most has the scale's last colour."""
    opened = browse(reports / "run.html")
    rows = drawn_data(opened, "How far trained columns moved")
    boxes = marks(opened, "How far trained columns moved", "mark-rect")
    assert len(rows) == len(boxes) == 21
    assert len({round(box["x"]) for box in boxes}) == 3
    assert len({round(box["y"]) for box in boxes}) == 7
    ordered = [box["fill"] for _, box in sorted(zip(rows, boxes, strict=True), key=lambda pair: pair[0]["value"])]
    brightness = [luminance(rgb(str(fill))) for fill in ordered]
    assert brightness == sorted(brightness)
    assert brightness[-1] > 2 * brightness[0]


# --- everyone can read and use it


def rgb(colour: str) -> tuple[int, int, int]:
    """`rgb(1, 2, 3)` or `#010203`."""
    if colour.startswith("#"):
        return int(colour[1:3], 16), int(colour[3:5], 16), int(colour[5:7], 16)
    red, green, blue = (int(float(part)) for part in re.findall(r"[\d.]+", colour)[:3])
    return red, green, blue


def luminance(colour: tuple[int, int, int]) -> float:
    """Relative luminance, as WCAG 2.2 defines it."""
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in (part / 255 for part in colour)]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one: tuple[int, int, int], other: tuple[int, int, int]) -> float:
    """As WCAG 2.2 defines it: 1 to 21."""
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


def test_marks_stand_out_from_light_and_dark_pages() -> None:
    """At least 3 to 1, which WCAG asks of graphics: one set of colours serves both."""
    for colour in PALETTE:
        assert contrast(rgb(colour), LIGHT) >= 3
        assert contrast(rgb(colour), DARK) >= 3


TEXTS = """() => {
    const seen = [];
    const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
    while (walker.nextNode()) {
        const element = walker.currentNode.parentElement;
        if (!walker.currentNode.textContent.trim() || !element.checkVisibility()) continue;
        if (element.closest("script, noscript, .skip")) continue;
        const style = getComputedStyle(element);
        let behind = element, background;
        do { background = getComputedStyle(behind).backgroundColor; behind = behind.parentElement; }
        while (behind && /rgba\\(.*, 0\\)/.test(background));
        const colour = element.closest("svg") ? style.fill : style.color;
        seen.push([colour, background, walker.currentNode.textContent.slice(0, 40)]);
    }
    return seen;
}"""


@EVERY_PAGE
@pytest.mark.parametrize("scheme", ("light", "dark"))
def test_all_text_is_readable_in_light_and_dark(reports: Path, browse: Open, name: str, scheme: str) -> None:
    """Text has 4.5 to 1 against what is behind it, in the page and in its charts; dark is dark."""
    opened = browse(reports / f"{name}.html", scheme=scheme)
    opened.call("() => document.querySelectorAll('details').forEach((d) => { d.open = true; })")
    texts = opened.call(TEXTS)
    assert len(texts) > 50
    weak = [(fill, behind, text) for fill, behind, text in texts if contrast(rgb(fill), rgb(behind)) < 4.5]
    assert weak == []
    body = rgb(opened.call("getComputedStyle(document.body).backgroundColor"))
    assert body == (LIGHT if scheme == "light" else DARK)


def test_a_switch_to_dark_needs_no_drawing(reports: Path, browse: Open) -> None:
    """The page follows the system while it is open."""
    opened = browse(reports / "run.html")
    label = "getComputedStyle(document.querySelector('.role-axis-label text')).fill"
    light = opened.call(label)
    opened.page.emulate_media(color_scheme="dark")
    dark = opened.call(label)
    assert contrast(rgb(light), LIGHT) > 7
    assert contrast(rgb(dark), DARK) > 7
    opened.page.emulate_media(media="print", color_scheme="dark")
    assert contrast(rgb(opened.call(label)), LIGHT) > 7
    assert rgb(opened.call("getComputedStyle(document.body).backgroundColor")) == LIGHT


@EVERY_PAGE
def test_it_fits_a_phone(reports: Path, browse: Open, name: str) -> None:
    """At 375 pixels the page does not scroll sideways: tables do, in their boxes; charts take the width there is."""
    opened = browse(reports / f"{name}.html", width=375)
    opened.call("() => document.querySelectorAll('details').forEach((d) => { d.open = true; })")
    assert opened.call("document.documentElement.scrollWidth") <= 375
    boxes = opened.call("[...document.querySelectorAll('.chart svg')].map((s) => s.getBoundingClientRect().toJSON())")
    for box in boxes:
        assert 250 < box["width"] <= 345
        assert box["right"] <= 375


def test_charts_take_the_width_of_a_window_that_changes(reports: Path, browse: Open) -> None:
    """As when a phone is turned."""
    opened = browse(reports / "run.html")
    width = "document.querySelector('.chart svg').getBoundingClientRect().width"
    before = opened.call(width)
    opened.page.set_viewport_size({"width": 500, "height": 800})
    opened.page.wait_for_function(f"{width} < 480")
    assert before > 900


INTERACTIVE = """() => {
    const all = [...document.querySelectorAll("a[href], button, input, select, summary, .scroll, pre")];
    all.forEach((element, number) => { element.dataset.place = number; });
    return all.filter((element) => element.checkVisibility()).map((element) => element.dataset.place);
}"""


@EVERY_PAGE
def test_the_keyboard_reaches_everything(reports: Path, browse: Open, name: str) -> None:
    """Tab goes through every link, table and details in their order, the first skips to the report, focus is seen."""
    opened = browse(reports / f"{name}.html")
    keyboard = opened.page.keyboard
    for number in range(opened.call("document.querySelectorAll('summary').length")):
        opened.page.locator("summary").nth(number).focus()
        keyboard.press("Enter")  # opens it
    assert opened.call("document.querySelectorAll('details:not([open])').length") == 0
    wanted = opened.call(INTERACTIVE)
    opened.call("() => { document.activeElement.blur(); window.getSelection().removeAllRanges(); }")
    opened.call("() => { document.body.tabIndex = -1; document.body.focus(); }")
    reached = []
    for _ in wanted:
        keyboard.press("Tab")
        place, outline, is_seen = opened.call(
            "() => { const e = document.activeElement, box = e.getBoundingClientRect(); return [e.dataset.place,"
            " getComputedStyle(e).outlineStyle, box.bottom > 0 && box.top < innerHeight && box.right > 0]; }"
        )
        reached.append(place)
        assert outline == "solid"
        assert is_seen
    assert reached == wanted
    assert opened.call("document.querySelector('.skip').dataset.place") == reached[0]


def test_the_skip_link_leads_to_the_report(reports: Path, browse: Open) -> None:
    """The first Tab shows it; Enter moves on past the links."""
    opened = browse(reports / "run.html")
    opened.page.keyboard.press("Tab")
    assert opened.call("document.activeElement.textContent") == "Skip to the report"
    opened.page.keyboard.press("Enter")
    assert opened.call("document.activeElement.id") == "main"


def test_a_reader_hears_what_each_chart_shows(reports: Path, browse: Open) -> None:
    """A figure is named by its title, its drawing described in words that hold its values."""
    opened = browse(reports / "run.html")
    described = opened.call(
        "[...document.querySelectorAll('figure')].map((f) => [f.querySelector('h3').textContent,"
        " f.querySelector('.chart').getAttribute('aria-label'), f.querySelector('figcaption').textContent])"
    )
    wanted = {title: figure.summary for title, figure in figures(page_of(reports, "run")).items()}
    assert {title: label for title, label, _ in described} == wanted
    for title, _, caption in described:
        assert caption.startswith(wanted[title])
    assert re.search(r"falls from [\d.]+ at step 1 to [\d.]+ at step 100", wanted["Loss"])


def test_without_javascript_the_data_is_there(reports: Path, browser: Any) -> None:
    """Charts are not, which is said; text and tables are."""
    context = browser.new_context(java_script_enabled=False)
    page = context.new_page()
    page.goto((reports / "run.html").as_uri())
    assert page.locator("table").count() > 5
    assert page.locator("noscript p").is_visible()
    context.close()
