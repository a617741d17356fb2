"""The report of a sweep as one HTML file."""

import copy
import json
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from service.ledger import SweepView, replay
from service.report import best
from service.report_page import draw_page, report_html
from tests.ledgers import CLIP, EMA, PRUNE, WARMDOWN, Sweep
from tests.seeded import Seeded, point
from tests.showcase import Showcase, write_tensors

MAX_PAGE_BYTES = 6_000_000
PLOTS = {
    "plane", "history", "pareto", "parallel", "slice", "importance", "edf", "curves", "sizes",
    "forecast", "cost",
}  # fmt: skip
HOSTILE = "</script><script>alert(1)</script>"


@pytest.fixture(scope="module")
def show(tmp_path_factory: pytest.TempPathFactory) -> tuple[Showcase, SweepView, str]:
    sweep = Showcase(tmp_path_factory.mktemp("home"))
    view = sweep.write()
    top = best(view)
    assert top is not None
    write_tensors(sweep.paths, top["final"], top["result"])
    return sweep, view, report_html(view, sweep.paths)


def figures(page: str) -> dict[str, dict[str, Any]]:
    """What the page draws, by section."""
    found = re.findall(r"<script type='application/json' id='data-(\w+)'>(.*?)</script>", page)
    return {name: json.loads(text) for name, text in found}


def traces(page: str, section: str) -> dict[str, dict[str, Any]]:
    return {trace.get("name", ""): trace for trace in figures(page)[section]["data"]}


def section(page: str, name: str) -> str:
    return page.partition(f"<section id='{name}'")[2].partition("</section>")[0]


def some_finals(home: Path, num: int, **facts: Any) -> tuple[Sweep, SweepView]:
    sweep = Sweep(home, mean_bytes=15_000_000)
    with sweep.open() as ledger:
        sweep.start(ledger)
        train_point = sweep.train_points()[0]
        sweep.train(ledger, train_point)
        for final_point in sweep.final_points(train_point)[:num]:
            sweep.score(ledger, final_point, **facts)
        return sweep, ledger.view


def test_page_is_one_file_of_moderate_size_with_320_finals(show) -> None:
    _, view, page = show

    loaded = re.findall(r"<(?:script|link|img)[^>]+(?:src|href)=[^>]+", page)

    assert len(view.finals) > 320
    assert loaded == []
    assert len(page.encode()) < MAX_PAGE_BYTES
    assert page.count("plotly.js v") == 1


def test_every_plot_is_drawn_and_told_how_to_read(show) -> None:
    *_, page = show

    assert set(figures(page)) == PLOTS
    assert all("<figcaption>" in section(page, name) for name in PLOTS)


def test_the_contents_lead_to_every_section(show) -> None:
    *_, page = show

    links = re.findall(r"<li><a href='#(\w+)'>", page)

    assert links == re.findall(r"<section id='(\w+)'", page)
    assert {*links} == PLOTS | {"finals", "facts"}


def test_history_marks_what_is_infeasible_and_what_confirms(show) -> None:
    _, view, page = show

    drawn = traces(page, "history")
    layout = figures(page)["history"]["layout"]

    states = [event["state"] for event in view.finals.values()]
    assert len(drawn["feasible and legal"]["x"]) == states.count("succeeded")
    assert len(drawn["infeasible or illegal"]["x"]) == len(states) - 4 - states.count("succeeded")
    assert [shape["x0"] for shape in layout["shapes"]] == [319.5]  # the nine finals of the end


def test_a_point_of_several_seeds_is_a_mean_with_whiskers(tmp_path: Path) -> None:
    sweep = Seeded(tmp_path, search=(1, 2, 3))
    sweep.add("search", point(2500), {1: 1.10, 2: 1.12, 3: 1.17})
    sweep.add("search", point(3500), {1: 1.11})

    drawn = figures(draw_page(sweep.view()))["plane"]["data"]

    (mean,) = [trace for trace in drawn if "error_y" in trace]
    assert mean["y"] == [pytest.approx(1.13)]
    assert mean["error_y"]["array"] == [pytest.approx(0.04)]
    assert mean["error_y"]["arrayminus"] == [pytest.approx(0.03)]
    faint = [trace for trace in drawn if trace.get("marker", {}).get("opacity")]
    assert [trace["y"] for trace in faint] == [[1.10, 1.12, 1.17]]


def test_forecast_tells_its_median_error(tmp_path: Path) -> None:
    sweep, view = some_finals(tmp_path, 3)
    for event, share in zip(view.finals.values(), (1.01, 0.98, 1.04), strict=True):
        real = event["result"]["artifact_bytes"]
        event["result"]["forecast_bytes"] = round(real * share)

    page = report_html(view, sweep.paths)

    assert "Median error 2.00% over 3 artifacts" in section(page, "forecast")


def test_an_illegal_artifact_under_the_cap_is_over_no_limit(tmp_path: Path) -> None:
    sweep, view = some_finals(tmp_path, 3)
    for event in view.finals.values():
        event["result"]["forecast_bytes"] = event["result"]["artifact_bytes"]
    last = [*view.finals.values()][-1]
    last |= {"state": "illegal", "reason": "audit"}

    drawn = traces(report_html(view, sweep.paths), "forecast")

    assert len(drawn["feasible and legal"]["x"]) == 2
    assert drawn["does not count"]["x"] == [last["result"]["artifact_bytes"] / 1e6]


def test_the_distribution_is_of_what_counts(tmp_path: Path) -> None:
    sweep, view = some_finals(tmp_path, 4)
    first, *rest = view.finals.values()
    first |= {"state": "infeasible", "reason": "over the cap"}
    first["result"]["score"]["val_bpb"] = 0.5

    (line,) = figures(report_html(view, sweep.paths))["edf"]["data"]
    for event in rest:
        event["state"] = "illegal"
    page = report_html(view, sweep.paths)

    assert line["name"].endswith("(3)")
    assert "No final of the search is feasible and legal" in section(page, "edf")


def test_the_training_of_the_confirmed_best_is_drawn_in_black(show) -> None:
    sweep, known, _ = show
    view = copy.deepcopy(known)
    for event in view.finals.values():  # the search was luckier with another training
        if event["phase"] == "search" and event["point"][WARMDOWN] == 2500 and event["result"]:
            event["result"]["score"]["val_bpb"] -= 0.2
    top = best(view)
    assert top is not None
    seed = top["seed"]

    page = report_html(view, sweep.paths)
    for event in view.finals.values():
        event["state"] = "illegal"
    nothing = report_html(view, sweep.paths)

    black = next(t for t in figures(page)["curves"]["data"] if t.get("legendgroup") == "best")
    assert black["name"].endswith(f"s{seed}")
    assert "Black is the training of the best final" in section(page, "curves")
    assert "Black is the training" not in section(nothing, "curves")


def test_cost_is_held_against_the_budget(show) -> None:
    *_, page = show

    figure = figures(page)["cost"]

    texts = [note["text"] for note in figure["layout"]["annotations"]]
    assert "budget 24 GPU-hours" in texts
    assert "USD" in section(page, "cost")
    names = [label for trace in figure["data"] if "orientation" in trace for label in trace["y"]]
    assert any(name.startswith("trunk ") for name in names)
    assert any(name.startswith("finals of wd4000") for name in names)


def test_loss_and_phases_are_drawn_from_the_store(show) -> None:
    *_, page = show

    phases = traces(page, "curves")

    assert {"setup", "trunk", "train", "warmdown", "validate"} <= set(phases)


def test_without_a_store_the_clock_stands_in_for_the_curves(show) -> None:
    _, view, _ = show

    page = draw_page(view)

    assert set(traces(page, "curves")) >= {"train", "validate"}
    assert "which was not at hand" in section(page, "curves")
    assert "its artifact is not at hand" in section(page, "sizes")


def test_few_finals_say_that_importances_need_more(tmp_path: Path) -> None:
    sweep, view = some_finals(tmp_path, 1)

    page = report_html(view, sweep.paths)

    assert "Too few scored finals to tell" in section(page, "importance")
    assert set(figures(page)) == PLOTS - {"importance", "sizes"}


@pytest.mark.parametrize(
    ("facts", "has_scores"),
    [
        ({"state": "failed", "reason": "gone", "result": None}, False),
        ({"state": "stopped", "reason": "place 9", "result": None}, False),
        ({"state": "illegal", "reason": "clock"}, True),
        ({"state": "infeasible", "reason": "over"}, True),
    ],
    ids=["failed", "stopped", "illegal", "infeasible"],
)
def test_a_sweep_where_nothing_counts_has_a_page(
    facts: dict[str, Any], has_scores: bool, tmp_path: Path
) -> None:
    sweep, view = some_finals(tmp_path, 8, **facts)

    page = report_html(view, sweep.paths)

    assert "No final is feasible and legal" in page
    assert ("plane" in figures(page)) == has_scores
    assert page.count("<tr class=") == 8


def test_a_sweep_that_has_not_begun_has_a_page_without_plots(tmp_path: Path) -> None:
    sweep = Sweep(tmp_path)
    with sweep.open() as ledger:
        sweep.start(ledger)

        pages = [draw_page(ledger.view), draw_page(SweepView())]

    assert [figures(page) for page in pages] == [{}, {}]
    assert all("No final has a score yet." in page for page in pages)


def test_a_knob_that_some_points_lack_is_absent_there(show) -> None:
    *_, page = show

    dimensions = figures(page)["parallel"]["data"][0]["dimensions"]

    level = next(each for each in dimensions if each["label"] == "compress.level")
    assert level["ticktext"] == ["absent", "19", "22"]


def test_page_lists_every_final_and_the_facts(show) -> None:
    _, view, page = show

    assert page.count("<tr class=") == len(view.finals)
    assert view.started["facts"]["data_digest"] in page
    top = best(view)
    assert top is not None
    assert f"{top['result']['artifact_bytes']:,}" in page


def test_table_can_be_sorted_by_keyboard(show) -> None:
    *_, page = show

    heads = re.findall(r"<th scope='col'>(.*?)</th>", page)

    assert heads
    assert all(head.startswith("<button type='button'>") for head in heads)


def test_page_escapes_what_comes_from_a_spec(tmp_path: Path) -> None:
    view = replay(Sweep(tmp_path, space={CLIP: ["none", HOSTILE], WARMDOWN: [2500]}).write())
    view.started |= {"name": HOSTILE, "recipe": HOSTILE, "facts": {HOSTILE: HOSTILE}}
    event = next(iter(view.finals.values()))
    event |= {"state": "illegal", "reason": HOSTILE}

    page = draw_page(view)

    assert HOSTILE not in page
    assert "<script>alert" not in json.dumps(figures(page))


def test_knobs_of_any_kind_are_drawn(tmp_path: Path) -> None:
    ratios = [round(0.01 * number, 2) for number in range(14)]
    view = replay(Sweep(tmp_path, space={CLIP: ["none", "p5"], PRUNE: ratios}).write())
    view.started["spec"]["space"] = {PRUNE: {"min": 0.001, "max": 0.2, "scale": "log"}}
    for number, event in enumerate(view.finals.values()):
        event["point"][CLIP] = number % 2 == 0
        event["point"][PRUNE] += 0.001

    layout = figures(draw_page(view))["slice"]["layout"]

    assert layout["xaxis"]["ticktext"] == ["off", "on"]
    assert layout["xaxis2"]["type"] == "log"


def test_values_that_look_alike_have_places_of_their_own(tmp_path: Path) -> None:
    space = {EMA: [0.99995, 0.99997, 0.9], CLIP: ["none"]}
    view = replay(Sweep(tmp_path, mean_bytes=15_000_000, space=space).write())

    drawn = figures(draw_page(view))

    axis = drawn["slice"]["layout"]["xaxis"]
    marks = [trace for trace in drawn["slice"]["data"] if trace.get("xaxis") == "x"]
    dots, medians = (trace for trace in marks if trace["x"])
    lines = next(d for d in drawn["parallel"]["data"][0]["dimensions"] if d["label"] == "ema_decay")
    texts = ["0.9", "0.99995", "0.99997"]
    assert (axis["tickvals"], axis["ticktext"], lines["ticktext"]) == ([0, 1, 2], texts, texts)
    assert sorted(dots["x"]) == sorted(medians["x"]) == sorted(lines["values"]) == [0, 1, 2]


def test_pages_may_be_drawn_from_several_threads(tmp_path: Path) -> None:
    sweep, view = some_finals(tmp_path, 4)

    with ThreadPoolExecutor(3) as pool:
        pages = {*pool.map(lambda _: report_html(view, sweep.paths), range(3))}

    assert pages == {report_html(view, sweep.paths)}
