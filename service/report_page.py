"""The report of a sweep as one HTML file that needs no network and no other file.

Everything that comes from a spec or a result is escaped on its way in.
"""

import html
from collections.abc import Sequence
from typing import Any

import plotly.graph_objects as go

from service.groups import (
    CAP,
    COLOURS,
    INK,
    MB,
    QUIET,
    coordinates,
    group_rows,
    is_far,
    pareto_front,
    scored_rows,
)
from service.knobs import dead_knobs, in_words
from service.labels import knob_names, short_value
from service.ledger import SweepView
from service.report import (
    Row,
    best,
    final_rows,
    influence,
    status_document,
    table_cells,
    table_columns,
)
from service.states import State
from service.waterfall import SizeStep


def draw_page(view: SweepView, sizes: Sequence[SizeStep] = ()) -> str:
    """Draw the report as one HTML file: plot, parallel coordinates, every final, the facts.

    `sizes`: what the bytes of the best final's artifact are spent on, where that is known.
    """
    title = html.escape(str(view.started.get("name", "sweep")))
    rows = scored_rows(view)
    sections = [_headline(view)]
    if rows:
        sections.append(_plot(_plane_figure(view, rows), "plane", with_library=True))
        sections.append("<h2>Knobs and result</h2>")
        sections.append(_plot(_parallel_figure(view, rows), "parallel"))
        sections += [_influence_list(view), _dead_list(view)]
    if rows and sizes:
        sections.append("<h2>Bytes of the best final</h2>")
        sections.append(_plot(_sizes_figure(sizes, view.started.get("cap_bytes")), "sizes"))
    sections += ["<h2>Finals</h2>", _finals_table(view), "<h2>Facts</h2>", _facts_table(view)]
    return _PAGE.format(title=title, style=_STYLE, body="\n".join(sections), script=_SORT)


def _plot(figure: go.Figure, name: str, *, with_library: bool = False) -> str:
    return figure.to_html(
        full_html=False,
        include_plotlyjs=with_library,
        config={"displaylogo": False, "responsive": True},
        div_id=name,
    )


def _headline(view: SweepView) -> str:
    status = status_document(view)
    top, cap = status["best"], view.started.get("cap_bytes")
    finals = status["finals"]
    facts = [
        f"sweep {view.started.get('sweep_id', '')} {status['state']}",
        f"{finals['done']} of {finals['total']} finals, {finals['infeasible']} infeasible, "
        f"{finals['illegal']} illegal, {finals['failed']} failed",
    ]
    if cap is not None:
        facts.append(f"cap {cap:,} bytes")
    lead = "No final is feasible and legal."
    if top is not None:
        lead = f"Best: {top['val_bpb']:.4f} bpb in {top['artifact_bytes']:,} bytes."
    return f"<p class='lead'>{lead}</p><p>{html.escape('; '.join(facts))}</p>"


def _hover(view: SweepView, row: Row) -> str:
    cells = zip(table_columns(view), table_cells(view, row), strict=True)
    return "<br>".join(f"{html.escape(k)}: {html.escape(v)}" for k, v in cells)


def _plane_figure(view: SweepView, rows: Sequence[Row]) -> go.Figure:
    figure = go.Figure()
    name, groups = group_rows(view, rows)
    for group in groups:
        fit = [row for row in group.rows if row.state == State.SUCCEEDED]
        _add_points(figure, view, fit, html.escape(group.label), {"color": group.colour})
    for state, symbol in ((State.INFEASIBLE, "circle-open"), (State.ILLEGAL, "x-open")):
        rest = [row for row in rows if row.state == state]
        _add_points(figure, view, rest, str(state), {"color": QUIET, "symbol": symbol})
    x, y = coordinates(pareto_front(rows))
    line = {"color": INK, "width": 1, "shape": "hv"}
    figure.add_scatter(x=x, y=y, mode="lines", line=line, name="Pareto front", hoverinfo="skip")
    if (top := best(view)) is not None:
        ring = {"size": 18, "symbol": "circle-open", "color": INK, "line": {"width": 2}}
        x, y = [top["result"]["artifact_bytes"] / MB], [top["result"]["score"]["val_bpb"]]
        figure.add_scatter(x=x, y=y, mode="markers", marker=ring, name="best", hoverinfo="skip")
    if (cap := view.started.get("cap_bytes")) is not None:
        _add_cap(figure, rows, cap)
    figure.update_layout(
        template="plotly_white",
        height=520,
        margin={"t": 30},
        legend_title_text=html.escape(name),
        xaxis_title="artifact, MB (10⁶ bytes)",
        yaxis_title="val bpb, lower is better",
    )
    return figure


def _add_points(
    figure: go.Figure, view: SweepView, rows: Sequence[Row], name: str, marker: dict[str, Any]
) -> None:
    if not rows:
        return
    x, y = coordinates(rows)
    figure.add_scatter(
        x=x, y=y, mode="markers", name=name, marker={"size": 9, **marker},
        text=[_hover(view, row) for row in rows], hoverinfo="text",
    )  # fmt: skip


def _add_cap(figure: go.Figure, rows: Sequence[Row], cap: int) -> None:
    if not is_far(rows, cap):
        figure.add_vline(x=cap / MB, line_color=CAP, annotation_text=f"cap {cap:,} bytes")
        return
    arrow = "→" if cap / MB > max(coordinates(rows)[0]) else "←"
    figure.add_annotation(
        text=f"cap {cap:,} bytes {arrow}", x=1, y=1, xref="paper", yref="paper",
        showarrow=False, font={"color": CAP}, xanchor="right", yanchor="bottom",
    )  # fmt: skip


def _parallel_figure(view: SweepView, rows: Sequence[Row]) -> go.Figure:
    names = knob_names(view.started.get("varying", ()))
    dimensions = [
        _dimension(name, [r.point.get(path) for r in rows]) for path, name in names.items()
    ]
    sizes, scores = coordinates(rows)
    dimensions += [
        {"label": "artifact MB", "values": sizes},
        {"label": "val bpb", "values": scores},
    ]
    line = {"color": scores, "colorscale": "Viridis", "showscale": True}
    figure = go.Figure(go.Parcoords(line=line, dimensions=dimensions))
    figure.update_layout(template="plotly_white", height=420, margin={"t": 60, "l": 80, "r": 60})
    return figure


def _dimension(name: str, values: Sequence[Any]) -> dict[str, Any]:
    """One axis: numbers as they are, anything else as named levels."""
    label = html.escape(name)
    if all(isinstance(v, int | float) and not isinstance(v, bool) for v in values):
        distinct = sorted(set(values))
        ticks = {"tickvals": distinct} if len(distinct) <= 8 else {}
        return {"label": label, "values": list(values), **ticks}
    levels = sorted({short_value(value) for value in values})
    places = [levels.index(short_value(value)) for value in values]
    texts = [html.escape(level) for level in levels]
    return {"label": label, "values": places, "tickvals": [*range(len(levels))], "ticktext": texts}


def _sizes_figure(sizes: Sequence[SizeStep], cap: int | None) -> go.Figure:
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
            increasing={"marker": {"color": COLOURS[0]}},
            totals={"marker": {"color": INK}},
        )
    )
    if cap is not None:
        figure.add_hline(y=cap / MB, line_color=CAP, annotation_text=f"cap {cap:,} bytes")
    figure.update_layout(
        template="plotly_white", height=460, margin={"t": 30}, yaxis_title="MB (10⁶ bytes)"
    )
    return figure


def _influence_list(view: SweepView) -> str:
    names = knob_names(view.started.get("varying", ()))
    items = "".join(
        f"<li>{html.escape(names[path])}: {share:.0%}</li>"
        for path, share in influence(view).items()
    )
    return (
        f"<p>Share of the variance of val bpb that each knob explains alone:</p><ul>{items}</ul>"
        if items
        else ""
    )


def _dead_list(view: SweepView) -> str:
    items = "".join(
        f"<li>{html.escape(in_words(found))}, such as {html.escape(_short_ids(found.example))}</li>"
        for found in dead_knobs(view)
    )
    return f"<p class='warn'>Knobs that changed nothing:</p><ul>{items}</ul>" if items else ""


def _short_ids(finals: Sequence[str]) -> str:
    return " and ".join(final[:12] for final in finals)


def _finals_table(view: SweepView) -> str:
    top = best(view)
    head = "".join(f"<th>{html.escape(name)}</th>" for name in (*table_columns(view), "final"))
    body = []
    for row in final_rows(view):
        is_best = top is not None and row.final == top["final"]
        kind = "best" if is_best else str(row.state)
        cells = "".join(
            f"<td>{html.escape(cell)}</td>" for cell in (*table_cells(view, row), row.final[:12])
        )
        body.append(f"<tr class='{kind}'>{cells}</tr>")
    return (
        f"<table id='finals'><thead><tr>{head}</tr></thead><tbody>{''.join(body)}</tbody></table>"
    )


def _facts_table(view: SweepView) -> str:
    started = view.started
    facts = {"recipe": started.get("recipe"), **(started.get("facts") or {})}
    status = status_document(view)
    facts |= {name: status[name] for name in ("trained_steps", "gpu_seconds", "worker_seconds")}
    facts |= {"cache_hits": status["cache_hits"]}
    lines = "".join(
        f"<tr><th>{html.escape(str(k))}</th><td>{html.escape(str(v))}</td></tr>"
        for k, v in facts.items()
        if v is not None
    )
    return f"<table>{lines}</table>"


_STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; color: #222; margin: 2rem auto; max-width: 1100px;
  padding: 0 1rem }
.lead { font-size: 1.25rem; font-weight: 600; margin-bottom: 0 }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: 13px }
th, td { text-align: right; padding: .25rem .7rem; border-bottom: 1px solid #e6e6e6 }
thead th { cursor: pointer; position: sticky; top: 0; background: #fff }
td:last-child, tbody th { text-align: left }
.best { font-weight: 700; background: #e8f5ee } .infeasible { color: #8a8a8a }
.illegal, .warn { color: #8a5a00 } .failed { color: #b3261e }
"""

# Numbers sort as numbers ("1,234" too); a second click turns the order around.
_SORT = """
document.querySelectorAll('#finals thead th').forEach((head, column) => head.onclick = () => {
  const body = document.querySelector('#finals tbody'), rows = [...body.rows];
  const key = row => row.cells[column].textContent.replaceAll(',', '');
  const compare = (a, b) => isNaN(a) || isNaN(b) ? a.localeCompare(b) : a - b;
  const turn = head.dataset.turn = head.dataset.turn === '1' ? -1 : 1;
  rows.sort((a, b) => turn * compare(key(a), key(b)));
  body.append(...rows);
});
"""

_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title><style>{style}</style></head>
<body><h1>{title}</h1>
{body}
<script>{script}</script></body></html>
"""
