"""The plots that the field knows a search by.

History, EDF and Pareto front are Optuna's own, drawn from `study` and then given the page's colours
and texts. Parallel coordinates are Plotly's, which shows four digits of a bpb and filters by
dragging; slices and importances are bars and dots.
"""

import html
import math
import statistics
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import plotly.graph_objects as go
from optuna.trial import TrialState
from optuna.visualization import plot_edf, plot_optimization_history, plot_pareto_front
from plotly.colors import get_colorscale
from plotly.subplots import make_subplots

from service.confirmed import bpb_of, counts
from service.figures import (
    BPB_TITLE,
    MAIN,
    SIZE_TITLE,
    Finals,
    add_cap,
    dot,
    hollow,
    laid_out,
    shortened,
)
from service.groups import COLOURS, INK, coordinates, group_rows
from service.labels import short_value
from service.report import Row, is_of_search
from service.states import State
from service.study import plane_study, quiet, settled, shown_names, study_of

SLICES_ABREAST = 5
ABSENT, MAX_LEVELS = "absent", 12
_CONFIRM = "rgba(230, 159, 0, 0.13)"
# Of a scale from 0 to 1, the part below this is for what does not count.
_GREY_END = 0.1


def history_figure(finals: Finals) -> go.Figure:
    """val bpb in the order in which the finals were settled, and the best one so far."""
    events = settled(finals.view)
    with quiet():
        figure: Any = plot_optimization_history(
            study_of(finals.view, events), target_name="val bpb"
        )
    names = {"val bpb": "feasible and legal", "Infeasible Trial": "infeasible or illegal"}
    for trace in figure.data:
        if trace.mode == "markers":
            is_fit = trace.name == "val bpb"
            trace.marker = dot(MAIN, is_large=len(events) <= 80) if is_fit else hollow()
            trace.update(finals.pointed(events[number]["final"] for number in trace.x))
            trace.update(name=names[trace.name], showlegend=bool(trace.x))
        else:
            trace.update(name="best so far", line={"color": INK, "width": 1.6, "shape": "hv"})
    for first, last in _runs(event.get("phase") == "confirm" for event in events):
        figure.add_vrect(x0=first - 0.5, x1=last + 0.5, fillcolor=_CONFIRM, line_width=0)
        figure.add_annotation(
            x=(first + last) / 2, y=1, yref="paper", yanchor="bottom", text="confirm",
            showarrow=False,
        )  # fmt: skip
    return laid_out(
        figure, height=420, xaxis_title="finals in the order they were settled",
        yaxis_title=BPB_TITLE, legend={"orientation": "h", "y": 1.14, "x": 0},
        xaxis_range=[-0.7, len(events) - 0.3],
    )  # fmt: skip


def _runs(flags: Iterable[bool]) -> list[tuple[int, int]]:
    """The first and the last place of each stretch of true flags."""
    runs: list[tuple[int, int]] = []
    for place, flag in enumerate(flags):
        if flag and runs and runs[-1][1] == place - 1:
            runs[-1] = (runs[-1][0], place)
        elif flag:
            runs.append((place, place))
    return runs


def slice_figure(finals: Finals) -> go.Figure:
    """val bpb over each knob alone: each final, and the median of those that count."""
    paths = [path for path in shown_names(finals.view) if any(path in r.point for r in finals.rows)]
    # Optuna 5.0 leaves what is infeasible out where a knob has named levels.
    figure = make_subplots(rows=1, cols=len(paths), shared_yaxes=True)
    for place, path in enumerate(paths, 1):
        _add_slice(figure, finals, path, place)
    figure.update_yaxes(title=BPB_TITLE, col=1)
    width = None if len(paths) <= SLICES_ABREAST else 60 + 190 * len(paths)
    scale = {"colorscale": "Viridis", "colorbar": {"title": "final", "thickness": 12}}
    legend = {"orientation": "h", "y": 1.16, "x": 0}
    return laid_out(figure, height=390, width=width, coloraxis=scale, legend=legend)


def _add_slice(figure: go.Figure, finals: Finals, path: str, place: int) -> None:
    events = [event for event in finals.events() if path in event["point"]]
    numbers = {event["final"]: number for number, event in enumerate(finals.events())}
    values = {event["final"]: event["point"][path] for event in events}
    is_range = _is_range(list(values.values()))
    levels = [] if is_range else _in_order(values.values())
    shown = values if is_range else {k: levels.index(v) for k, v in values.items()}
    for is_fit in (False, True):
        held = [e for e in events if counts(finals.view, e) == is_fit]
        places = [numbers[event["final"]] for event in held]
        marker = dot(places, is_large=False, coloraxis="coloraxis") if is_fit else hollow()
        figure.add_scatter(
            x=[shown[event["final"]] for event in held], y=[bpb_of(event) for event in held],
            mode="markers", marker=marker, name="" if is_fit else "infeasible or illegal",
            showlegend=not is_fit and place == 1 and bool(held), row=1, col=place,
            **finals.pointed(event["final"] for event in held),
        )  # fmt: skip
    axis: dict[str, Any] = {"type": "log" if _is_log(finals, path) else "linear"}
    if not is_range:
        axis = {"type": "linear", "range": [-0.5, len(levels) - 0.5], "zeroline": False}
        axis |= {"tickvals": [*range(len(levels))]}
        axis |= {"ticktext": [shortened(text) for text in _level_texts(levels)]}
        _add_medians(figure, [e for e in events if counts(finals.view, e)], shown, place)
    figure.update_xaxes(title=shown_names(finals.view)[path], col=place, **axis)


def _add_medians(
    figure: go.Figure, events: Sequence[dict[str, Any]], shown: dict[str, Any], place: int
) -> None:
    scores: dict[int, list[float]] = {}
    for event in events:
        scores.setdefault(shown[event["final"]], []).append(bpb_of(event))
    marker = {"symbol": "line-ew", "size": 22, "line": {"width": 2.5, "color": COLOURS[5]}}
    figure.add_scatter(
        x=[*scores], y=[statistics.median(held) for held in scores.values()], mode="markers",
        marker=marker, name="median", showlegend=place == 1, row=1, col=place,
        legendgroup="median", hovertemplate="median %{y:.5f}<extra></extra>",
    )  # fmt: skip


def _is_range(values: Sequence[Any]) -> bool:
    """Whether a knob has so many numbers that they are no levels any more."""
    is_number = all(isinstance(v, int | float) and not isinstance(v, bool) for v in values)
    return is_number and len(set(values)) > MAX_LEVELS


def _in_order(values: Iterable[Any]) -> list[Any]:
    """Different values: numbers by size, then texts."""
    return sorted(set(values), key=lambda v: (isinstance(v, str), v))


def _level_texts(levels: Sequence[Any]) -> list[str]:
    """What different values are called: in full where the short text of two is the same."""
    taken = Counter(short_value(level) for level in levels)
    return [short_value(v) if taken[short_value(v)] == 1 else repr(v) for v in levels]


def importance_figure(finals: Finals, shares: dict[str, float]) -> go.Figure:
    """Bars, the most important knob on top."""
    names = shown_names(finals.view)
    paths = list(shares)[::-1]
    figure = go.Figure(
        go.Bar(
            x=[shares[path] for path in paths],
            y=[names[path] for path in paths],
            text=[f"{shares[path]:.0%}" for path in paths],
            customdata=[html.escape(path) for path in paths],
            textposition="outside",
            cliponaxis=False,
            orientation="h",
            marker_color=MAIN,
            hovertemplate="%{customdata}: %{x:.3f}<extra></extra>",
        )
    )
    height = 110 + 30 * len(paths)
    figure.update_xaxes(title="importance", tickformat=".0%", rangemode="tozero")
    figure.update_yaxes(automargin=True, type="category")
    return laid_out(figure, height=height, bargap=0.35, margin={"t": 10, "r": 50, "b": 50})


def edf_figure(finals: Finals) -> tuple[go.Figure | None, str]:
    """The share of the finals that count that are as good as a bpb or better, and by what they are
    told apart. None where none of the search counts."""
    name, groups = _edf_groups(finals)
    view = finals.view
    if not any(rows for _, _, rows in groups):
        return None, name
    with quiet():
        studies = [
            study_of(view, [view.finals[row.final] for row in rows], label)
            for label, _, rows in groups
        ]
        figure: Any = plot_edf(studies, target_name="val bpb")
    for trace, (label, colour, rows) in zip(figure.data, groups, strict=True):
        line = {"color": colour, "width": 2, "shape": "hv"}
        trace.update(line=line, name=f"{html.escape(label)} ({len(rows)})")
    figure = laid_out(
        figure, height=380, xaxis_title="val bpb", yaxis_title="share of finals",
        legend_title_text=html.escape(name), showlegend=True,
    )  # fmt: skip
    return figure.update_yaxes(range=[0, 1.02], tickformat=".0%"), name


def _edf_groups(finals: Finals) -> tuple[str, list[tuple[str, str, list[Row]]]]:
    """The search's finals that count by seed where it has several, else by the train knob that
    explains most. What only confirms is left out: those points were chosen."""
    view = finals.view
    events = [(row, view.finals[row.final]) for row in finals.rows]
    rows = [row for row, e in events if counts(view, e) and is_of_search(view, e)]
    seeds = sorted({row.seed for row in rows})
    if len(seeds) > 1:
        return "seed", [
            (str(seed), COLOURS[place % len(COLOURS)], [row for row in rows if row.seed == seed])
            for place, seed in enumerate(seeds)
        ]
    name, groups = group_rows(view, rows, "train")
    return name, [(group.label, group.colour, group.rows) for group in groups if group.rows]


def pareto_figure(finals: Finals) -> go.Figure:
    """The finals that no other beats in bytes and bpb at once, among all of them."""
    events = finals.events()
    with quiet():
        study = plane_study(finals.view, events)
        figure: Any = plot_pareto_front(study, target_names=["MB", "val bpb"])
        done = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    alike: dict[tuple[float, ...], list[str]] = {}
    for trial in done:
        alike.setdefault((*trial.values,), []).append(events[trial.number]["final"])
    rest, beaten, front = figure.data
    looks = [
        (rest, hollow(), "infeasible or illegal"),
        (beaten, dot("#9ecae1"), "beaten by another"),
        (front, dot(MAIN), "Pareto front"),
    ]
    for trace, marker, name in looks:
        there = [alike[place] for place in zip(trace.x, trace.y, strict=True)]
        also = ["" if len(same) == 1 else f"and {len(same) - 1} alike" for same in there]
        trace.marker = marker
        trace.update(finals.pointed((same[0] for same in there), also), name=name)
        trace.showlegend = bool(trace.x)
    edge = sorted(zip(front.x, front.y, strict=True))
    figure.add_scatter(
        x=[x for x, _ in edge], y=[y for _, y in edge], mode="lines", hoverinfo="skip",
        line={"color": INK, "width": 1, "shape": "hv"}, showlegend=False,
    )  # fmt: skip
    add_cap(figure, coordinates(finals.rows)[0], finals.cap_bytes)
    return laid_out(
        figure, height=420, xaxis_title=SIZE_TITLE, yaxis_title=BPB_TITLE,
        legend={"orientation": "h", "y": 1.16, "x": 0},
    )  # fmt: skip


def parallel_figure(finals: Finals) -> go.Figure:
    """A line a final through its knobs, its size and its bpb; what does not count is grey."""
    rows = finals.rows[::-1]  # drawn one over the other: the best last
    dimensions = [
        _dimension(name, [row.point.get(path) for row in rows], is_log=_is_log(finals, path))
        for path, name in shown_names(finals.view).items()
    ]
    sizes, scores = coordinates(rows)
    dimensions += [
        {"label": "artifact MB", "values": sizes, "tickformat": ".2f"},
        {"label": "val bpb", "values": scores, "tickformat": ".4f"},
    ]
    line = {"color": _shades(rows), "colorscale": _scale(), "cmin": 0.0, "cmax": 1.0}
    figure = go.Figure(go.Parcoords(line=line, dimensions=dimensions, labelside="top"))
    return laid_out(figure, height=440, margin={"t": 70, "l": 80, "r": 70, "b": 30})


def _shades(rows: Sequence[Row]) -> list[float]:
    """A place on the scale: by bpb among those that count, at its grey end for the rest."""
    scores = [row.val_bpb or 0.0 for row in rows if row.state == State.SUCCEEDED]
    low, span = min(scores, default=0.0), max(scores, default=0.0) - min(scores, default=0.0)
    return [
        1.0 - (1.0 - 1.5 * _GREY_END) * ((row.val_bpb or 0.0) - low) / (span or 1.0)
        if row.state == State.SUCCEEDED
        else 0.0
        for row in rows
    ]


def _scale() -> list[list[Any]]:
    """Grey, then from yellow for the worst to violet for the best."""
    steps = [
        [_GREY_END + (1 - _GREY_END) * (1 - place), colour]
        for place, colour in get_colorscale("Viridis")
    ]
    return [[0.0, "#d0d0d0"], [_GREY_END, "#d0d0d0"], *steps[::-1]]


def _is_log(finals: Finals, path: str) -> bool:
    space = (finals.view.started.get("spec") or {}).get("space") or {}
    return space.get(path, {}).get("scale") == "log"


def _dimension(name: str, values: Sequence[Any], *, is_log: bool) -> dict[str, Any]:
    """One axis: a place for each of a few values, a range for many numbers; what a point lacks
    lies below all."""
    given = [value for value in values if value is not None]
    levels = _in_order(given)
    has_absent = len(given) < len(values)
    if not _is_range(given):
        labels = [ABSENT] * has_absent + _level_texts(levels)
        places = [0 if v is None else levels.index(v) + has_absent for v in values]
        return _axis(name, places, [*range(len(labels))], labels)
    scale, back = (math.log10, lambda x: 10.0**x) if is_log else (float, float)
    low, high = scale(levels[0]), scale(levels[-1])
    below = low - 0.15 * (high - low)
    ticks = [low + (high - low) * quarter / 4 for quarter in range(5)]
    labels = [ABSENT] * has_absent + [f"{back(tick):.4g}" for tick in ticks]
    places = [below if value is None else scale(value) for value in values]
    return _axis(name, places, [below] * has_absent + ticks, labels)


def _axis(
    name: str, places: Sequence[float], ticks: Sequence[float], labels: Sequence[str]
) -> dict[str, Any]:
    texts = [shortened(label) for label in labels]
    return {"label": name, "values": places, "tickvals": ticks, "ticktext": texts}
