"""The report of a sweep as one HTML file that needs no network and no other file.

A page is a list of sections, each a plot or a table with a sentence on how to read it; a section
that has nothing to show says why. What comes from a spec or a result is escaped on its way in.
Optuna and Plotly keep state of their own, so that one page is drawn at a time; the doors may be
called from any thread.
"""

import html
import json
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.resources import files

import plotly.graph_objects as go
import plotly.io as pio
from plotly.offline import get_plotlyjs

from service.figures import TEMPLATE, Finals
from service.figures_bytes import (
    forecast_figure,
    forecast_pairs,
    median_error,
    plane_figure,
    sizes_figure,
)
from service.figures_field import (
    edf_figure,
    history_figure,
    importance_figure,
    parallel_figure,
    pareto_figure,
    slice_figure,
)
from service.figures_time import account_of, clock_figure, cost_figure, curves_figure
from service.knobs import dead_knobs, in_words
from service.labels import knob_names
from service.ledger import SweepView
from service.paths import Paths
from service.report import (
    best,
    final_rows,
    influence,
    status_document,
    table_cells,
    table_columns,
)
from service.study import MIN_FINALS, importances
from service.timelines import MAX_TIMELINES, Timeline, read_timelines
from service.waterfall import SizeStep, best_sizes

_ONE_AT_A_TIME = threading.Lock()
UNSCORED = "No final has a score yet."


@dataclass(frozen=True, slots=True)
class Section:
    """A part of the page. body: HTML, or the figure to draw. caption: how to read it, HTML."""

    id: str
    title: str
    body: str | go.Figure
    caption: str = ""


def report_html(view: SweepView, paths: Paths) -> str:
    """Draw a sweep's report with all that the home's store has of it. For any thread."""
    return draw_page(view, best_sizes(view, paths.store), read_timelines(view, paths.store))


def draw_page(
    view: SweepView, sizes: Sequence[SizeStep] = (), timelines: Sequence[Timeline] = ()
) -> str:
    """Draw the report as one HTML file.

    `sizes`: what the bytes of the best final's artifact are spent on; `timelines`: the curves of
    the trainings. Both are the store's to tell, and the page stands without them.
    """
    with _ONE_AT_A_TIME:
        finals = Finals(view)
        sections = [*_sections(finals, sizes, timelines)]
        body = "\n".join(map(_section, sections))
        shared = {"texts": finals.texts, "template": pio.templates[TEMPLATE].to_plotly_json()}
    name = html.escape(str(view.started.get("name", "sweep")))
    links = "".join(f"<li><a href='#{s.id}'>{s.title}</a></li>" for s in sections)
    return _PAGE.format(
        title=name,
        style=_shipped("report.css"),
        library=get_plotlyjs() if "data-plot" in body else "",
        head=_headline(view),
        links=links,
        body=body,
        shared=_harmless(json.dumps(shared)),
        script=_shipped("report.js"),
    )


def _shipped(name: str) -> str:
    return files("service").joinpath(name).read_text(encoding="utf-8")


def _sections(
    finals: Finals, sizes: Sequence[SizeStep], timelines: Sequence[Timeline]
) -> Iterator[Section]:
    yield from _result_sections(finals)
    yield from _knob_sections(finals)
    yield from _time_sections(finals.view, timelines)
    yield from _size_sections(finals, sizes)
    yield _cost_section(finals.view)
    yield Section("finals", "All finals", _finals_table(finals.view), _TABLE_CAPTION)
    yield Section("facts", "Facts", _facts_table(finals.view))


def _plotted(name: str, title: str, figure: go.Figure | None, why: str, caption: str) -> Section:
    """A figure with how to read it, or why there is none."""
    return (
        Section(name, title, _nothing(why))
        if figure is None
        else Section(name, title, figure, caption)
    )


def _nothing(why: str) -> str:
    return f"<p class='nothing'>{html.escape(why)}</p>"


def _result_sections(finals: Finals) -> Iterator[Section]:
    is_scored = bool(finals.rows)
    yield _plotted(
        "plane", "Bits per byte and bytes", plane_figure(finals) if is_scored else None, UNSCORED,
        "Lower is better, left is smaller; right of the red line nothing counts. A diamond is the "
        "mean of a point's seeds, its whiskers reach from the least to the greatest seed, the "
        "faint dots are the seeds. The dotted line joins what no other final beats.",
    )  # fmt: skip
    yield _plotted(
        "history", "Optimization history", history_figure(finals) if is_scored else None, UNSCORED,
        "Each dot is a final, in the order they were settled; the line is the best so far among "
        "those that are feasible and legal. Grey circles break a limit and never count. A shaded "
        "part was run to confirm the best points with seeds written down beforehand.",
    )  # fmt: skip
    yield _plotted(
        "pareto", "Pareto front", pareto_figure(finals) if is_scored else None, UNSCORED,
        "Blue finals are beaten by no other in bytes and bpb at once: the best bpb for each size. "
        "Pale ones are beaten; grey circles break a limit and are left out of the front.",
    )  # fmt: skip


def _knob_sections(finals: Finals) -> Iterator[Section]:
    view, is_scored = finals.view, bool(finals.rows)
    has_knobs = any(path in row.point for row in finals.rows for path in _varying(view))
    why = "No knob varies in this sweep." if is_scored else UNSCORED
    yield _plotted(
        "parallel", "Parallel coordinates", parallel_figure(finals) if has_knobs else None, why,
        "A line is a final. Drag along an axis to keep only the lines that pass there, drag a "
        "name to move its axis. Dark violet is the lowest bpb; grey breaks a limit.",
    )  # fmt: skip
    yield _plotted(
        "slice", "Slices", slice_figure(finals) if has_knobs else None, why,
        "Each knob alone against bpb: where the dots of one value lie lower than those of another, "
        "the knob matters whatever the rest. Orange bars are medians, later finals are brighter, "
        "grey circles break a limit.",
    )  # fmt: skip
    yield _importance_section(finals)
    figure, name = edf_figure(finals)
    by = f" by {html.escape(name)}" if name else ""
    why = "No final of the search is feasible and legal." if is_scored else UNSCORED
    yield _plotted(
        "edf", "Distribution of results", figure, why,
        f"The share of the search's feasible and legal finals that reach a bpb or better{by} "
        "(EDF). A line further left is the better region to search; a steep one hardly depends on "
        "the other knobs.",
    )  # fmt: skip


def _importance_section(finals: Finals) -> Section:
    view = finals.view
    shares, more = importances(view), _influence_list(view) + _dead_list(view)
    if shares is None:
        why = f"Too few scored finals to tell: importances need {MIN_FINALS} of the search "
        why += "that are feasible and legal."
        return Section("importance", "Importances", _nothing(why), more)
    return Section(
        "importance", "Importances", importance_figure(finals, shares),
        "PED-ANOVA (Optuna; arXiv 2304.10255): how far the values of a knob among the best finals "
        "differ from those among all that are feasible and legal, as a share of the whole. It says "
        f"what to set right to be among the best tenth, not in which direction. {more}",
    )  # fmt: skip


def _time_sections(view: SweepView, timelines: Sequence[Timeline]) -> Iterator[Section]:
    if timelines:
        num = len(view.trainings) + len(view.running)
        shown = (
            f" The {MAX_TIMELINES} with the best finals are shown." if num > MAX_TIMELINES else ""
        )
        top = best(view)
        is_of_best = top is not None and timelines[0].training == top["training"]
        yield Section(
            "curves", "Loss and the clock", curves_figure(timelines),
            f"{'Black is the training of the best final. ' if is_of_best else ''}Behind the black "
            "line, green is its warmdown and yellow its validations. The first steps lie above the "
            "plot, a double click shows them. The bars at the bottom are where each training's "
            "seconds went: a trunk that several share is drawn in each of them, and the time "
            f"between trunk and tail, when nothing ran, is cut out.{shown}",
        )  # fmt: skip
        return
    yield _plotted(
        "curves", "Loss and the clock", clock_figure(view), "No training has ended yet.",
        "Seconds of each training by phase. The curves themselves lie in the store, which was not "
        "at hand when this page was drawn.",
    )  # fmt: skip


def _size_sections(finals: Finals, sizes: Sequence[SizeStep]) -> Iterator[Section]:
    unknown = "It is not known what the bytes of the best final are spent on: "
    unknown += "there is none." if best(finals.view) is None else "its artifact is not at hand."
    yield _plotted(
        "sizes", "Bytes of the best final",
        sizes_figure(sizes, finals.cap_bytes) if sizes else None, unknown,
        "From the first tensor to the whole artifact: each step is what a class of tensors takes "
        "after compression. The red line is the cap.",
    )  # fmt: skip
    pairs = forecast_pairs(finals)
    error = f"Median error {median_error(pairs):.2%} over {len(pairs)} artifacts. " if pairs else ""
    yield _plotted(
        "forecast", "Predicted and real bytes",
        forecast_figure(finals, pairs) if pairs else None, "No artifact has been written yet.",
        f"{error}On the dashed line the forecast made before compression is right; above it the "
        "artifact came out larger.",
    )  # fmt: skip


def _cost_section(view: SweepView) -> Section:
    status = status_document(view)
    said = [f"{status['worker_seconds'] / 3600:,.4g} GPU-hours spent"]
    if status["usd"] is not None:
        said.append(f"{status['usd']:,.2f} USD")
    account = account_of(view)
    if account is not None and account.limit_s is not None:
        said.append(f"{status['worker_seconds'] / account.limit_s:.0%} of the budget")
    return _plotted(
        "cost", "Cost", cost_figure(view), "Nothing has been spent yet.",
        f"{', '.join(said)}. A GPU-hour is an hour that a stage held one worker, on a CPU too; "
        "what was found in the store is free. Finals are summed by their training.",
    )  # fmt: skip


def _section(section: Section) -> str:
    body = section.body
    if not isinstance(body, str):
        body = _plot(body, section.id)
    caption = f"<figcaption>{section.caption}</figcaption>" if section.caption else ""
    return (
        f"<section id='{section.id}' aria-labelledby='{section.id}-title'>"
        f"<h2 id='{section.id}-title'>{section.title}</h2>"
        f"<figure>{body}{caption}</figure></section>"
    )


def _plot(figure: go.Figure, name: str) -> str:
    """The figure as data, which report.js draws: nothing of it is ever read as HTML."""
    data = _harmless(str(figure.to_json()))
    return (
        f"<div class='plot' id='plot-{name}' data-plot='{name}'></div>"
        f"<script type='application/json' id='data-{name}'>{data}</script>"
    )


def _harmless(text: str) -> str:
    """JSON that cannot end the element that it stands in."""
    return text.replace("<", "\\u003c")


def _headline(view: SweepView) -> str:
    status, cap = status_document(view), view.started.get("cap_bytes")
    top, confirmed, finals = status["best"], status["confirmed"], status["finals"]
    lead = "No final is feasible and legal."
    cards = [("state", status["state"], status["reason"] or "")]
    if top is not None:
        lead = f"Best: {top['val_bpb']:.4f} bpb in {top['artifact_bytes']:,} bytes."
        below = "" if cap is None else f"{cap - top['artifact_bytes']:,} bytes below the cap"
        cards.append(("best val bpb", f"{top['val_bpb']:.4f}", f"final {top['final'][:12]}"))
        cards.append(("its artifact", f"{top['artifact_bytes'] / 1e6:.3f} MB", below))
    if confirmed is not None:
        sd = "" if confirmed["sd_bpb"] is None else f"± {confirmed['sd_bpb']:.5f} "
        mean = f"{confirmed['mean_bpb']:.5f}"
        cards.append(("confirmed mean", mean, f"{sd}over {confirmed['n']} seeds"))
    lost = [f"{finals[kind]} {kind}" for kind in ("infeasible", "illegal", "failed")]
    cards.append(("finals", f"{finals['done']} of {finals['total']}", ", ".join(lost)))
    hours, usd = status["worker_seconds"] / 3600, status["usd"]
    cards.append(("GPU-hours", f"{hours:,.3g}", "" if usd is None else f"{usd:,.2f} USD"))
    shown = "".join(
        f"<div><dt>{html.escape(name)}</dt><dd>{html.escape(value)}"
        f"<small>{html.escape(more)}</small></dd></div>"
        for name, value, more in cards
    )
    sweep = html.escape(f"sweep {view.started.get('sweep_id', '')}")
    recipe = html.escape(f"recipe {view.started.get('recipe', '-')}")
    limit = "" if cap is None else f", cap {cap:,} bytes"
    return f"<p class='lead'>{lead}</p><p>{sweep}, {recipe}{limit}</p><dl>{shown}</dl>"


def _varying(view: SweepView) -> Sequence[str]:
    return view.started.get("varying", ())


def _influence_list(view: SweepView) -> str:
    names = knob_names(_varying(view))
    items = ", ".join(
        f"{html.escape(names[path])} {share:.0%}" for path, share in influence(view).items()
    )
    return f"Share of the variance of bpb that each knob explains alone: {items}." if items else ""


def _dead_list(view: SweepView) -> str:
    items = "".join(
        f"<li>{html.escape(in_words(found))}, such as {html.escape(_short_ids(found.example))}</li>"
        for found in dead_knobs(view)
    )
    return f"<p class='warn'>Knobs that changed nothing:</p><ul>{items}</ul>" if items else ""


def _short_ids(finals: Sequence[str]) -> str:
    return " and ".join(final[:12] for final in finals)


_TABLE_CAPTION = (
    "Sorted by state, then by bpb or by what is over the cap. Press a column's name to sort by it, "
    "again to turn the order round."
)


def _finals_table(view: SweepView) -> str:
    top, rows = best(view), final_rows(view)
    if not rows:
        return _nothing(UNSCORED)
    head = "".join(
        f"<th scope='col'><button type='button'>{html.escape(name)}</button></th>"
        for name in (*table_columns(view), "final")
    )
    body = []
    for row in rows:
        is_best = top is not None and row.final == top["final"]
        kind = "best" if is_best else str(row.state)
        cells = "".join(
            f"<td>{html.escape(cell)}</td>" for cell in (*table_cells(view, row), row.final[:12])
        )
        body.append(f"<tr class='{kind}'>{cells}</tr>")
    return (
        "<div class='scroll' tabindex='0' role='region' aria-label='All finals'>"
        f"<table class='sortable'><thead><tr>{head}</tr></thead>"
        f"<tbody>{''.join(body)}</tbody></table></div>"
    )


def _facts_table(view: SweepView) -> str:
    started = view.started
    facts = {"recipe": started.get("recipe"), **(started.get("facts") or {})}
    status = status_document(view)
    facts |= {name: status[name] for name in ("trained_steps", "gpu_seconds", "worker_seconds")}
    facts |= {"cache_hits": status["cache_hits"]}
    lines = "".join(
        f"<tr><th scope='row'>{html.escape(str(k))}</th><td>{html.escape(str(v))}</td></tr>"
        for k, v in facts.items()
        if v is not None
    )
    return f"<table class='facts'>{lines}</table>"


_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}: report</title><style>{style}</style><script>{library}</script></head>
<body><nav aria-label="Contents"><p>{title}</p><ol>{links}</ol></nav>
<main><header><h1>{title}</h1>
{head}</header>
{body}
</main><script type="application/json" id="shared">{shared}</script>
<script>{script}</script></body></html>
"""
