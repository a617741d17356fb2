"""A real Chromium for tests of the web page, and the pictures of the page that the docs show.

    python -m tests.browser docs/images

fills a home with sweeps, serves it, and writes service-list.png, service-sweep.png and
service-phone.png. The test of the page takes the same pictures into a folder of its own.
"""

import argparse
import shutil
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

from PIL import Image
from playwright.sync_api import Browser, ConsoleMessage, Page, Request, sync_playwright

from service.api.app import make_app
from service.api.lifespan import Server, address_of, listen
from service.api.services import Services
from service.outbox_health import OutboxHealth
from service.queue.records import NewSweep, Role, User
from service.states import State
from tests.api_home import PLAN, advance
from tests.ledgers import CLIP, EMA, PRUNE, WARMDOWN, Sweep
from tests.serving import opened_service
from tests.showcase import Showcase
from trainer.runtime.files import write_json, write_text

CHROMIUMS = ("chromium", "chromium-browser", "google-chrome")
QUIET = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
)
DESKTOP, PHONE = (1280, 900), (390, 844)
PATIENCE_MS = 240_000
PICTURES = ("service-list.png", "service-sweep.png", "service-phone.png")
SPACE = {
    WARMDOWN: [2000, 2500, 3000, 3500],
    EMA: [0.995, 0.997, 0.998],
    CLIP: ["none", "p5", "p8"],
    PRUNE: [0.0, 0.03, 0.06],
}


def find_chromium() -> str | None:
    """Return the path of an installed Chromium."""
    return next((path for name in CHROMIUMS if (path := shutil.which(name))), None)


@contextmanager
def launched() -> Iterator[Browser]:
    """A headless Chromium that calls nobody by itself."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=find_chromium(), args=[*QUIET], timeout=PATIENCE_MS
        )
        try:
            yield browser
        finally:
            browser.close()


@dataclass
class Watch:
    """What a page did that it should not: errors, refusals of its policy, calls to elsewhere."""

    errors: list[str] = field(default_factory=list)
    strangers: list[str] = field(default_factory=list)

    def hear(self, message: ConsoleMessage) -> None:
        if message.type in ("error", "warning"):
            self.errors.append(message.text)

    def see(self, request: Request) -> None:
        if urlsplit(request.url).hostname not in ("127.0.0.1", None):
            self.strangers.append(request.url)


@contextmanager
def opened_page(
    browser: Browser, address: str, *, size: tuple[int, int] = DESKTOP, is_phone: bool = False
) -> Iterator[tuple[Page, Watch]]:
    """A fresh tab with nothing remembered, and what it does wrong."""
    context = browser.new_context(
        base_url=address,
        viewport={"width": size[0], "height": size[1]},
        has_touch=is_phone,
        is_mobile=is_phone,
        reduced_motion="reduce",
        color_scheme="light",
    )
    watch = Watch()
    try:
        context.set_default_timeout(PATIENCE_MS)
        page = context.new_page()
        page.on("console", watch.hear)
        page.on("pageerror", lambda error: watch.errors.append(str(error)))
        page.on("request", watch.see)
        yield page, watch
    finally:
        context.close()


@contextmanager
def serving(services: Services, port: int = 0) -> Iterator[str]:
    """The address of the app behind a real server, on a port of one's choice."""
    with listen("127.0.0.1", port) as listener:
        server = Server(make_app(services.settings, services=services), services)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            yield address_of(listener)
        finally:
            services.stopping.set()
            server.should_exit = True
            thread.join()


def submit(services: Services, sweep_id: str, owner: str, name: str | None = None) -> None:
    """Put a sweep into the queue, as planning would have made it."""
    new = NewSweep(
        sweep_id=sweep_id,
        name=name or sweep_id.rpartition("-")[0],
        recipe="pr414",
        bundle=f"bundle-{sweep_id}",
        assignments=(),
        digest=f"{sweep_id:0<64}",
        plan={**PLAN, "sweep_id": sweep_id},
    )
    services.queue.submit(new, User(owner, Role.SUBMITTER))


def say_all_is_well(services: Services) -> None:
    """Write down, as the outbox does, that MLflow is in reach."""
    write_json(services.paths.outbox, asdict(OutboxHealth(at=time.time())))


def fill_for_pictures(services: Services) -> Sweep:
    """Fill a home with sweeps of two people: one running, which is returned, one of each other kind
    that a list is apt to have."""
    say_all_is_well(services)
    home = services.paths.home
    whole = Showcase(home)
    whole.write()
    large = Sweep(home, sweep_id="int8-embeddings-9e07d2", mean_bytes=17_200_000)
    large.write()
    running = Sweep(home, sweep_id="warmdown-clip-4c19aa", space=SPACE)
    with running.open() as ledger:
        running.start(ledger)
        node = {"node": "c07f3a91d2e4", "device": "NVIDIA H100 80GB HBM3"}
        ledger.append("gang_started", at=running.tick(40.0), gang="gang-0", workers=8,
                      nodes=[node] * 8, probe={"tflops": [640.0] * 8, "warnings": []})  # fmt: skip
        for point in running.train_points()[:2]:
            running.train(ledger, point)
            for final in running.final_points(point)[: 27 if point[WARMDOWN] == 2000 else 17]:
                running.score(ledger, final)
        running.begin(ledger, running.train_points()[2])
    for sweep_id, owner in (
        (whole.sweep_id, "alice"),
        (large.sweep_id, "bob"),
        (running.sweep_id, "alice"),
        ("bigram-hash-2f6b10", "bob"),
        ("ttt-chunks-77d0e3", "alice"),
    ):
        submit(services, sweep_id, owner)
    advance(services, whole.sweep_id, State.SUCCEEDED)
    advance(services, large.sweep_id, State.INFEASIBLE, "no final is under the cap")
    advance(services, running.sweep_id, State.RUNNING)
    waiting = services.queue.get("bigram-hash-2f6b10")
    services.queue.advance(waiting, state=State.WAITING, reason="1 of 1 gangs are in use")
    lines = "".join(
        f"event=final_scored final={n:04x} state=succeeded bpb=1.13{n:02d}\n" for n in range(10, 52)
    )
    log = services.paths.sweep(running.sweep_id).logs / "driver.log"
    write_text(log, f"event=attempt number=1\nevent=gang_started gang=gang-0 workers=8\n{lines}")
    return running


def take_pictures(browser: Browser, address: str, sweep_id: str, folder: Path) -> None:
    """Take the docs' pictures of a home that `fill_for_pictures` has filled."""
    with opened_page(browser, address) as (page, _):
        page.goto("/")
        page.locator("tbody tr").nth(4).wait_for()
        page.set_viewport_size({"width": DESKTOP[0], "height": 460})
        page.screenshot(path=folder / PICTURES[0])
        _open(page, sweep_id)
        page.set_viewport_size({"width": 1140, "height": 1200})
        page.wait_for_timeout(500)  # the plots follow the window's size
        page.screenshot(path=folder / PICTURES[1])
    with opened_page(browser, address, size=PHONE, is_phone=True) as (page, _):
        _open(page, sweep_id)
        page.screenshot(path=folder / PICTURES[2])
    for name in PICTURES:
        with Image.open(folder / name) as picture:
            small = picture.convert("RGB").quantize(128, dither=Image.Dither.NONE)
        small.save(folder / name, optimize=True)


def _open(page: Page, sweep_id: str) -> None:
    page.goto(f"/#/sweeps/{sweep_id}")
    page.locator("#parallel .scatterlayer path").first.wait_for(state="attached")
    page.locator(".activity li").first.wait_for()


def contrast(one: str, other: str) -> float:
    """The contrast of two colours, 1 to 21, as WCAG 2 defines it."""
    low, high = sorted(map(_luminance, (one, other)))
    return (high + 0.05) / (low + 0.05)


def _luminance(colour: str) -> float:
    parts = [int(colour[i : i + 2], 16) / 255 for i in (0, 2, 4)]
    linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
    return sum(w * p for w, p in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def main() -> None:
    """Take the pictures anew."""
    parser = argparse.ArgumentParser(description="Take the docs' pictures of the web page.")
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    with (
        tempfile.TemporaryDirectory() as root,
        opened_service(Path(root), requests_per_second=1e6, burst=1_000_000) as services,
    ):
        running = fill_for_pictures(services)
        with running.open(), serving(services) as address, launched() as browser:
            take_pictures(browser, address, running.sweep_id, folder)


if __name__ == "__main__":
    main()
