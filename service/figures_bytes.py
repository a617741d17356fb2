"""The figures of bytes: bpb over bytes with the seeds' whiskers, the waterfall, the forecast."""

import html
import statistics
from collections.abc import Sequence
from typing import Any

import plotly.graph_objects as go

from service.confirmed import counts, key_of
from service.figures import (
    BPB_TITLE,
    GRID,
    MAIN,
    SIZE_TITLE,
    Finals,
    add_cap,
    dot,
    hollow,
    laid_out,
    ring,
)
from service.groups import CAP, INK, MB, QUIET, coordinates, group_rows, pareto_front
from service.report import Row, best
from service.states import State
from service.waterfall import SizeStep


def plane_figure(finals: Finals) -> go.Figure:
    """val bpb over bytes; a point of several seeds is its mean, its range and each seed, faint."""
    figure = go.Figure()
    name, groups = group_rows(finals.view, finals.rows)
    for group in groups:
        rows = [row for row in group.rows if row.state == State.SUCCEEDED]
        _add_points(figure, finals, rows, html.escape(group.label), group.colour)
    for state, symbol in ((State.INFEASIBLE, "circle-open"), (State.ILLEGAL, "x-open")):
        rest = [row for row in finals.rows if row.state == state]
        if rest:
            _add_rows(figure, finals, rest, name=str(state), marker=hollow(symbol))
    x, y = coordinates(pareto_front(finals.rows))
    line = {"color": INK, "width": 1, "shape": "hv", "dash": "dot"}
    figure.add_scatter(x=x, y=y, mode="lines", line=line, name="Pareto front", hoverinfo="skip")
    if (top := best(finals.view)) is not None:
        result = top["result"]
        ring(figure, result["artifact_bytes"] / MB, result["score"]["val_bpb"], "best")
    add_cap(figure, coordinates(finals.rows)[0], finals.cap_bytes)
    return laid_out(
        figure, height=520, xaxis_title=SIZE_TITLE, yaxis_title=BPB_TITLE,
        legend_title_text=html.escape(name),
    )  # fmt: skip


def _add_points(
    figure: go.Figure, finals: Finals, rows: Sequence[Row], name: str, colour: str
) -> None:
    """One marker a point, and where a point has several seeds, its whiskers and the seeds."""
    points: dict[str, list[Row]] = {}
    for row in rows:
        fitted = finals.view.finals[row.final].get("fitted", False)
        points.setdefault(f"{key_of(row.point)}{fitted}", []).append(row)
    lone = [seeds[0] for seeds in points.values() if len(seeds) == 1]
    repeated = [seeds for seeds in points.values() if len(seeds) > 1]
    is_large = len(finals.rows) <= 80
    if lone:
        _add_rows(figure, finals, lone, name=name, marker=dot(colour, is_large=is_large))
    if not repeated:
        return
    faint = [row for seeds in repeated for row in seeds]
    marker = {"size": 5, "color": colour, "opacity": 0.35}
    _add_rows(figure, finals, faint, name=name, marker=marker, showlegend=False)
    sizes, scores = zip(*(coordinates(seeds) for seeds in repeated), strict=True)
    figure.add_scatter(
        x=[statistics.fmean(values) for values in sizes],
        y=[statistics.fmean(values) for values in scores],
        error_x=_whiskers(sizes, colour),
        error_y=_whiskers(scores, colour),
        mode="markers",
        name=name,
        marker=dot(colour, symbol="diamond"),
        showlegend=not lone,
        **finals.pointed((seeds[0].final for seeds in repeated), [*map(_seeds_text, repeated)]),
    )


def _add_rows(figure: go.Figure, finals: Finals, rows: Sequence[Row], **look: Any) -> None:
    x, y = coordinates(rows)
    pointed = finals.pointed(row.final for row in rows)
    figure.add_scatter(x=x, y=y, mode="markers", **pointed, **look)


def _whiskers(samples: Sequence[Sequence[float]], colour: str) -> dict[str, Any]:
    """From the least to the greatest."""
    means = [statistics.fmean(values) for values in samples]
    return {
        "type": "data",
        "symmetric": False,
        "array": [max(values) - mean for values, mean in zip(samples, means, strict=True)],
        "arrayminus": [mean - min(values) for values, mean in zip(samples, means, strict=True)],
        "color": colour,
        "thickness": 1.2,
        "width": 4,
    }


def _seeds_text(seeds: Sequence[Row]) -> str:
    scores = coordinates(seeds)[1]
    each = ", ".join(f"{row.seed}: {row.val_bpb:.4f}" for row in seeds)
    return (
        f"<b>mean of {len(seeds)} seeds {statistics.fmean(scores):.5f}</b>, "
        f"sd {statistics.stdev(scores):.5f}<br>{each}"
    )


def sizes_figure(sizes: Sequence[SizeStep], cap_bytes: int | None) -> go.Figure:
    """A waterfall from the first tensor to the whole artifact, with the cap above it."""
    total = sum(step.bytes for step in sizes)
    amounts = [step.bytes for step in sizes]
    figure = go.Figure(
        go.Waterfall(
            x=[*(html.escape(step.label) for step in sizes), "artifact"],
            y=[*(amount / MB for amount in amounts), 0],
            measure=[*("relative" for _ in sizes), "total"],
            customdata=[[f"{amount:,}", f"{amount / total:.2%}"] for amount in (*amounts, total)],
            hovertemplate="%{x}: %{customdata[0]} bytes, %{customdata[1]}<extra></extra>",
            connector={"line": {"color": QUIET, "width": 1}},
            increasing={"marker": {"color": MAIN}},
            totals={"marker": {"color": INK}},
        )
    )
    if cap_bytes is not None:
        figure.add_hline(
            y=cap_bytes / MB, line_color=CAP, annotation_text=f"cap {cap_bytes:,} bytes",
            annotation_font_color=CAP, annotation_position="top left",
        )  # fmt: skip
    figure.update_xaxes(automargin=True)
    return laid_out(figure, height=460, yaxis_title="MB (10⁶ bytes)")


def forecast_pairs(finals: Finals) -> list[tuple[dict[str, Any], int, int]]:
    """Finals whose size was forecast, with the forecast and the real bytes, in order."""
    events = sorted(finals.view.finals.values(), key=lambda event: event["seq"])
    pairs = [
        (event, (event["result"] or {}).get("forecast_bytes"), event["result"]["artifact_bytes"])
        for event in events
        if (event["result"] or {}).get("artifact_bytes") is not None
    ]
    return [(event, forecast, real) for event, forecast, real in pairs if forecast]


def median_error(pairs: Sequence[tuple[Any, int, int]]) -> float:
    """Of |forecast - real| / real."""
    return statistics.median(abs(forecast - real) / real for _, forecast, real in pairs)


def forecast_figure(finals: Finals, pairs: Sequence[tuple[dict[str, Any], int, int]]) -> go.Figure:
    """Real over forecast bytes; on the diagonal they are equal."""
    figure = go.Figure()
    ends = [f(value for _, *both in pairs for value in both) / MB for f in (min, max)]
    margin = 0.05 * (ends[1] - ends[0]) or 0.01 * ends[1]
    ends = [ends[0] - margin, ends[1] + margin]
    line = {"color": QUIET, "width": 1.2, "dash": "dash"}
    figure.add_scatter(x=ends, y=ends, mode="lines", line=line, name="equal", hoverinfo="skip")
    for label, is_fit, marker in (
        ("feasible and legal", True, dot(MAIN, is_large=len(pairs) <= 80)),
        ("does not count", False, hollow()),
    ):
        held = [pair for pair in pairs if counts(finals.view, pair[0]) == is_fit]
        errors = [
            f"forecast {forecast:,} bytes, {(forecast - real) / real:+.2%}"
            for _, forecast, real in held
        ]
        if held:
            figure.add_scatter(
                x=[forecast / MB for _, forecast, _ in held], y=[real / MB for *_, real in held],
                mode="markers", marker=marker, name=label,
                **finals.pointed((event["final"] for event, *_ in held), errors),
            )  # fmt: skip
    figure.update_xaxes(gridcolor=GRID, range=ends, title="forecast, MB (10⁶ bytes)")
    figure.update_yaxes(gridcolor=GRID, range=ends, title="artifact as written, MB")
    if finals.cap_bytes is not None and ends[0] <= finals.cap_bytes / MB <= ends[1]:
        figure.add_hline(
            y=finals.cap_bytes / MB, line_color=CAP, line_width=1.2, annotation_text="cap",
            annotation_font_color=CAP,
        )  # fmt: skip
    return laid_out(figure, height=420)
