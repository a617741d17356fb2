"""The web page in a real Chromium, against the real app on a real home.

`python -m tests.browser docs/images` takes the docs' pictures; the last test takes them elsewhere.
"""

import re
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest

from service.api.services import Services
from service.labels import knob_names
from service.ledger import replay
from service.queue.records import Role
from service.report import best, table_records
from service.states import State
from tests import ledgers
from tests.api_home import Home, advance, filled
from tests.ledgers import CLIP, WARMDOWN
from tests.ports import free_port
from tests.serving import opened_service
from tests.showcase import Showcase
from trainer.runtime.files import write_json

pytest.importorskip("playwright")
from playwright.sync_api import Browser, Page, expect

from tests import browser as web

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(
        web.find_chromium() is None, reason="no Chromium on the path: install the package chromium"
    ),
]
expect.set_options(timeout=web.PATIENCE_MS)
HOSTILE = "<img src=x onerror=\"document.title='owned'\">"
NO_OVERFLOW = "document.documentElement.scrollWidth <= innerWidth"
SETTLED_MS = 3_000
"""After it a page asks for nothing any more unless there is news."""


@pytest.fixture(scope="module")
def chromium() -> Iterator[Browser]:
    with web.launched() as browser:
        yield browser


@pytest.fixture
def services(tmp_path: Path) -> Iterator[Services]:
    with opened_service(tmp_path / "home", requests_per_second=1e6, burst=1_000_000) as services:
        web.say_all_is_well(services)
        yield services


@pytest.fixture
def home(services: Services) -> Home:
    return filled(services)


@pytest.fixture
def address(services: Services) -> Iterator[str]:
    with web.serving(services) as address:
        yield address


@dataclass
class Visit:
    """A tab on the service. `allowed`: what its console may say, because the test provokes it."""

    page: Page
    allowed: list[str] = field(default_factory=list)


@pytest.fixture
def visit(chromium: Browser, address: str, home: Home) -> Iterator[Visit]:
    """A tab that in the end must have called nobody else, and have had nothing to complain of."""
    with web.opened_page(chromium, address) as (page, watch):
        visit = Visit(page)
        yield visit
    unexpected = [e for e in watch.errors if not any(text in e for text in visit.allowed)]
    assert unexpected == []
    assert watch.strangers == []


def records_of(home: Home, sweep_id: str) -> list[dict[str, Any]]:
    return table_records(replay(home.services.paths.sweep(sweep_id).ledger))


def press_until(page: Page, key: str, is_there: Callable[[], bool]) -> None:
    """Press a key until the focus is where it is wanted, as somebody without a mouse does."""
    for _ in range(60):
        if is_there():
            return
        page.keyboard.press(key)
    raise AssertionError(f"60 presses of {key} do not lead there")


def focused(page: Page) -> str:
    return page.evaluate("document.activeElement.textContent")


def test_the_list_tells_what_queue_and_ledgers_know(visit: Visit, home: Home) -> None:
    top = records_of(home, home.done)[0]

    visit.page.goto("/")

    rows = visit.page.locator("tbody tr")
    expect(rows).to_have_count(4)
    done = rows.nth(3)  # the newest come first
    expect(done).to_contain_text("succeeded")
    expect(done).to_contain_text("4/4 finals, 2/2 trainings")
    expect(done).to_contain_text(f"{top['val_bpb']:.4f}")
    expect(done).to_contain_text(f"{top['artifact_bytes']:,}")
    expect(done).to_contain_text(f"{-top['overshoot_bytes']:,} under")
    expect(rows.nth(0)).to_contain_text("queued")


def test_a_filter_stays_in_the_address(visit: Visit, home: Home) -> None:
    visit.page.goto("/")
    expect(visit.page.locator("tbody tr")).to_have_count(4)

    visit.page.get_by_label("State").select_option("ended")
    visit.page.get_by_label("Name").fill("toolarge")
    expect(visit.page.locator("tbody tr")).to_have_count(1)
    visit.page.reload()

    expect(visit.page.locator("tbody tr")).to_have_count(1)
    expect(visit.page.locator("tbody tr")).to_contain_text("toolarge")
    visit.page.get_by_label("Owner").fill("nobody")
    expect(visit.page.locator(".empty")).to_contain_text("Take a filter away")


def test_older_sweeps_are_on_the_next_page(visit: Visit, services: Services) -> None:
    for number in range(52):
        web.submit(services, f"many-{number:06x}", "ann")
    visit.page.goto("/")
    expect(visit.page.locator("tbody tr")).to_have_count(50)

    visit.page.get_by_role("button", name="Older").click()

    expect(visit.page.locator("tbody tr").nth(5)).to_contain_text("3f9a2c")
    visit.page.get_by_role("button", name="Newer").click()
    expect(visit.page.locator("tbody tr")).to_have_count(50)


def test_a_sweep_shows_its_whole_ledger(visit: Visit, services: Services) -> None:
    whole = Showcase(services.paths.home)
    view = whole.write()
    web.submit(services, whole.sweep_id, "ann")
    advance(services, whole.sweep_id, State.SUCCEEDED)
    records, top = table_records(view), best(view)
    assert top is not None

    visit.page.goto(f"/#/sweeps/{whole.sweep_id}")

    page, score = visit.page, top["result"]["score"]["val_bpb"]
    expect(page.locator(".tile").first).to_contain_text(f"{score:.4f} bpb")
    expect(page.locator(".tile", has_text="Cost")).to_contain_text("budget")
    expect(page.locator(".tree")).to_contain_text("trunk")
    expect(page.locator(".tree .label")).to_have_count(len(view.trainings))
    expect(page.locator(".pages").last).to_contain_text(f"1–25 of {len(records)}")
    names = list(knob_names(view.started["varying"]).values())
    assert page.locator(".finals th").all_inner_texts()[: len(names)] == names
    expect(page.locator("#parallel .annotation-text", has_text=names[0])).to_be_visible()
    page.locator("#plane .scatterlayer .point").first.wait_for()
    num_scored = sum(row["val_bpb"] is not None for row in records)
    expect(page.locator("#plane .scatterlayer .point")).to_have_count(num_scored + 1)  # the ring
    expect(page.locator("#plane")).to_contain_text(f"cap {view.started['cap_bytes']:,} bytes")


def test_finals_are_sorted_by_any_column(visit: Visit, home: Home) -> None:
    visit.page.goto(f"/#/sweeps/{home.done}")
    sizes = sorted(row["artifact_bytes"] for row in records_of(home, home.done))
    column = ".finals tbody td:nth-child(4)"
    expect(visit.page.locator(column)).to_have_count(4)

    visit.page.get_by_role("button", name="bytes").click()

    assert visit.page.locator(column).all_inner_texts() == [f"{size:,}" for size in sizes]
    visit.page.get_by_role("button", name="bytes").click()
    assert visit.page.locator(column).all_inner_texts() == [f"{size:,}" for size in reversed(sizes)]
    expect(visit.page.locator("th[aria-sort=descending]")).to_have_text("bytes")


def test_a_final_appears_while_somebody_looks(visit: Visit, home: Home) -> None:
    page, running = visit.page, home.sweep(home.running)
    page.goto(f"/#/sweeps/{home.running}")
    expect(page.locator(".pages").last).to_contain_text("No final has ended yet")
    page.wait_for_timeout(SETTLED_MS)
    page.evaluate("window.isSamePage = true")

    with running.open() as ledger:
        point = running.train_points()[0]
        running.end(ledger, point)
        key = running.score(ledger, running.final_points(point)[1])
        advance(home.services, home.running, State.RUNNING)

    expect(page.locator(".finals tbody")).to_contain_text(key[:12])
    expect(page.locator("#spoken")).to_contain_text("New best")
    expect(page.locator(".activity")).to_contain_text(f"final {key[:8]}")
    page.locator("#plane .scatterlayer .point").first.wait_for()
    assert page.evaluate("window.isSamePage")


def test_why_a_sweep_waits_is_told_as_soon_as_it_is_known(visit: Visit, home: Home) -> None:
    visit.page.goto("/")
    row = visit.page.locator("tbody tr").first
    expect(row).to_contain_text("queued")
    visit.page.wait_for_timeout(SETTLED_MS)

    record = home.services.queue.get(home.queued)
    reason = "ann holds 2 of 2 gangs"
    home.services.queue.advance(record, state=State.WAITING, reason=reason)

    expect(row).to_contain_text(reason)
    expect(visit.page.locator("#spoken")).to_have_text("Sweep later is waiting")
    row.get_by_role("link").click()
    expect(visit.page.locator(".strip")).to_have_text(f"Waiting: {reason}")


def test_markup_in_names_values_and_logs_stays_text(
    visit: Visit, home: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(ledgers.PHASES, HOSTILE, "final")
    services, page = home.services, visit.page
    space = {WARMDOWN: [2500], HOSTILE: [HOSTILE, "p5"]}
    sweep = ledgers.Sweep(services.paths.home, sweep_id="hostile-00ff00", space=space)
    sweep.write()
    web.submit(services, sweep.sweep_id, "ann", name=HOSTILE)
    advance(services, sweep.sweep_id, State.SUCCEEDED, HOSTILE)
    home.log(sweep.sweep_id, f"event=attempt number=1\n{HOSTILE}\n")
    write_json(services.paths.sweep(sweep.sweep_id).tracking, {"link": "javascript:alert(1)"})

    page.goto("/")
    expect(page.get_by_role("link", name=HOSTILE)).to_be_visible()
    page.get_by_role("link", name=HOSTILE).click()

    expect(page.locator("h1")).to_have_text(HOSTILE)
    expect(page.locator(".finals tbody tr")).to_have_count(2)
    expect(page.locator(".finals tbody")).to_contain_text(HOSTILE)
    expect(page.locator(".log")).to_contain_text(HOSTILE)
    expect(page.locator("#parallel .annotation-text", has_text="<img").first).to_be_visible()
    assert page.locator("main img").count() == 0
    assert page.locator("a[href^='javascript']").count() == 0
    assert "owned" not in page.title().replace(HOSTILE, "")


def test_a_token_is_asked_for_and_decides_what_may_be_done(visit: Visit, home: Home) -> None:
    visit.allowed.append("401")
    _, secret = home.services.tokens.create("rita", Role.READER)
    page = visit.page
    page.goto(f"/#/sweeps/{home.running}")
    expect(page.get_by_label("This service asks who you are.")).to_be_focused()

    page.keyboard.type("fwy_wrong")
    page.keyboard.press("Enter")
    expect(page.get_by_role("alert")).to_contain_text("fairway token create")
    page.get_by_label("This service asks who you are.").fill(secret)
    page.keyboard.press("Enter")

    expect(page.locator("h1")).to_have_text("warmdown")
    expect(page.locator("#who")).to_have_text("rita · reader")
    expect(page.locator("#line-words")).to_have_text("live")
    expect(page.locator(".controls button:visible")).to_have_count(0)
    assert page.evaluate("Object.keys(localStorage).length + document.cookie.length") == 0
    with page.expect_download() as download:
        page.get_by_role("link", name="Spec").click()
    assert download.value.path().read_text() == "name: warmdown\n"
    page.get_by_role("button", name="Forget token").click()
    expect(page.get_by_label("This service asks who you are.")).to_be_visible()


def test_a_sweep_is_cancelled_by_keyboard_alone(visit: Visit, home: Home) -> None:
    page, queue = visit.page, home.services.queue
    page.goto("/")
    expect(page.locator("tbody tr")).to_have_count(4)

    press_until(page, "Tab", lambda: focused(page) == "later")
    page.keyboard.press("Enter")
    expect(page.get_by_role("heading", name="later", exact=True)).to_be_focused()
    press_until(page, "Tab", lambda: focused(page) == "Cancel")
    page.keyboard.press("Enter")
    expect(page.get_by_role("dialog")).to_contain_text("Cancel sweep later?")
    page.keyboard.press("Escape")
    expect(page.get_by_role("button", name="Cancel", exact=True)).to_be_focused()
    assert queue.get(home.queued).state == State.QUEUED

    page.keyboard.press("Enter")
    within = "document.getElementById('dialog').contains(document.activeElement)"
    for _ in range(5):
        page.keyboard.press("Tab")
        assert page.evaluate(f"{within} || document.activeElement === document.body")
    press_until(page, "Tab", lambda: focused(page) == "Cancel the sweep")
    page.keyboard.press("Enter")

    expect(page.locator(".sub .state")).to_have_text("cancelled")
    assert queue.get(home.queued).state == State.CANCELLED
    expect(page.get_by_role("heading", level=1)).to_be_focused()
    expect(page.get_by_role("button", name="Resume")).to_be_visible()


def test_a_question_that_is_asked_again_at_once_gets_its_own_answer(
    visit: Visit, home: Home
) -> None:
    page, queue = visit.page, home.services.queue
    page.goto(f"/#/sweeps/{home.queued}")
    cancel = page.get_by_role("button", name="Cancel", exact=True)
    cancel.click()

    # A browser tells that a dialog has closed some time after it did.
    cancel.evaluate("cancel => { document.getElementById('dialog').close(); cancel.click(); }")
    page.get_by_role("button", name="Cancel the sweep").click()

    expect(page.locator(".sub .state")).to_have_text("cancelled")
    assert queue.get(home.queued).state == State.CANCELLED


def test_what_a_running_sweep_has_been_told_is_shown(visit: Visit, home: Home) -> None:
    visit.page.goto(f"/#/sweeps/{home.running}")

    visit.page.get_by_role("button", name="Pause").click()

    expect(visit.page.locator(".sub")).to_contain_text("pausing")
    assert home.services.queue.get(home.running).want == "pause"
    visit.page.get_by_role("button", name="Resume").click()
    expect(visit.page.locator(".sub")).not_to_contain_text("pausing")


def test_the_page_comes_back_with_the_service(chromium: Browser, home: Home) -> None:
    again = replace(home.services, stopping=threading.Event())
    with web.opened_page(chromium, "") as (page, _):
        with web.serving(home.services, free_port()) as address:
            page.goto(f"{address}/#/sweeps/{home.running}")
            expect(page.locator("#line-words")).to_have_text("live")
        expect(page.locator("#line-words")).to_have_text("no connection")
        expect(page.get_by_role("alert")).to_contain_text("does not answer")
        running = home.sweep(home.running)
        with running.open() as ledger:
            key = running.score(ledger, running.final_points(running.train_points()[0])[1])

        with web.serving(again, int(address.rpartition(":")[2])):
            expect(page.locator("#line-words")).to_have_text("live")

            expect(page.get_by_role("alert")).to_be_hidden()
            expect(page.locator(".activity")).to_contain_text(f"final {key[:8]}")
            assert page.locator(".activity li", has_text="started: 2").count() == 1


def test_an_unknown_sweep_leads_back_to_the_list(visit: Visit) -> None:
    visit.allowed.append("404")

    visit.page.goto("/#/sweeps/nothing-000000")

    expect(visit.page.get_by_role("alert")).to_contain_text("Go back to the list")
    visit.page.get_by_role("link", name="All sweeps").click()
    expect(visit.page.locator("tbody tr")).to_have_count(4)


def test_a_phone_never_scrolls_sideways(chromium: Browser, address: str, home: Home) -> None:
    with web.opened_page(chromium, address, size=web.PHONE, is_phone=True) as (page, watch):
        page.goto("/")
        expect(page.locator("tbody tr")).to_have_count(4)
        assert page.evaluate(NO_OVERFLOW)
        page.goto(f"/#/sweeps/{home.done}")
        page.locator("#parallel .scatterlayer path").first.wait_for(state="attached")

        assert page.evaluate(NO_OVERFLOW)
        assert page.evaluate("document.querySelector('.finals').offsetWidth > innerWidth")
        page.set_viewport_size({"width": 844, "height": 390})
        page.wait_for_timeout(SETTLED_MS)
        script = (
            "[...document.querySelectorAll('.plot')].every(e => e.scrollHeight <= e.offsetHeight)"
        )
        page.wait_for_function(script)
    assert watch.errors == []


def test_knobs_are_called_as_everywhere_else(visit: Visit) -> None:
    paths = [WARMDOWN, CLIP, "final.prune.ratio", "train.optim.matrix.lr", "train.optim.embed.lr"]
    paths += ["model.mlp.mult", "model.stem.mlp.mult", "model.dim", "seed", "final.bits.mlp"]
    visit.page.goto("/")

    script = "async paths => [...(await import('/ui/format.js')).knobNames(paths)]"

    assert dict(visit.page.evaluate(script, paths)) == knob_names(paths)


@pytest.mark.parametrize("scheme", [0, 1], ids=["light", "dark"])
def test_text_stands_out_from_its_ground(scheme: int) -> None:
    css = (Path(__file__).parents[2] / "service/web/app.css").read_text()
    block = re.findall(r":root \{(.*?)\}", css, re.DOTALL)[scheme]
    colours = dict(re.findall(r"--(\w+): #(\w{6})", block))

    poor = [
        (text, ground)
        for text in ("ink", "muted", "blue", "green", "amber", "red")
        for ground in ("paper", "card", "tint", "best")
        if web.contrast(colours[text], colours[ground]) < 4.5
    ]

    assert poor == []


def test_the_docs_pictures_can_be_taken(
    chromium: Browser, address: str, services: Services, tmp_path: Path
) -> None:
    running = web.fill_for_pictures(services)

    with running.open():
        web.take_pictures(chromium, address, running.sweep_id, tmp_path)

    assert all(20_000 < (tmp_path / name).stat().st_size < 250_000 for name in web.PICTURES)
