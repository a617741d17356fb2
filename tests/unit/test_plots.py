"""The pictures and the page of a sweep."""

import io
import re
from pathlib import Path

import pytest
from PIL import Image

from service import plots
from service.groups import group_rows, is_far, pareto_front, scored_rows
from service.ledger import SweepView, replay
from service.report import best
from service.report_page import draw_page
from tests.ledgers import CLIP, EMA, PRUNE, WARMDOWN, Sweep
from trainer.protocol import ARTIFACT_BYTES_CAP

MAX_PAGE_BYTES = 6_000_000


@pytest.fixture(scope="module")
def view(tmp_path_factory: pytest.TempPathFactory) -> SweepView:
    return replay(Sweep(tmp_path_factory.mktemp("home")).write())


@pytest.fixture(scope="module")
def page(view: SweepView) -> str:
    return draw_page(view)


def empty_view(folder: Path) -> SweepView:
    sweep = Sweep(folder)
    with sweep.open() as ledger:
        sweep.start(ledger)
        return ledger.view


def test_report_writes_a_picture_a_page_and_a_table(view: SweepView, tmp_path: Path) -> None:
    files = plots.write_report(view, tmp_path / "report")

    assert [file.name for file in files.files()] == [
        "bpb_by_bytes.png", "report.html", "finals.csv",
    ]  # fmt: skip
    with Image.open(files.png) as image:
        assert image.width >= 1_000
    assert files.csv.read_text().count("\n") == 17


def test_picture_is_the_same_each_time(view: SweepView) -> None:
    assert plots.draw_png(view) == plots.draw_png(view)


@pytest.mark.parametrize(
    "sweep",
    [
        {"space": {WARMDOWN: [2500]}},
        {"mean_bytes": 19_000_000},
        {"mean_bytes": 410_000},
        {"cap_bytes": None},
    ],
    ids=["one point", "none feasible", "cap far away", "no cap"],
)
def test_picture_and_page_are_drawn_for_odd_sweeps(sweep: dict, tmp_path: Path) -> None:
    view = replay(Sweep(tmp_path, **sweep).write())

    image = Image.open(io.BytesIO(plots.draw_png(view)))
    page = draw_page(view)

    assert len(image.convert("RGB").getcolors(100_000)) > 10
    assert "parallel" in page


def test_sweep_without_finals_has_a_picture_and_a_page(tmp_path: Path) -> None:
    view = empty_view(tmp_path)

    page = draw_page(view)

    assert plots.draw_png(view).startswith(b"\x89PNG")
    assert "No final is feasible and legal" in page


def test_page_is_one_file_of_moderate_size(page: str) -> None:
    loaded = re.findall(r"<(?:script|link|img)[^>]+(?:src|href)=[^>]+", page)

    assert loaded == []
    assert len(page.encode()) < MAX_PAGE_BYTES


def test_page_lists_every_final_and_the_facts(view: SweepView, page: str) -> None:
    assert page.count("<tr class=") == len(view.finals) == 16
    assert view.started["facts"]["data_digest"] in page
    assert f"{best(view)['result']['artifact_bytes']:,}" in page


def test_page_escapes_what_comes_from_a_spec(tmp_path: Path) -> None:
    evil = "</script><script>alert(1)</script>"
    view = replay(Sweep(tmp_path, space={CLIP: ["none", evil]}).write())

    page = draw_page(view)

    assert evil not in page
    assert "<script>alert" not in page


def test_pareto_front_is_what_no_other_beats(view: SweepView) -> None:
    able = [row for row in scored_rows(view) if row.state == "succeeded"]
    slow = [
        row
        for row in able
        if not any(
            other.artifact_bytes <= row.artifact_bytes
            and other.val_bpb <= row.val_bpb
            and other is not row
            for other in able
        )
    ]

    front = pareto_front(scored_rows(view))

    assert front == sorted(slow, key=lambda row: row.artifact_bytes)


def test_many_values_of_a_number_are_drawn_as_four_ranges(tmp_path: Path) -> None:
    ratios = [round(0.01 * index, 2) for index in range(12)]
    space = {WARMDOWN: [3000], PRUNE: ratios, EMA: [0.997]}
    view = replay(Sweep(tmp_path, mean_bytes=410_000, space=space).write())

    name, groups = group_rows(view, scored_rows(view))

    assert name == "prune.ratio"
    assert [len(group.rows) for group in groups] == [3, 3, 3, 3]


def test_cap_is_drawn_only_near_the_points(view: SweepView) -> None:
    rows = scored_rows(view)

    assert not is_far(rows, ARTIFACT_BYTES_CAP)
    assert is_far(rows, 10 * ARTIFACT_BYTES_CAP)
