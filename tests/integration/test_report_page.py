"""The report as a reader sees it: in a real Chromium that cannot reach any network.

With KEEP_SCREENSHOTS=docs/images in the environment the picture that docs show is taken anew.
"""

import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from PIL import Image

from service.report import best, final_rows
from service.report_page import report_html
from tests.ledgers import Sweep
from tests.showcase import Showcase, write_tensors

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser"))), None)

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on the path: install chromium"),
]

DRAWN = """[...document.querySelectorAll('.js-plotly-plot')].filter(
    plot => plot.data.length && plot.querySelector('.main-svg')).map(plot => plot.dataset.plot)"""
PLOTS = [
    "plane", "history", "pareto", "parallel", "slice", "importance", "edf", "curves", "sizes",
    "forecast", "cost",
]  # fmt: skip
MAX_PICTURE_BYTES = 300_000


@dataclass
class Reader:
    """A page in the browser, what it asked for and what it complained of."""

    page: "playwright.Page"
    asked: list[str] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)

    def open(self, path: Path) -> None:
        self.page.goto(path.resolve().as_uri())
        self.page.wait_for_function(
            "[...document.querySelectorAll('[data-plot]')].every(plot => plot.data)"
        )


@pytest.fixture(scope="module")
def browser() -> Iterator["playwright.Browser"]:
    with playwright.sync_playwright() as started:
        launched = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield launched
        launched.close()


@contextmanager
def reading(browser: "playwright.Browser") -> Iterator[Reader]:
    context = browser.new_context(viewport={"width": 1360, "height": 1560}, offline=True)
    found = Reader(context.new_page())
    found.page.on("pageerror", lambda error: found.errors.append(str(error)))
    found.page.on("console", lambda m: found.errors.append(m.text) if m.type == "error" else None)

    def only_files(route: "playwright.Route") -> None:
        found.asked.append(route.request.url)
        if route.request.url.startswith("file:"):
            route.continue_()
        else:
            route.abort()

    context.route("**/*", only_files)
    yield found
    context.close()


@pytest.fixture
def reader(browser: "playwright.Browser") -> Iterator[Reader]:
    with reading(browser) as found:
        yield found


@pytest.fixture(scope="module")
def opened(browser: "playwright.Browser", show: Path) -> Iterator[Reader]:
    """The page of everything, for those who do nothing to it that another would see."""
    with reading(browser) as found:
        found.open(show)
        yield found


@pytest.fixture(scope="module")
def show(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A page of 320 finals and of everything that a report can show."""
    sweep = Showcase(tmp_path_factory.mktemp("home"))
    view = sweep.write()
    top = best(view)
    assert top is not None
    write_tensors(sweep.paths, top["final"], top["result"])
    page = sweep.home / "report.html"
    page.write_text(report_html(view, sweep.paths))
    return page


def test_every_plot_draws_without_a_network_or_an_error(
    show: Path, opened: Reader, tmp_path: Path
) -> None:
    assert opened.page.evaluate(DRAWN) == PLOTS
    assert opened.errors == []
    assert opened.asked == [show.resolve().as_uri()]
    picture = Path(os.environ.get("KEEP_SCREENSHOTS", tmp_path)) / "report.png"
    opened.page.screenshot(path=picture)
    assert picture.stat().st_size < MAX_PICTURE_BYTES
    with Image.open(picture) as image:
        assert len(image.convert("RGB").getcolors(1_000_000)) > 100


def test_a_final_under_the_pointer_says_what_it_is(opened: Reader) -> None:
    texts = opened.page.evaluate(
        "document.getElementById('plot-history').data.flatMap(t => t.text || [])"
    )

    assert len(texts) > 300
    assert all(re.match(r"<b>[0-9a-f]{12}</b><br>warmdown_iters ", text) for text in texts)


def test_the_table_sorts_by_keyboard(opened: Reader) -> None:
    head = opened.page.get_by_role("button", name="bytes", exact=True)
    column = "[...document.querySelectorAll('.sortable tbody tr')].map(r => r.cells[%d].innerText)"
    place = head.evaluate("button => button.closest('th').cellIndex")

    head.focus()
    orders = []
    for _ in range(2):
        opened.page.keyboard.press("Enter")
        cells = opened.page.evaluate(column % place)
        orders.append([int(cell.replace(",", "")) for cell in cells if cell != "-"])

    assert orders == [sorted(orders[0]), sorted(orders[0], reverse=True)]
    assert head.evaluate("button => button.closest('th').ariaSort") == "descending"


def test_a_page_fits_a_phone_and_a_sheet_of_paper(show: Path, reader: Reader) -> None:
    reader.page.set_viewport_size({"width": 390, "height": 800})
    reader.open(show)

    width = reader.page.evaluate("document.documentElement.scrollWidth")
    reader.page.emulate_media(media="print")
    is_hidden = reader.page.evaluate("getComputedStyle(document.querySelector('nav')).display")

    assert width <= 390
    assert is_hidden == "none"


@pytest.mark.parametrize(
    "evil", ["</script><script>hurt = 1</script>", "<img src=x onerror=hurt=1>"]
)
def test_nothing_of_a_spec_runs_in_the_page(evil: str, reader: Reader, tmp_path: Path) -> None:
    sweep = Sweep(tmp_path, space={"final.quantize.clip": ["none", evil]})
    with sweep.open() as ledger:
        sweep.start(ledger)
        for point in sweep.final_points({}):
            sweep.score(ledger, point)
        view = ledger.view
    view.started |= {"name": evil, "recipe": evil}
    page = tmp_path / "report.html"
    page.write_text(report_html(view, sweep.paths))

    reader.open(page)
    reader.page.hover("#plot-plane")

    assert reader.page.evaluate("typeof hurt") == "undefined"
    assert reader.errors == []
    assert reader.page.get_by_role("heading", level=1).inner_text() == evil
    assert len(final_rows(view)) == 2
