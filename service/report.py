"""What a sweep's ledger adds up to: the order of its finals, the best one, tables and documents.

Pure functions over a SweepView. Imports neither torch nor Ray nor MLflow; draws nothing (plots)
and writes no file.
"""

import csv
import io
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any

from rich.box import ASCII2, SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from service.budget import spent
from service.confirmed import best_confirmed, confirmed_document, counts
from service.knobs import dead_knob_records, dead_knobs, in_words
from service.labels import knob_names, short_value
from service.ledger import SweepView
from service.states import State
from trainer.errors import InfeasibleError

_ORDER = (
    State.SUCCEEDED,
    State.INFEASIBLE,
    State.ILLEGAL,
    State.STOPPED,
    State.CANCELLED,
    State.FAILED,
)
_STYLE = {
    State.INFEASIBLE: "dim",
    State.ILLEGAL: "yellow",
    State.STOPPED: "dim",
    State.CANCELLED: "dim",
    State.FAILED: "red",
}


@dataclass(frozen=True, slots=True)
class Row:
    """One settled final, flat. Measurements are None where the final failed."""

    final: str
    training: str
    point: dict[str, Any]
    seed: int
    state: State
    reason: str | None
    val_bpb: float | None
    artifact_bytes: int | None
    overshoot_bytes: int | None
    """Bytes over the cap, negative below it; None without a cap."""
    entry: str | None
    eval_clock_s: float | None


def final_rows(view: SweepView) -> list[Row]:
    """List the settled finals: succeeded by bpb, infeasible by overshoot, illegal, failed."""
    return sorted((_row(view, event) for event in view.finals.values()), key=_sort_key)


def _row(view: SweepView, event: dict[str, Any]) -> Row:
    result, cap = event["result"] or {}, view.started.get("cap_bytes")
    score, num_bytes = result.get("score") or {}, result.get("artifact_bytes")
    return Row(
        final=event["final"],
        training=event["training"],
        point=event["point"],
        seed=event["seed"],
        state=State(event["state"]),
        reason=event["reason"],
        val_bpb=score.get("val_bpb"),
        artifact_bytes=num_bytes,
        overshoot_bytes=None if cap is None or num_bytes is None else num_bytes - cap,
        entry=result.get("entry"),
        eval_clock_s=score.get("eval_clock_s"),
    )


def _sort_key(row: Row) -> tuple[Any, ...]:
    bpb = math.inf if row.val_bpb is None else row.val_bpb
    if row.state == State.INFEASIBLE:
        over = row.overshoot_bytes or 0
        return (1, over if over > 0 else math.inf, bpb, row.final)
    return (_ORDER.index(row.state), bpb, row.artifact_bytes or 0, row.final)


def best(view: SweepView) -> dict[str, Any] | None:
    """Return the `final_scored` event of the best final, None without a feasible and legal one.

    Where points are confirmed: of the one with the lowest mean over its registered seeds, the
    final nearest that mean. Else the lowest val_bpb; ties go to fewer bytes, then to the id.
    """
    confirmed = best_confirmed(view)
    if confirmed is not None:
        return confirmed.typical()
    events = [event for event in view.finals.values() if counts(view, event)]
    return min(events, key=_rank, default=None)


def _rank(event: dict[str, Any]) -> tuple[float, int, str]:
    result = event["result"]
    return result["score"]["val_bpb"], result["artifact_bytes"], event["final"]


def smallest_overshoot(view: SweepView) -> Row | None:
    """Return the final that misses the byte cap by the least, None if none misses it."""
    over = [row for row in final_rows(view) if (row.overshoot_bytes or 0) > 0]
    return min(over, key=lambda row: (row.overshoot_bytes, row.val_bpb, row.final), default=None)


def status_document(view: SweepView) -> dict[str, Any]:
    """Sum a sweep up as plain data: what ran, what it cost, what came out."""
    started, top = view.started, best(view)
    trainings = [event for event in view.trainings.values() if is_of_search(view, event)]
    finals = [event for event in view.finals.values() if is_of_search(view, event)]
    failed_trainings = _count(trainings, State.FAILED)
    failed_finals = _count(finals, State.FAILED)
    computed = [t["result"] for t in view.trainings.values() if t["result"] and not t["cached"]]
    grown = [trunk for trunk in view.trunks.values() if not trunk["cached"]]
    return {
        "sweep_id": started.get("sweep_id"),
        "name": started.get("name"),
        "state": str(view.state),
        "reason": view.reason,
        "trunks": {"total": started.get("num_trunks", 0), "done": len(view.trunks)},
        "trainings": {
            "total": started.get("num_trainings", 0),
            "done": _count(trainings, State.SUCCEEDED),
            "running": len(view.running),
            "stopped": _count(trainings, State.STOPPED, State.CANCELLED),
            "failed": failed_trainings,
        },
        "finals": {
            "total": started.get("num_finals", 0),
            "done": len(finals) - failed_finals - _count(finals, State.STOPPED, State.CANCELLED),
            "ranked": len(view.ranked),
            "infeasible": _count(finals, State.INFEASIBLE),
            "illegal": _count(finals, State.ILLEGAL),
            "failed": failed_finals,
        },
        "cache_hits": _cache_hits(view),
        "trained_steps": sum(stage["steps_computed"] for stage in (*grown, *computed)),
        **_cost(view),
        "best": None if top is None else _pick(top),
        "confirmed": confirmed_document(view),
        "verdict": _verdict(view),
        "dead_knobs": dead_knob_records(view),
    }


def is_of_search(view: SweepView, event: Mapping[str, Any]) -> bool:
    """Whether a stage is one of those that the sweep planned, not of its confirmation alone."""
    seeds = (view.started.get("spec") or {}).get("seeds") or {}
    return event.get("phase") != "confirm" or event["seed"] in seeds.get("search", ())


def _count(events: Iterable[dict[str, Any]], *states: State) -> int:
    return sum(event["state"] in states for event in events)


def _cache_hits(view: SweepView) -> int:
    if view.state.is_final():
        return view.cache_hits
    return sum(e["cached"] for e in (*view.trainings.values(), *view.finals.values()))


def _cost(view: SweepView) -> dict[str, Any]:
    """Worker-seconds that stages were held for, by phase; those of GPUs, and their price."""
    spec = view.started.get("spec") or {}
    resources = spec.get("resources") or {}
    seconds = spent(view, resources.get("workers", 1))
    total = sum(seconds.values())
    price = (spec.get("budget") or {}).get("usd_per_gpu_hour")
    return {
        "gpu_seconds": round(total * resources.get("gpus_per_worker", 0), 3),
        "worker_seconds": round(total, 3),
        "worker_seconds_by_phase": {phase: round(s, 3) for phase, s in seconds.items()},
        "usd": None if price is None else round(total / 3_600 * price, 2),
    }


def _verdict(view: SweepView) -> dict[str, Any] | None:
    return None if view.verdict is None else view.verdict["gate"]


def _pick(event: dict[str, Any]) -> dict[str, Any]:
    result = event["result"]
    return {
        "final": event["final"],
        "training": event["training"],
        "seed": event["seed"],
        "val_bpb": result["score"]["val_bpb"],
        "artifact_bytes": result["artifact_bytes"],
        "num_params": result["num_params"],
        "params": event["point"],
    }


def best_document(
    view: SweepView, run_ids: Mapping[str, str], home: PurePath | None = None
) -> dict[str, Any]:
    """Describe the best final; its artifact's path is relative to the home unless that is given.

    Raises InfeasibleError, with the nearest miss, where no final is feasible and legal.
    """
    top = best(view)
    if top is None:
        raise InfeasibleError(_nothing_fits(view))
    artifact = PurePath("store", "finals", top["final"], "artifact")
    return {
        **_pick(top),
        "confirmed": confirmed_document(view),
        "verdict": _verdict(view),
        "mlflow_run_id": run_ids.get(top["final"]),
        "artifact": str(artifact if home is None else home / artifact),
    }


def _nothing_fits(view: SweepView) -> str:
    where = f"sweep {view.started.get('sweep_id', '(not started)')}"
    near = smallest_overshoot(view)
    if near is not None:
        return (
            f"{where}: no final is feasible and legal; the nearest, {near.final[:12]}, is "
            f"{near.overshoot_bytes:,} bytes over the cap; prune more, use fewer bits or a "
            "smaller model"
        )
    if not view.finals:
        return f"{where}: no final is scored yet; wait, or run the sweep again to go on"
    return f"{where}: no final is feasible and legal; see the reasons in its report"


def influence(view: SweepView) -> dict[str, float]:
    """Share of the variance of val_bpb that each varying knob explains alone, largest first.

    Numbers with more than six values are cut into four bins of equal count. The share is
    adjusted for the number of groups, as R² is, so that a knob with many values gains nothing
    by chance; it is never below 0. Interactions are not seen.
    """
    rows = [row for row in final_rows(view) if row.val_bpb is not None]
    shares = {path: _explained(rows, path) for path in view.started.get("varying", ())}
    return dict(sorted(shares.items(), key=lambda item: -item[1]))


def _explained(rows: list[Row], path: str) -> float:
    held = [row for row in rows if path in row.point]
    groups = _groups([row.point[path] for row in held])
    num_rows, num_groups = len(held), len(set(groups))
    if num_groups < 2 or num_rows <= num_groups:
        return 0.0
    scores = [float(row.val_bpb or 0.0) for row in held]
    total = _spread(scores)
    if total == 0.0:
        return 0.0
    within = sum(
        _spread([s for s, g in zip(scores, groups, strict=True) if g == group])
        for group in set(groups)
    )
    return max(0.0, 1 - (within / (num_rows - num_groups)) / (total / (num_rows - 1)))


def _groups(values: list[Any]) -> list[Any]:
    is_number = all(isinstance(v, int | float) and not isinstance(v, bool) for v in values)
    if not is_number or len(set(values)) <= 6:
        return [str(value) for value in values]
    ascending = sorted(values)
    edges = [ascending[len(values) * quarter // 4] for quarter in (1, 2, 3)]
    return [sum(value >= edge for edge in edges) for value in values]


def _spread(scores: list[float]) -> float:
    mean = sum(scores) / len(scores)
    return sum((score - mean) ** 2 for score in scores)


def has_several_seeds(view: SweepView) -> bool:
    """Whether the stages of a sweep are told apart by their seed too."""
    seeds = view.started.get("spec", {}).get("seeds") or {}
    named = {s for group in seeds.values() if isinstance(group, list) for s in group}
    ran = {e["seed"] for e in (*view.trainings.values(), *view.finals.values())}
    return len(named | ran) > 1


def table_columns(view: SweepView) -> list[str]:
    """Name the columns of the table of finals, in order; only knobs that vary have one."""
    names = knob_names(view.started.get("varying", ()))
    seed = ["seed"] if has_several_seeds(view) else []
    headroom = [] if view.started.get("cap_bytes") is None else ["headroom"]
    return [*names.values(), *seed, "val_bpb", "bytes", *headroom, "state"]


def table_cells(view: SweepView, row: Row) -> list[str]:
    """Write one row of the table as texts, in the order of `table_columns`."""
    knobs = [
        short_value(row.point[path]) if path in row.point else "-"
        for path in view.started.get("varying", ())
    ]
    seed = [str(row.seed)] if has_several_seeds(view) else []
    bpb = "-" if row.val_bpb is None else f"{row.val_bpb:.4f}"
    num_bytes = "-" if row.artifact_bytes is None else f"{row.artifact_bytes:,}"
    over = row.overshoot_bytes
    headroom = ["-" if over is None else f"{-over:,}"]
    if view.started.get("cap_bytes") is None:
        headroom = []
    state = str(row.state) if row.reason is None else f"{row.state}: {row.reason}"
    return [*knobs, *seed, bpb, num_bytes, *headroom, state]


def summary_table(view: SweepView, *, limit: int | None = None) -> Table:
    """Lay the finals out as a rich table; the best row is green, `limit` keeps the first rows."""
    return _table(view, SIMPLE_HEAD, limit)


def _table(view: SweepView, box: Any, limit: int | None) -> Table:
    rows, top = final_rows(view), best(view)
    table = Table(
        box=box,
        padding=(0, 1, 0, 0),  # four knobs and their results fit into 80 columns
        pad_edge=False,
        caption=_caption(view, len(rows), limit),
        caption_justify="left",
    )
    *values, state = table_columns(view)
    for column in values:
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column(state, overflow="ellipsis", no_wrap=True)
    for row in rows[:limit]:
        is_best = top is not None and row.final == top["final"]
        cells = table_cells(view, row)
        if is_best:
            cells[-1] = "best"
        table.add_row(*map(Text, cells), style="bold green" if is_best else _STYLE.get(row.state))
    return table


def _caption(view: SweepView, num_rows: int, limit: int | None) -> str:
    cap, total = view.started.get("cap_bytes"), view.started.get("num_finals", num_rows)
    shown = f"{min(limit, num_rows)} shown of " if limit is not None and limit < num_rows else ""
    limit_text = "" if cap is None else f"; cap {cap:,} bytes"
    planned = sum(is_of_search(view, event) for event in view.finals.values())
    more = f" and {num_rows - planned} of the confirmation" if planned < num_rows else ""
    settled = f"{shown}{planned} of {total} finals settled{more}; sweep {view.state}{limit_text}"
    return "\n".join([settled, *map(in_words, dead_knobs(view))])


def text_table(view: SweepView, *, limit: int | None = None) -> str:
    """Write the table of finals as plain text: no colour, nothing cut."""
    out = io.StringIO()
    # Wide enough for any row: a pipe has no width to wrap at.
    Console(file=out, width=1_000, color_system=None).print(_table(view, ASCII2, limit))
    return "\n".join(line.rstrip() for line in out.getvalue().splitlines()) + "\n"


def table_records(view: SweepView) -> list[dict[str, Any]]:
    """Write the finals as plain data, in the table's order, knobs by their full paths."""
    return [
        {
            "final": row.final,
            "training": row.training,
            "seed": row.seed,
            "state": str(row.state),
            "reason": row.reason,
            "val_bpb": row.val_bpb,
            "artifact_bytes": row.artifact_bytes,
            "overshoot_bytes": row.overshoot_bytes,
            "entry": row.entry,
            "eval_clock_s": row.eval_clock_s,
            "point": row.point,
        }
        for row in final_rows(view)
    ]


def csv_table(view: SweepView) -> str:
    """Write the finals as CSV, one column per varying knob, everything at full precision."""
    varying = list(view.started.get("varying", ()))
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    records = table_records(view)
    facts = [
        "final", "training", "seed", "state", "reason", "val_bpb", "artifact_bytes",
        "overshoot_bytes", "entry", "eval_clock_s",
    ]  # fmt: skip
    writer.writerow([*facts, *varying])
    for record in records:
        knobs = [record["point"].get(path) for path in varying]
        writer.writerow([*(record[name] for name in facts), *knobs])
    return out.getvalue()
