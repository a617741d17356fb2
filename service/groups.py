"""How the finals of a sweep are grouped, coloured and placed in a picture. Pure; draws nothing."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib import colormaps
from matplotlib.colors import to_hex

from service.labels import knob_names, short_value
from service.ledger import SweepView
from service.report import Row, final_rows, influence
from service.states import State

MB = 1e6
INK, QUIET, CAP = "#222222", "#9a9a9a", "#b3261e"
# Colour-blind safe, in this order (Okabe & Ito 2008), without the yellow that paper swallows.
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00")


@dataclass(frozen=True, slots=True)
class Group:
    """Finals drawn alike: one value, or one range, of the knob that matters most."""

    label: str
    colour: str
    rows: list[Row]


def scored_rows(view: SweepView) -> list[Row]:
    """List the finals that have a score, in the table's order."""
    return [row for row in final_rows(view) if row.val_bpb is not None]


def group_rows(
    view: SweepView, rows: Sequence[Row], phase: str | None = None
) -> tuple[str, list[Group]]:
    """Sort rows by the knob that explains most, of those of a phase where one is asked for;
    return its name and the groups. Finals without that knob are a group of their own.
    """
    axes = view.started.get("axes") or {}
    paths = (path for path in influence(view) if phase is None or axes.get(path) == phase)
    path = next(paths, None)
    if path is None:
        return "", [Group("final", COLOURS[0], list(rows))]
    name = knob_names(view.started["varying"])[path]
    having = [row for row in rows if path in row.point]
    groups = _by_value(having, path)
    absent = [row for row in rows if path not in row.point]
    return name, [*groups, *([Group("absent", QUIET, absent)] if absent else [])]


def _by_value(rows: Sequence[Row], path: str) -> list[Group]:
    values = [row.point[path] for row in rows]
    is_number = all(isinstance(v, int | float) for v in values)
    distinct = sorted(set(values), key=lambda v: (isinstance(v, str), v))
    if len(distinct) > len(COLOURS) and is_number:
        return _ranges(rows, values)
    shades = _shades(len(distinct), is_ordered=is_number)
    return [
        Group(short_value(v), colour, [r for r, w in zip(rows, values, strict=True) if w == v])
        for v, colour in zip(distinct, shades, strict=True)
    ]


def _ranges(rows: Sequence[Row], values: Sequence[Any]) -> list[Group]:
    ascending = sorted(values)
    edges = [ascending[len(values) * quarter // 4] for quarter in range(4)] + [ascending[-1]]
    groups = []
    for index, colour in enumerate(_shades(4, is_ordered=True)):
        low, high = edges[index], edges[index + 1]
        is_last = index == 3
        held = [
            row
            for row, v in zip(rows, values, strict=True)
            if low <= v and (v < high or (is_last and v <= high))
        ]
        groups.append(Group(f"{short_value(low)} to {short_value(high)}", colour, held))
    return [group for group in groups if group.rows]


def _shades(num: int, *, is_ordered: bool) -> list[str]:
    """Colours for groups: a ramp where the values have an order, distinct hues otherwise."""
    if not is_ordered or num == 1:
        return [COLOURS[index % len(COLOURS)] for index in range(num)]
    ramp = colormaps["viridis"]
    steps = [0.82 * index / (num - 1) for index in range(num)]  # the ramp's end is too pale
    return [to_hex(ramp(step)) for step in steps]


def pareto_front(rows: Sequence[Row]) -> list[Row]:
    """Keep the succeeded rows that no other beats in bytes and bpb at once, by size."""
    front: list[Row] = []
    able = [row for row in rows if row.state == State.SUCCEEDED]
    for row in sorted(able, key=lambda row: (row.artifact_bytes, row.val_bpb, row.final)):
        if not front or (row.val_bpb or math.inf) < (front[-1].val_bpb or math.inf):
            front.append(row)
    return front


def coordinates(rows: Sequence[Row]) -> tuple[list[float], list[float]]:
    """Return the rows' sizes in MB and their bpb."""
    return [(row.artifact_bytes or 0) / MB for row in rows], [row.val_bpb or 0.0 for row in rows]


def is_far(sizes_mb: Sequence[float], cap_bytes: int) -> bool:
    """Whether a line at the cap would squeeze the points together: it is told, not drawn."""
    reach = max(max(sizes_mb) - min(sizes_mb), 0.03 * max(sizes_mb))
    return not min(sizes_mb) - reach <= cap_bytes / MB <= max(sizes_mb) + reach
