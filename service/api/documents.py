"""A sweep as the API tells it: pure functions from its row and its ledger's view to plain data.

`shapes` has the types of what comes out. Where row and ledger differ the row is right about the
sweep's state, because a ledger cannot tell that its writer is gone.
"""

import base64
import binascii
import json
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from service.budget import Account
from service.groups import pareto_front, scored_rows
from service.labels import knob_names, short_value
from service.ledger import SweepView
from service.queue.records import SweepRecord
from service.report import has_several_seeds, status_document, table_records
from service.specs import Budget
from service.states import ACTS, WAITS, State
from trainer.errors import UsageError
from tune_spaces.space import phase_of

Document = dict[str, Any]


def sweep_document(record: SweepRecord) -> Document:
    """A sweep as the list shows it."""
    summary, plan = record.summary, record.plan
    has_best = summary.best_final is not None
    return {
        "id": record.sweep_id,
        "name": record.name,
        "recipe": record.recipe,
        "owner": record.owner,
        "priority": record.priority,
        "state": State(record.state),
        "reason": record.reason,
        "want": record.want,
        "attempt": record.attempt,
        "gangs": record.gangs,
        "gangs_held": record.gangs_held,
        "submitted_at": record.submitted_at,
        "started_at": record.started_at,
        "ended_at": record.ended_at,
        "progress": {
            "trainings_total": summary.trainings_total or plan.get("trainings", 0),
            "trainings_done": summary.trainings_done,
            "finals_total": summary.finals_total or plan.get("finals", 0),
            "finals_done": summary.finals_done,
        },
        "best": {
            "final": summary.best_final,
            "val_bpb": summary.best_bpb,
            "artifact_bytes": summary.best_bytes,
        }
        if has_best
        else None,
        "cap_bytes": summary.cap_bytes if summary.num_events or not plan else plan.get("cap_bytes"),
        "worker_seconds": summary.worker_seconds,
        "gpu_seconds": summary.gpu_seconds,
    }


@dataclass(frozen=True, slots=True)
class Told:
    """What a ledger adds to a sweep's row; `status` is None before it has begun."""

    status: Document | None
    axes: dict[str, str]
    varying: list[str]
    budget: Document | None


def told_by(view: SweepView, events: Sequence[Document]) -> Told:
    """What a view adds to the row."""
    if not view.started:
        return Told(None, {}, [], None)
    status = status_document(view)
    return Told(
        status=status,
        axes=dict(view.started["axes"]),
        varying=list(view.started["varying"]),
        budget=_budget(view, status["worker_seconds"]),
    )


def _budget(view: SweepView, spent_s: float) -> Document | None:
    budget = view.started["spec"].get("budget")
    limit_s = Account(Budget(**budget), view.first_started_at).limit_s if budget else None
    return None if limit_s is None else {"limit_worker_s": limit_s, "spent_worker_s": spent_s}


def detail_document(record: SweepRecord, told: Told, tracking: Mapping[str, Any]) -> Document:
    """One sweep in full; `tracking`: what its tracking.json holds, empty without one."""
    space = record.plan.get("space", {})
    return {
        **sweep_document(record),
        "plan": record.plan,
        "status": _standing(told.status, record),
        "axes": told.axes or {path: str(phase_of(path)) for path in space},
        "varying": told.varying or list(space),
        "budget": told.budget,
        "waiting": record.reason if record.state in WAITS else None,
        "links": {
            "mlflow": tracking.get("link"),
            "mlflow_table": tracking.get("table_link"),
        },
    }


def _standing(status: Document | None, record: SweepRecord) -> Document | None:
    """The ledger's summary; of a sweep whose driver is gone, with what became of it instead."""
    if status is None or is_live(record) or status["state"] != State.RUNNING:
        return status
    trainings = {**status["trainings"], "running": 0}
    return {**status, "state": str(record.state), "trainings": trainings}


def is_live(record: SweepRecord) -> bool:
    """Whether a driver is at work on the sweep, as far as the queue knows."""
    return record.state in ACTS or record.gangs_held > 0


def training_documents(view: SweepView, events: Sequence[Document]) -> list[Document]:
    """A sweep's trainings, in the order in which they began."""
    starts = {e["training"]: e for e in events if e["event"] == "training_started"}
    reached = {rung["training"]: rung["step"] for rung in view.rungs}
    ids = dict.fromkeys([*starts, *view.begun, *view.trainings])
    return [
        _training(view, view.trainings.get(key), starts.get(key), key, reached.get(key))
        for key in ids
        if key in view.trainings or key in view.begun
    ]


def _training(
    view: SweepView, end: Document | None, start: Document | None, key: str, step: int | None
) -> Document:
    known = end or view.begun[key]
    result = (end or {}).get("result") or {}
    state, reason = _training_state(view, end, key)
    return {
        "id": key,
        "point": known["point"],
        "seed": known["seed"],
        "phase": known.get("phase", "search"),
        "state": state,
        "reason": reason,
        "steps": result.get("steps", step),
        "val_bpb": result.get("parity_bpb"),
        "occupied_s": (end or {}).get("occupied_s", 0.0),
        "branch": (start or {}).get("branch"),
        "cached": (end or {}).get("cached", False),
    }


def _training_state(view: SweepView, end: Document | None, key: str) -> tuple[State, str | None]:
    if key in view.running:
        return State.RUNNING, None
    if end is not None and key not in view.begun:
        return State(end["state"]), end["reason"]
    if view.state.is_final():
        return State.STOPPED, "not finished when the sweep ended; goes on with it"
    return State.QUEUED, None


def without_runners(trainings: Iterable[Document]) -> list[Document]:
    """The trainings, those that run as lost: for a sweep whose driver is gone."""
    return [{**t, "state": State.LOST} if t["state"] == State.RUNNING else t for t in trainings]


def final_documents(view: SweepView, events: Sequence[Document]) -> list[Document]:
    """A sweep's finals, the best first."""
    return [{**row, "state": State(row["state"])} for row in table_records(view)]


def tree_document(view: SweepView, events: Sequence[Document]) -> Document:
    """The stages of a sweep as far as they have begun, and the totals of all."""
    finals: dict[str, Counter[State]] = defaultdict(Counter)
    for event in view.finals.values():
        finals[event["training"]][State(event["state"])] += 1
    status = status_document(view)
    trunk_of = {state: key for key, trunk in view.trunks.items() for state in trunk["states"]}
    return {
        "trunks": [_trunk(event, trunk_of) for event in view.trunks.values()],
        "trainings": [
            {
                "id": training["id"],
                "label": _label(view, training),
                "state": training["state"],
                "branch": trunk_of.get(training["branch"]),
                "finals": dict(finals[training["id"]]),
            }
            for training in training_documents(view, events)
        ],
        "totals": {kind: status[kind] for kind in ("trunks", "trainings", "finals")},
    }


def _trunk(event: Document, trunk_of: Mapping[str, str]) -> Document:
    return {
        "id": event["trunk"],
        "state": State(event["state"]),
        "branch": trunk_of.get(event.get("branch", "")),
        "states": event["states"],
        "steps": event["steps_computed"],
    }


def _label(view: SweepView, training: Document) -> str:
    names = knob_names(view.started.get("varying", ()))
    point = training["point"]
    words = [f"{names.get(path, path)}={short_value(value)}" for path, value in point.items()]
    if has_several_seeds(view):
        words.append(f"seed={training['seed']}")
    return " ".join(words) or "the recipe"


def pareto_document(view: SweepView, events: Sequence[Document]) -> Document:
    """The scored finals in bytes and bpb, the best first, and which of them are on the front."""
    rows = scored_rows(view)
    front = {row.final for row in pareto_front(rows)}
    return {
        "cap_bytes": view.started.get("cap_bytes"),
        "points": [
            {
                "final": row.final,
                "val_bpb": row.val_bpb,
                "artifact_bytes": row.artifact_bytes,
                "state": row.state,
                "point": row.point,
                "is_front": row.final in front,
            }
            for row in rows
            if row.artifact_bytes is not None
        ],
    }


def page_of(
    rows: Sequence[Document], key: str, limit: int, cursor: str | None, states: Collection[State]
) -> Document:
    """At most `limit` of the rows in some states (none named: in any), behind the one that a cursor
    names by its `key`.

    What is put in between meanwhile shifts nothing: a page begins behind a row, not at a number.
    UsageError for a cursor that no page has given.
    """
    start = 0
    if cursor is not None:
        last = _decode(cursor)
        found = (index for index, row in enumerate(rows, 1) if row[key] == last)
        start = next(found, -1)
        if start < 0:
            raise UsageError("cursor: not one of this list; begin without it")
    kept = [row for row in rows[start:] if not states or row["state"] in states]
    has_more = len(kept) > limit
    return {
        "items": kept[:limit],
        "next_cursor": _encode(kept[limit - 1][key]) if has_more else None,
    }


def _encode(key: str) -> str:
    return base64.urlsafe_b64encode(json.dumps(["after", key]).encode()).decode()


def _decode(cursor: str) -> str:
    try:
        kind, key = json.loads(base64.b64decode(cursor, altchars=b"-_", validate=True))
    except (binascii.Error, ValueError, TypeError, RecursionError) as error:
        raise UsageError("cursor: not one that a page has given; begin without it") from error
    if kind != "after" or not isinstance(key, str):
        raise UsageError("cursor: not one that a page has given; begin without it")
    return key
