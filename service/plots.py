"""The report of a sweep: one picture for a README, the page, the table.

Owns the PNG (matplotlib, no display) and the folder; `groups` says what is drawn how,
`report_page` draws the HTML. Works with one final, with none that is feasible, with none scored.
"""

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from service.groups import (
    CAP,
    COLOURS,
    INK,
    MB,
    QUIET,
    Group,
    coordinates,
    group_rows,
    is_far,
    pareto_front,
    scored_rows,
)
from service.labels import run_name
from service.ledger import SweepView
from service.paths import Paths
from service.report import Row, best, csv_table
from service.report_page import draw_page, report_html
from service.states import State
from service.waterfall import SizeStep, best_sizes
from trainer.runtime.files import write_bytes, write_text


@dataclass(frozen=True, slots=True)
class ReportFiles:
    """The files of a report."""

    png: Path
    html: Path
    csv: Path
    sizes: Path | None = None

    def files(self) -> tuple[Path, ...]:
        drawn = (self.png, self.html, self.csv)
        return drawn if self.sizes is None else (*drawn, self.sizes)


def write_report(view: SweepView, folder: Path, paths: Paths | None = None) -> ReportFiles:
    """Draw `bpb_by_bytes.png`, `report.html` and `finals.csv` into a folder.

    `paths`: the home, whose store adds the curves and, where it is known what the best final's
    bytes are spent on, `size_by_tensor.png`.
    """
    sizes = [] if paths is None else best_sizes(view, paths.store)
    files = ReportFiles(
        png=folder / "bpb_by_bytes.png",
        html=folder / "report.html",
        csv=folder / "finals.csv",
        sizes=folder / "size_by_tensor.png" if sizes else None,
    )
    write_bytes(files.png, draw_png(view))
    write_text(files.html, draw_page(view) if paths is None else report_html(view, paths))
    write_text(files.csv, csv_table(view))
    if files.sizes is not None:
        write_bytes(files.sizes, draw_sizes(sizes, view.started.get("cap_bytes")))
    return files


def draw_png(view: SweepView) -> bytes:
    """Draw bpb over artifact size as a PNG."""
    figure, axes = _canvas()
    _draw_plane(axes, view)
    return _as_png(figure)


def draw_sizes(sizes: Sequence[SizeStep], cap_bytes: int | None) -> bytes:
    """Draw what the bytes of an artifact are spent on as a PNG: a waterfall up to the whole."""
    figure, axes = _canvas()
    amounts = np.array([step.bytes for step in sizes]) / MB
    total = float(amounts.sum())
    places = np.arange(len(amounts) + 1)
    axes.bar(places[:-1], amounts, bottom=np.cumsum(amounts) - amounts, color=COLOURS[0])
    axes.bar(places[-1:], [total], color=INK)
    labels = [*(step.label for step in sizes), "artifact"]
    axes.set_xticks(places, labels, rotation=90, fontsize=7)
    axes.set_ylabel("MB (10⁶ bytes)")
    title = f"size by tensor: {sum(step.bytes for step in sizes):,} bytes"
    axes.set_title(title, loc="left", fontsize=12, color=INK)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#e6e6e6", linewidth=0.8)
    axes.set_axisbelow(True)
    if cap_bytes is not None:
        axes.axhline(cap_bytes / MB, color=CAP, linewidth=1.2)
        axes.annotate(
            f"cap {cap_bytes:,} bytes", (0.01, cap_bytes / MB),
            xycoords=("axes fraction", "data"), va="bottom", fontsize=8.5, color=CAP,
        )  # fmt: skip
    return _as_png(figure)


def _canvas() -> tuple[Figure, Axes]:
    figure = Figure(figsize=(9, 5.6), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots()


def _as_png(figure: Figure) -> bytes:
    out = io.BytesIO()
    figure.savefig(out, format="png", metadata={"Software": None})
    return out.getvalue()


def _draw_plane(axes: Axes, view: SweepView) -> None:
    rows = scored_rows(view)
    name, groups = group_rows(view, rows)
    axes.set_title(
        f"{view.started.get('name', 'sweep')}: bits per byte by artifact size",
        loc="left", fontsize=12, color=INK,
    )  # fmt: skip
    axes.set_xlabel("artifact, MB (10⁶ bytes)")
    axes.set_ylabel("val bpb, lower is better")
    axes.grid(color="#e6e6e6", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.yaxis.set_major_locator(MaxNLocator(nbins=8))
    axes.ticklabel_format(useOffset=False)
    if not rows:
        axes.text(0.5, 0.5, "no final is scored yet", transform=axes.transAxes, ha="center")
        return
    area = 46 if len(rows) <= 60 else 24
    for group in groups:
        _draw_group(axes, group, area)
    front = pareto_front(rows)
    if len(front) > 1:
        axes.plot(
            *coordinates(front), color=INK, linewidth=1.2, alpha=0.6, zorder=2,
            drawstyle="steps-post", label="Pareto front",
        )  # fmt: skip
    _set_limits(axes, rows)
    _draw_cap(axes, view, rows)
    _draw_best(axes, view)
    _draw_legend(axes, name, rows)


def _draw_group(axes: Axes, group: Group, area: int) -> None:
    fit = [row for row in group.rows if row.state == State.SUCCEEDED]
    axes.scatter(
        *coordinates(fit), s=area, color=group.colour, edgecolors="white", linewidths=0.7,
        zorder=3, label=group.label if fit else None,
    )  # fmt: skip
    for state, marker in ((State.INFEASIBLE, "o"), (State.ILLEGAL, "X")):
        rows = [row for row in group.rows if row.state == state]
        axes.scatter(
            *coordinates(rows), s=area, facecolors="none", edgecolors=QUIET, linewidths=1.2,
            marker=marker, zorder=2,
        )  # fmt: skip


def _set_limits(axes: Axes, rows: Sequence[Row]) -> None:
    sizes, scores = coordinates(rows)
    for values, set_limits in ((sizes, axes.set_xlim), (scores, axes.set_ylim)):
        low, high = min(values), max(values)
        margin = 0.08 * (high - low) or 0.002 * abs(high) or 1.0
        set_limits(low - margin, high + 1.5 * margin)


def _draw_cap(axes: Axes, view: SweepView, rows: Sequence[Row]) -> None:
    """Draw the cap as a line, or say where it is when it would squeeze the points together."""
    if (cap := view.started.get("cap_bytes")) is None:
        return
    low, high = axes.get_xlim()
    cap_mb = cap / MB
    if not is_far(coordinates(rows)[0], cap):
        margin = 0.06 * (high - low)
        low, high = min(low, cap_mb - margin), max(high, cap_mb + margin)
        axes.set_xlim(low, high)
        axes.axvline(cap_mb, color=CAP, linewidth=1.2)
        axes.axvspan(cap_mb, high, color=CAP, alpha=0.05, linewidth=0)
        axes.annotate(
            f"cap {cap:,} bytes ", (cap_mb, 1.0), xycoords=("data", "axes fraction"),
            va="top", ha="right", rotation=90, fontsize=8.5, color=CAP,
        )  # fmt: skip
        return
    is_above = cap_mb > high
    place, tail = (0.995, 0.86) if is_above else (0.005, 0.14)
    axes.annotate(
        "", (place, 0.955), (tail, 0.955), xycoords="axes fraction",
        arrowprops={"arrowstyle": "->", "color": CAP},
    )  # fmt: skip
    axes.annotate(
        f"cap {cap:,} bytes", (place, 0.97), xycoords="axes fraction", fontsize=8.5,
        ha="right" if is_above else "left", color=CAP,
    )  # fmt: skip


def _draw_best(axes: Axes, view: SweepView) -> None:
    if (top := best(view)) is None:
        axes.annotate(
            "no final is feasible and legal", (0.01, 0.02), xycoords="axes fraction",
            color=CAP, fontsize=9,
        )  # fmt: skip
        return
    result = top["result"]
    x, y = result["artifact_bytes"] / MB, result["score"]["val_bpb"]
    axes.scatter([x], [y], s=150, facecolors="none", edgecolors=INK, linewidths=1.6, zorder=4)
    (low, high), bottom = axes.get_xlim(), axes.get_ylim()[0]
    is_right = x > (low + high) / 2
    point = {path: top["point"][path] for path in view.started["varying"] if path in top["point"]}
    axes.set_ylim(bottom=bottom - 0.1 * (axes.get_ylim()[1] - bottom))  # room for the words
    axes.annotate(
        f"best {y:.4f} bpb, {result['artifact_bytes']:,} bytes\n{run_name(point, top['final'])}",
        (x, y), xytext=(-14 if is_right else 14, -16), textcoords="offset points",
        ha="right" if is_right else "left", va="top", fontsize=9, color=INK, zorder=5,
        bbox={"boxstyle": "round,pad=0.25", "facecolor": "white", "alpha": 0.85, "linewidth": 0},
    )  # fmt: skip


def _draw_legend(axes: Axes, name: str, rows: Sequence[Row]) -> None:
    for state, marker in ((State.INFEASIBLE, "o"), (State.ILLEGAL, "X")):
        if any(row.state == state for row in rows):
            axes.scatter(
                [], [], s=46, facecolors="none", edgecolors=QUIET, linewidths=1.2,
                marker=marker, label=str(state),
            )  # fmt: skip
    axes.legend(
        title=name or None, loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False,
        fontsize=9, title_fontsize=9, alignment="left",
    )  # fmt: skip
