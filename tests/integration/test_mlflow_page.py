"""What a user sees who starts the printed command and opens the printed links."""

import asyncio
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from service import tracking
from service.projector import DEFAULT_PORT, Projection
from service.report import final_rows
from tests.ledgers import CLIP, WARMDOWN, Sweep
from tests.ports import free_port
from trainer.runtime.environment import quiet_mlflow

quiet_mlflow()
pytest.importorskip("mlflow")
page = pytest.importorskip("benchmarks.screenshot_mlflow")

# MLflow 3.17 uses what SQLAlchemy 2.1 deprecates.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

PARALLEL_AXES = "[...document.querySelectorAll('.axis text.label')].map(e => e.textContent)"
TABLE_NAMES = (
    "[...document.querySelectorAll('[role=row] a')].map(e => e.textContent.trim())"
    ".filter(text => text.startsWith('wd'))"
)


@pytest.fixture(scope="module")
def sweep(tmp_path_factory: pytest.TempPathFactory) -> Sweep:
    made = Sweep(tmp_path_factory.mktemp("home"))
    made.write()
    return made


@pytest.fixture(scope="module")
def projection(sweep: Sweep) -> Projection:
    return tracking.sync(sweep.paths, sweep.sweep_id, tracking.default_uri(sweep.paths))


@pytest.fixture(scope="module")
def address(sweep: Sweep, projection: Projection) -> Iterator[str]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(page, "free_port", free_port)
        patch.setattr(page, "START_S", 300.0)
        patch.setattr(page, "LOAD_S", 240.0)
        with page.serving(sweep.paths) as served:
            yield served


def at(address: str, link: str) -> str:
    assert link.startswith(f"http://127.0.0.1:{DEFAULT_PORT}/#/")
    return link.replace(f"http://127.0.0.1:{DEFAULT_PORT}", address)


async def look(link: str, stands: str, script: str) -> object:
    async with page.Browser(page.find_chromium()) as browser:
        await browser.open(link, stands)
        return await browser.evaluate(script)


needs_chromium = pytest.mark.skipif(
    page.find_chromium() is None, reason="no Chromium on the path: install the package chromium"
)


def test_printed_command_serves_the_runs_and_their_artifacts(
    address: str, projection: Projection
) -> None:
    run_id = next(iter(projection.run_ids.values()))
    link = f"{address}/get-artifact?path=task.json&run_uuid={run_id}"

    with urllib.request.urlopen(link, timeout=240) as answer:
        text = answer.read().decode()

    assert '"seed": 1337' in text


def test_running_server_takes_another_sweep(address: str, sweep: Sweep) -> None:
    second = Sweep(sweep.home, sweep_id="second-1", space={WARMDOWN: [2500], CLIP: ["p5"]})
    second.write()

    first = tracking.sync(second.paths, "second-1", address)
    second.paths.sweep("second-1").tracking.unlink()

    assert len(first.run_ids) == 2
    assert first.link.startswith(f"{address}/#/experiments/")
    assert tracking.sync(second.paths, "second-1", address) == first


@pytest.mark.browser
@needs_chromium
def test_chart_link_shows_every_knob_against_the_score(
    address: str, projection: Projection
) -> None:
    link = at(address, projection.link)

    knobs = ["warmdown_iters", "ema_decay", "clip", "prune.ratio"]
    stands = f"({page.CHARTS_STAND}) && {PARALLEL_AXES}.length > {len(knobs)}"

    axes = asyncio.run(look(link, stands, PARALLEL_AXES))

    assert axes == [*knobs, "final/val_bpb"]


@pytest.mark.browser
@needs_chromium
def test_table_link_lists_the_finals_flat_by_score(
    address: str, projection: Projection, sweep: Sweep, tmp_path: Path
) -> None:
    from service.labels import run_name
    from service.ledger import replay

    rows = final_rows(replay(sweep.paths.sweep(sweep.sweep_id).ledger))
    ordered = sorted(rows, key=lambda row: row.val_bpb)

    names = asyncio.run(
        look(at(address, projection.table_link), f"{TABLE_NAMES}.length >= 16", TABLE_NAMES)
    )

    assert names == [run_name(row.point, row.final) for row in ordered]
