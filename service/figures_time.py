"""The figures of time and money: losses over the wall clock, phases, what was spent on what."""

import html
from collections.abc import Iterable, Sequence
from typing import Any

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from service.budget import PHASES as SPENT_ON
from service.budget import Account, spent
from service.figures import laid_out, thinned
from service.groups import CAP, COLOURS, INK
from service.ledger import SweepView
from service.specs import Budget
from service.timelines import PHASES, Mark, Timeline, training_label
from trainer.codec import parse

BANDED, MARKS, STAGES = 12, 400, 24
"""Trainings whose phases are drawn, points of one curve, stages whose cost is."""

Cost = tuple[dict[str, Any], dict[str, float]]
"""An event that was paid for, and its GPU-hours by phase."""

_PHASE_COLOURS: dict[str, str] = dict(
    zip(
        PHASES,
        ("#d9d9d9", "#bdbdbd", "#56B4E9", "#0072B2", "#009E73", "#E69F00", "#CC79A7", "#D55E00"),
        strict=True,
    )
)
_SPENT_COLOURS: dict[str, str] = dict(
    zip(SPENT_ON, (COLOURS[0], COLOURS[2], COLOURS[1]), strict=True)
)


def curves_figure(timelines: Sequence[Timeline]) -> go.Figure:
    """Losses and val bpb over the seconds of each training, and below them its phases. The first
    timeline stands out."""
    banded = timelines[:BANDED]
    heights = [250, 190, 24 + 22 * len(banded)]
    figure: Any = make_subplots(
        rows=3, cols=1, shared_xaxes=True, vertical_spacing=0.03, row_heights=heights
    )
    for timeline in timelines[:0:-1]:
        _add_curves(figure, timeline, is_first=False)
    _add_curves(figure, timelines[0], is_first=True)
    _add_bands(figure, banded)
    for band in timelines[0].bands:
        if band.phase in ("warmdown", "validate"):
            for row in (1, 2):
                figure.add_vrect(
                    x0=band.start_s, x1=band.end_s, fillcolor=_PHASE_COLOURS[band.phase],
                    opacity=0.13, line_width=0, layer="below", row=row, col=1,
                )  # fmt: skip
    figure.update_xaxes(title="seconds of the training, setup included", row=3, col=1)
    losses = _settled(timeline.loss for timeline in timelines)
    scores = _settled(timeline.val_bpb for timeline in timelines)
    figure.update_yaxes(title="loss, nats per token", range=losses, row=1, col=1)
    figure.update_yaxes(title="val bpb", range=scores, row=2, col=1)
    figure.update_yaxes(automargin=True, autorange="reversed", row=3, col=1, type="category")
    legend = {"orientation": "h", "y": 1.02, "x": 0, "yanchor": "bottom", "tracegroupgap": 0}
    return laid_out(
        figure, height=150 + sum(heights), barmode="overlay", bargap=0.25, legend=legend
    )


def _settled(lines: Iterable[Sequence[Mark]]) -> list[float] | None:
    """A range that shows where the lines settle: their fall from the start goes off the top."""
    values = [mark.value for line in lines for mark in line[len(line) // 8 + (len(line) > 2) :]]
    if not values:
        return None
    low, high = min(values), max(values)
    margin = 0.06 * (high - low) or 0.01 * abs(high)
    return [low - margin, high + margin]


def _add_curves(figure: go.Figure, timeline: Timeline, *, is_first: bool) -> None:
    label = html.escape(timeline.label)
    look: dict[str, Any] = {
        "line": {"color": INK if is_first else "#c4c4c4", "width": 1.8 if is_first else 1},
        "legendgroup": "best" if is_first else "others",
        "col": 1,
    }
    for row, marks, value in (
        (1, timeline.loss, "loss %{y:.4f}"),
        (2, timeline.val_bpb, "val bpb %{y:.5f}"),
    ):
        figure.add_scatter(
            **_line(thinned(marks, MARKS), label, value),
            **look,
            row=row,
            mode="lines" if row == 1 else "lines+markers",
            marker={"size": 5},
            name=label,
            showlegend=is_first and row == 1,
        )


def _line(marks: Sequence[Mark], label: str, value: str) -> dict[str, Any]:
    return {
        "x": [round(mark.at_s, 3) for mark in marks],
        "y": [mark.value for mark in marks],
        "customdata": [mark.step for mark in marks],
        "hovertemplate": f"{label}<br>step %{{customdata:,}}, %{{x:,.1f}} s<br>{value}"
        "<extra></extra>",
    }


def _add_bands(figure: go.Figure, timelines: Sequence[Timeline]) -> None:
    for phase in PHASES:
        held = [(t, band) for t in timelines for band in t.bands if band.phase == phase]
        if held:
            figure.add_bar(
                y=[html.escape(timeline.label) for timeline, _ in held],
                x=[round(band.end_s - band.start_s, 3) for _, band in held],
                base=[round(band.start_s, 3) for _, band in held],
                orientation="h", name=phase, marker_color=_PHASE_COLOURS[phase],
                marker_line_width=0, row=3, col=1,
                hovertemplate=f"%{{y}}<br>{phase} %{{x:,.1f}} s, from %{{base:,.1f}} s"
                "<extra></extra>",
            )  # fmt: skip


def clock_figure(view: SweepView) -> go.Figure | None:
    """Seconds by phase of each training, as its result tells them; for when the store is not at
    hand. None where no training has ended."""
    ended = [event for event in view.trainings.values() if event["result"]][:STAGES]
    if not ended:
        return None
    labels = [html.escape(training_label(view, event)) for event in ended]
    figure = go.Figure()
    clocks = [event["result"].get("clock_s") or {} for event in ended]
    for phase in dict.fromkeys(phase for clock in clocks for phase in clock):
        colour = _PHASE_COLOURS[_of_clock(phase)]
        figure.add_bar(
            y=labels, x=[clock.get(phase, 0.0) for clock in clocks], name=phase,
            orientation="h", marker_color=colour,
            hovertemplate=f"%{{y}}<br>{phase} %{{x:,.1f}} s<extra></extra>",
        )  # fmt: skip
    figure.update_yaxes(automargin=True, autorange="reversed", type="category")
    legend = {"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 0}
    return laid_out(
        figure, height=150 + 26 * len(ended), barmode="stack", xaxis_title="seconds",
        legend=legend,
    )  # fmt: skip


def _of_clock(phase: str) -> str:
    """The band that a phase of the trainer's clock is drawn as."""
    return {"warmup": "warm-up", "checkpoint": "checkpoint or wait"}.get(phase, phase)


def cost_figure(view: SweepView) -> go.Figure | None:
    """GPU-hours over time by phase against the budget, and the stages that cost most. None where
    nothing has been spent."""
    spec = view.started.get("spec") or {}
    workers = (spec.get("resources") or {}).get("workers", 1)
    costs = [(event, _hours(event, workers)) for event in view.paid]
    if not costs:
        return None
    num_stages = min(len({_stage(event) for event, _ in costs}), STAGES)
    heights = [300, 30 + 22 * num_stages]
    figure: Any = make_subplots(
        rows=2, cols=1, row_heights=heights, vertical_spacing=90 / (sum(heights) + 90)
    )
    price = (spec.get("budget") or {}).get("usd_per_gpu_hour")
    _add_growth(figure, view, costs, price)
    _add_stages(figure, view, costs)
    _add_budget(figure, view)
    figure.update_xaxes(title="hours since the first start", rangemode="tozero", row=1, col=1)
    figure.update_yaxes(title="GPU-hours", rangemode="tozero", row=1, col=1)
    figure.update_xaxes(title="GPU-hours", row=2, col=1)
    figure.update_yaxes(automargin=True, autorange="reversed", type="category", row=2, col=1)
    legend = {"orientation": "h", "y": 1.01, "yanchor": "bottom", "x": 0}
    return laid_out(figure, height=180 + sum(heights), legend=legend, bargap=0.25, barmode="stack")


def _hours(event: dict[str, Any], workers: int) -> dict[str, float]:
    """The GPU-hours of one paid event by phase, counted as the budget counts them."""
    seconds = spent(SweepView(paid=[event]), workers)
    return {phase: s / 3600 for phase, s in seconds.items() if s}


def _add_growth(
    figure: go.Figure, view: SweepView, costs: Sequence[Cost], price: float | None
) -> None:
    began = view.first_started_at
    sums = dict.fromkeys(SPENT_ON, 0.0)
    times, lines = [0.0], {phase: [0.0] for phase in SPENT_ON}
    for event, hours in sorted(costs, key=lambda cost: cost[0]["seq"]):
        times.append(round((event["at"] - began) / 3600, 5))
        for phase in SPENT_ON:
            sums[phase] += hours.get(phase, 0.0)
            lines[phase].append(round(sums[phase], 6))
    times.append(1.01 * times[-1])  # room for the last step
    for phase in SPENT_ON:
        line = [*lines[phase], lines[phase][-1]]
        if sums[phase]:
            money = None if price is None else [f", {hours * price:,.2f} USD" for hours in line]
            figure.add_scatter(
                x=times, y=line, stackgroup="spent", name=phase, legendgroup=phase,
                line={"color": _SPENT_COLOURS[phase], "width": 1, "shape": "hv"}, row=1, col=1,
                customdata=money, hovertemplate=f"{phase}: %{{y:.4g}} GPU-hours"
                f"{'' if money is None else '%{customdata}'}<extra></extra>",
            )  # fmt: skip


def _add_budget(figure: Any, view: SweepView) -> None:
    account = account_of(view)
    if account is None or account.limit_s is None:
        return
    figure.add_hline(
        y=account.limit_s / 3600, line_color=CAP, line_width=1.5, row=1, col=1,
        annotation_text=f"budget {account.limit_s / 3600:,.4g} GPU-hours",
        annotation_font_color=CAP, annotation_position="top left",
    )  # fmt: skip


def account_of(view: SweepView) -> Account | None:
    """The sweep's budget, if its file has one."""
    written = (view.started.get("spec") or {}).get("budget")
    if not written:
        return None
    return Account(parse(Budget, written, "budget"), view.first_started_at)


def _add_stages(figure: go.Figure, view: SweepView, costs: Sequence[Cost]) -> None:
    """The most expensive stages; finals are summed up by the training that they are made from."""
    names = {key: training_label(view, event) for key, event in view.trainings.items()}
    sums: dict[tuple[str, str], dict[str, float]] = {}
    for event, hours in costs:
        phases = sums.setdefault(_stage(event), {})
        for phase, amount in hours.items():
            phases[phase] = phases.get(phase, 0.0) + amount
    dearest = sorted(sums, key=lambda stage: -sum(sums[stage].values()))[:STAGES]
    labels = [html.escape(_label(kind, key, names)) for kind, key in dearest]
    for phase in SPENT_ON:
        amounts = [sums[stage].get(phase, 0.0) for stage in dearest]
        if any(amounts):
            figure.add_bar(
                y=labels, x=amounts, orientation="h", name=phase, legendgroup=phase,
                showlegend=False, marker_color=_SPENT_COLOURS[phase], row=2, col=1,
                hovertemplate=f"%{{y}}<br>{phase}: %{{x:.4g}} GPU-hours<extra></extra>",
            )  # fmt: skip


def _stage(event: dict[str, Any]) -> tuple[str, str]:
    if event["event"] == "trunk_finished":
        return "trunk", event["trunk"]
    kind = "training" if event["event"] == "training_finished" else "finals of"
    return kind, event["training"]


def _label(kind: str, key: str, names: dict[str, str]) -> str:
    if kind == "trunk":
        return f"trunk {key[:8]}"
    return f"{kind} {names.get(key, key[:8])}"
