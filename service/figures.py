"""What the figures of a report share: the finals they draw, their colours, their layout."""

import html
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import plotly.graph_objects as go

from service.groups import CAP, COLOURS, INK, MB, QUIET, is_far
from service.ledger import SweepView
from service.report import Row, final_rows, table_cells, table_columns

GRID = "#e6e6e6"
MAIN = COLOURS[0]
TEMPLATE = "plotly_white"
BY_PLACE = "by place"
"""The meta of a trace whose texts are places in `Finals.texts`."""
SIZE_TITLE, BPB_TITLE = "artifact, MB (10⁶ bytes)", "val bpb, lower is better"


class Finals:
    """A sweep's finals as every figure needs them; read once for a page.

    rows: those that have a score, in the table's order. texts: what each final shows under the
    pointer, escaped; a page holds them once, and a trace names them by their place (`pointed`).
    """

    def __init__(self, view: SweepView) -> None:
        self.view = view
        settled = final_rows(view)
        self.rows = [row for row in settled if row.val_bpb is not None]
        self.texts = _texts(view, settled)
        self._places = {row.final: place for place, row in enumerate(settled)}

    @property
    def cap_bytes(self) -> int | None:
        return self.view.started.get("cap_bytes")

    def events(self) -> list[dict[str, Any]]:
        """The scored finals' events in the order in which they were settled."""
        scored = (self.view.finals[row.final] for row in self.rows)
        return sorted(scored, key=lambda event: event["seq"])

    def pointed(self, finals: Iterable[str], more: Sequence[str] | None = None) -> dict[str, Any]:
        """What makes a trace show these finals under the pointer, and below each a text of `more`,
        which is HTML."""
        places = [self._places[final] for final in finals]
        tail = "" if more is None else "<br>%{customdata}"
        hover = f"%{{text}}{tail}<extra></extra>"
        return {"text": places, "customdata": more, "hovertemplate": hover, "meta": BY_PLACE}


def _texts(view: SweepView, rows: Sequence[Row]) -> list[str]:
    columns = [html.escape(name) for name in table_columns(view)]
    return [
        "<br>".join(
            [
                f"<b>{row.final[:12]}</b>",
                *(
                    f"{name} {html.escape(cell)}"
                    for name, cell in zip(columns, table_cells(view, row), strict=True)
                ),
            ]
        )
        for row in rows
    ]


def laid_out(figure: go.Figure, *, height: int, **layout: Any) -> go.Figure:
    """Give a figure the page's own look; `layout` is laid over it. Titles are the page's."""
    figure.update_layout(
        template=None,  # the page has one for all, TEMPLATE
        title=None,
        height=height,
        margin={"t": 34, "r": 20, "b": 50, "l": 64},
        font={"family": "system-ui, sans-serif", "size": 13, "color": INK},
        hoverlabel={"align": "left", "bgcolor": "white", "font": {"color": INK}},
    )
    figure.update_layout(**layout)
    return figure


def add_cap(figure: go.Figure, sizes_mb: Sequence[float], cap_bytes: int | None) -> None:
    """Draw the cap over an axis of sizes, or say where it is when it would squeeze the points."""
    if cap_bytes is None or not sizes_mb:
        return
    text, place = f"cap {cap_bytes:,} bytes", cap_bytes / MB
    if not is_far(sizes_mb, cap_bytes):
        figure.add_vline(
            x=place, line_color=CAP, line_width=1.5,
            annotation={"text": text, "font": {"color": CAP}, "yanchor": "bottom", "y": 1},
            annotation_position="top",
        )  # fmt: skip
        return
    figure.add_annotation(
        text=f"{text} →" if place > max(sizes_mb) else f"← {text}",
        x=1 if place > max(sizes_mb) else 0,
        xanchor="right" if place > max(sizes_mb) else "left",
        y=1, xref="paper", yref="paper", showarrow=False, font={"color": CAP}, yanchor="bottom",
    )  # fmt: skip


def ring(figure: go.Figure, x: float, y: float, name: str) -> None:
    """Put a ring around the point that matters most."""
    marker = {"size": 18, "symbol": "circle-open", "color": INK, "line": {"width": 2}}
    figure.add_scatter(x=[x], y=[y], mode="markers", marker=marker, name=name, hoverinfo="skip")


def shortened(text: str, most: int = 20) -> str:
    """A text cut to so many characters, escaped."""
    return html.escape(text if len(text) <= most else f"{text[: most - 1]}…")


def thinned(items: Sequence[Any], most: int) -> Sequence[Any]:
    """Every k-th of a long line's points, and its last."""
    step = math.ceil(len(items) / most)
    return items if step <= 1 else [*items[:-1:step], items[-1]]


def dot(colour: str | Sequence[int], *, is_large: bool = True, **more: Any) -> Mapping[str, Any]:
    """A point's marker: white-rimmed, so that neighbours stay apart."""
    size = 9 if is_large else 7
    return {"size": size, "color": colour, "line": {"width": 0.7, "color": "white"}, **more}


def hollow(symbol: str = "circle-open") -> Mapping[str, Any]:
    """The marker of what does not count."""
    return {"size": 8, "color": QUIET, "symbol": symbol}
