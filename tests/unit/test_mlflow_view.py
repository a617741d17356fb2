"""The saved view of a runs page."""

import base64
import json
import zlib

from service import mlflow_view

MAX_TAG_CHARS = 20_000


def decoded(view: mlflow_view.SavedView) -> dict:
    state = json.loads(view.value)["state"].removeprefix("deflate;")
    return json.loads(zlib.decompress(base64.b64decode(state)))


def view_of(params: list[str]) -> mlflow_view.SavedView:
    return mlflow_view.saved_view("run1", params, num_finals=16, title="sweep", at_ms=1)


def test_view_lists_the_finals_of_one_sweep_by_score() -> None:
    state = decoded(view_of(["clip"]))

    assert "'run1'" in state["searchFilter"]
    assert "'final'" in state["searchFilter"]
    assert (state["orderByKey"], state["orderByAsc"]) == ("metrics.`final/val_bpb`", True)


def test_every_chart_stands_in_a_section() -> None:
    state = decoded(view_of(["clip", "ema_decay"]))

    sections = {section["uuid"] for section in state["compareRunSections"]}
    charts = state["compareRunCharts"]
    assert [chart["type"] for chart in charts] == ["PARALLEL", "SCATTER", "DIFFERENCE"]
    assert {chart["metricSectionId"] for chart in charts} == sections
    assert charts[0]["selectedParams"] == ["clip", "ema_decay"]


def test_parallel_coordinates_have_two_axes_even_if_nothing_varies() -> None:
    parallel = decoded(view_of([]))["compareRunCharts"][0]

    assert len(parallel["selectedParams"]) + len(parallel["selectedMetrics"]) == 2


def test_links_open_the_stored_view() -> None:
    view = view_of(["clip"])

    for link in (mlflow_view.chart_link("7", "run1"), mlflow_view.table_link("7", "run1")):
        assert link.startswith("#/experiments/7/runs?workflowType=machine_learning&")
        assert f"viewStateShareKey={view.key}&" in link
    assert view.tag == f"mlflow.sharedViewState.{view.key}"


def test_view_of_forty_knobs_fits_in_a_tag() -> None:
    view = view_of([f"part{index}.some_knob" for index in range(40)])

    assert len(view.value) < MAX_TAG_CHARS
