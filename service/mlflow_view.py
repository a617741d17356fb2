"""MLflow's saved view of a runs page: its format, and the links that open it.

The one module that knows this format. It is internal to MLflow (seen in 3.17) and may change with
any minor version, so a failure here may cost the view and nothing else. Everything is pure; the
projection stores the view as a tag of the experiment.

Without a view the runs page opens on the parents alone, with no metric column and the charts of
the first ten runs.
"""

import base64
import hashlib
import json
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote

TAG_PREFIX = "mlflow.sharedViewState."
BPB, MB = "final/val_bpb", "final/artifact_mb"
BYTES, HEADROOM = "final/artifact_bytes", "final/bytes_headroom"
_MAX_COMPARED_RUNS = 100
# What the page shows in which section: name, charts in a row, height of a card in pixels.
_SECTIONS = {
    "PARALLEL": ("Knobs and result", 1, 330),
    "SCATTER": ("Size and score", 1, 390),
    "DIFFERENCE": ("Differences from the first run", 1, 400),
}


@dataclass(frozen=True, slots=True)
class SavedView:
    """A view under the experiment tag `tag`."""

    key: str
    tag: str
    value: str


def saved_view(
    parent_run_id: str, params: Sequence[str], *, num_finals: int, title: str, at_ms: int
) -> SavedView:
    """Build the view of one sweep's finals: a flat list by bpb, and the charts over `params`."""
    key = view_key(parent_run_id)
    state = json.dumps(_state(parent_run_id, params, num_finals)).encode()
    value = {
        "name": title,
        "createdAt": at_ms,
        "updatedAt": at_ms,
        "state": "deflate;" + base64.b64encode(zlib.compress(state)).decode(),
    }
    return SavedView(key=key, tag=TAG_PREFIX + key, value=json.dumps(value))


def view_key(parent_run_id: str) -> str:
    """The key of a sweep's view: fixed by its parent run, so writing again replaces it."""
    return hashlib.sha256(parent_run_id.encode()).hexdigest()


def chart_link(experiment_id: str, parent_run_id: str) -> str:
    """Link to the charts of a sweep's finals, as a fragment of the server's address."""
    return _view_link(experiment_id, parent_run_id, "CHART")


def table_link(experiment_id: str, parent_run_id: str) -> str:
    """Link to the flat, sorted list of a sweep's finals."""
    return _view_link(experiment_id, parent_run_id, "TABLE")


def curves_link(experiment_id: str, parent_run_id: str) -> str:
    """Link to the curves of a sweep's trainings. It needs no saved view."""
    search = quote(children_filter(parent_run_id, "training"), safe="")
    return (
        f"#/experiments/{experiment_id}/runs?workflowType=machine_learning"
        f"&searchFilter={search}&compareRunsMode=CHART"
    )


def children_filter(parent_run_id: str, kind: str) -> str:
    """The search filter that finds a sweep's runs of one kind."""
    return f"tags.\"mlflow.parentRunId\" = '{parent_run_id}' and tags.\"fairway.kind\" = '{kind}'"


def _view_link(experiment_id: str, parent_run_id: str, mode: str) -> str:
    # workflowType: a fresh browser would open the page made for traces instead.
    return (
        f"#/experiments/{experiment_id}/runs?workflowType=machine_learning"
        f"&viewStateShareKey={view_key(parent_run_id)}&compareRunsMode={mode}"
    )


def _state(parent_run_id: str, params: Sequence[str], num_finals: int) -> dict[str, Any]:
    return {
        "searchFilter": children_filter(parent_run_id, "final"),
        "orderByKey": f"metrics.`{BPB}`",
        "orderByAsc": True,
        "startTime": "ALL",
        "lifecycleFilter": "Active",
        "datasetsFilter": [],
        "modelVersionFilter": "All Runs",
        "selectedColumns": _columns(params),
        # Otherwise the page sorts the columns by name, so that the score comes third.
        "columnOrder": ["attributes.`Run Name`", "runDateAndNestInfo", *_columns(params)],
        "columnWidths": _widths(params),
        "runsHiddenMode": "SHOW_ALL",
        "viewMaximized": False,
        "runListHidden": False,
        "isAccordionReordered": True,
        "useGroupedValuesInCharts": True,
        "hideEmptyCharts": True,
        "groupBy": None,
        "groupsExpanded": {},
        "globalLineChartConfig": {
            "xAxisKey": "step",
            "lineSmoothness": 0,
            "selectedXAxisMetricKey": "",
        },
        "compareRunSections": [_section(kind) for kind in _SECTIONS],
        "compareRunCharts": _charts(params, num_finals),
    }


def _columns(params: Sequence[str]) -> list[str]:
    return [
        *(f"metrics.`{metric}`" for metric in (BPB, BYTES, HEADROOM)),
        "tags.`fairway.state`",  # beside the score: the lowest bpb may be over the cap
        *(f"params.`{param}`" for param in params),
        "params.`seed`",
    ]


def _widths(params: Sequence[str]) -> dict[str, int]:
    # Wide enough for the headers: the page cuts what does not fit.
    return {
        "attributes.`Run Name`": 285,
        f"metrics.`{BPB}`": 120,
        f"metrics.`{BYTES}`": 145,
        f"metrics.`{HEADROOM}`": 160,
        **{f"params.`{param}`": max(70, 9 * len(param) + 30) for param in params},
        "params.`seed`": 70,
        "tags.`fairway.state`": 120,
        "runDateAndNestInfo": 130,
    }


def _section(kind: str) -> dict[str, Any]:
    name, columns, height = _SECTIONS[kind]
    return {
        "uuid": _section_key(kind),
        "name": name,
        "columns": columns,
        "cardHeight": height,
        "display": True,
        "isReordered": True,
        "deleted": False,
        "isGenerated": False,
    }


def _section_key(kind: str) -> str:
    return f"fairway-section-{kind.lower()}"


def _charts(params: Sequence[str], num_finals: int) -> list[dict[str, Any]]:
    num_runs = min(max(num_finals, 10), _MAX_COMPARED_RUNS)
    parallel = {
        "selectedParams": list(params),
        "selectedMetrics": [BPB] if params else [MB, BPB],  # it draws no fewer than two axes
        "showAllRuns": True,
    }
    scatter = {
        "xaxis": {"key": MB, "type": "METRIC"},
        "yaxis": {"key": BPB, "type": "METRIC"},
    }
    difference = {
        "compareGroups": ["Model Metrics", "Parameters"],
        "chartName": "Differences from the first run",
        "showChangeFromBaseline": True,
        "showDifferencesOnly": True,
    }
    charts = {"PARALLEL": parallel, "SCATTER": scatter, "DIFFERENCE": difference}
    return [
        {
            "uuid": f"fairway-{kind.lower()}",
            "type": kind,
            "metricSectionId": _section_key(kind),
            "runsCountToCompare": num_runs,
            "deleted": False,
            "isGenerated": False,
            **settings,
        }
        for kind, settings in charts.items()
    ]
