"""Sweeps as rows: read into records, written together with the event that tells of the change."""

import time
from collections.abc import Mapping
from dataclasses import asdict, fields, replace
from typing import Any, Final

from sqlalchemy import Connection, Row, Select, select

from service.queue import schema
from service.queue.moves import Changes, has_got_on
from service.queue.records import NewSweep, QueueEvent, Summary, SweepRecord

_SUMMARY: Final = tuple(field.name for field in fields(Summary))
_SWEEP: Final = tuple(f.name for f in fields(SweepRecord) if f.name not in ("summary", "plan"))
_TOLD: Final = ("state", "reason", "attempt", "gangs_held", "restarts")

_COLUMNS: Final = [schema.sweeps.c[name] for name in (*_SWEEP, *_SUMMARY)]

WITHOUT_PLAN: Final = select(*_COLUMNS)
WITH_PLAN: Final = select(*_COLUMNS, schema.plans.c.plan).join(schema.plans)


def record_of(row: Row[Any]) -> SweepRecord:
    """The record of a row of one of these, with an empty plan where none was selected."""
    plain = dict(zip(_SWEEP, row, strict=False))  # by place: lists have thousands of rows
    plain["assignments"] = tuple(plain["assignments"])
    num_known = len(_COLUMNS)
    plan = row[num_known] if len(row) > num_known else {}
    return SweepRecord(**plain, plan=plan, summary=Summary(*row[len(_SWEEP) : num_known]))


def first(db: Connection, statement: Select[Any]) -> SweepRecord | None:
    """The record of the first row that fits."""
    row = db.execute(statement.limit(1)).first()
    return None if row is None else record_of(row)


def insert(db: Connection, new: NewSweep, first_values: Mapping[str, Any], by: str) -> None:
    """Add a sweep to the end of the queue; `first_values` are the fields that it doesn't bring."""
    row = {**_brought(new), **asdict(_planned(new)), **first_values}
    row |= {"sweep_id": new.sweep_id, "name": new.name, "recipe": new.recipe, "owner": by}
    made = schema.sweeps.insert().values(row).returning(schema.sweeps.c.seq)
    seq = db.execute(made).scalar_one()
    db.execute(schema.plans.insert().values(seq=seq, plan=new.plan))


def replace_request(db: Connection, record: SweepRecord, new: NewSweep) -> SweepRecord:
    """Let a sweep hold what another submission of it asks for."""
    brought = _brought(new)
    db.execute(schema.sweeps.update().where(_is(record)).values(brought))
    db.execute(schema.plans.update().where(schema.plans.c.seq == record.seq).values(plan=new.plan))
    return replace(record, **{**brought, "assignments": new.assignments}, plan=new.plan)


def change(db: Connection, record: SweepRecord, changes: Changes, by: str | None) -> SweepRecord:
    """Write what differs, and an event where others can see the difference."""
    different = {name: v for name, v in changes.items() if getattr(record, name) != v}
    if not different:
        return record
    db.execute(schema.sweeps.update().where(_is(record)).values(different))
    changed = replace(record, **different)
    if different.keys() & set(_TOLD):
        tell(db, record.sweep_id, "changed", by, {name: getattr(changed, name) for name in _TOLD})
    return changed


def change_summary(
    db: Connection, record: SweepRecord, summary: Summary, earlier_s: float = 0.0
) -> SweepRecord:
    """Write how far the sweep is, what it has spent since, and the event, if that is news.
    `earlier_s`: worker-seconds that it spent before its first attempt, which are nobody's. Whoever
    gets on is not lost in a row: the count of restarts begins anew."""
    if summary == record.summary:
        return record
    db.execute(schema.sweeps.update().where(_is(record)).values(asdict(summary)))
    spent = summary.worker_seconds - max(record.summary.worker_seconds, earlier_s)
    if spent > 0:
        _spend(db, record.owner, int(time.time() // 3600), spent)
    tell(db, record.sweep_id, "summary", None, asdict(summary))
    got_on = has_got_on(record.summary, summary)
    record = replace(record, summary=summary)
    return change(db, record, {"restarts": 0}, None) if got_on else record


def tell(
    db: Connection, sweep_id: str, event: str, by: str | None, facts: Mapping[str, Any]
) -> None:
    """Add an event."""
    row = {"at": time.time(), "sweep_id": sweep_id, "event": event, "by": by, "facts": dict(facts)}
    db.execute(schema.events.insert().values(row))


def event_of(row: Row[Any]) -> QueueEvent:
    """The record of a row of `events`."""
    return QueueEvent(**row._mapping)


def _brought(new: NewSweep) -> dict[str, Any]:
    return {
        "bundle": new.bundle,
        "assignments": list(new.assignments),
        "digest": new.digest,
        "gangs": new.gangs,
        "priority": new.priority,
    }


def _planned(new: NewSweep) -> Summary:
    """How far a sweep is that has not begun."""
    plan = new.plan
    return Summary(
        trainings_total=plan.get("trainings", 0),
        finals_total=plan.get("finals", 0),
        cap_bytes=plan.get("cap_bytes"),
    )


def _is(record: SweepRecord) -> Any:
    return schema.sweeps.c.seq == record.seq


def _spend(db: Connection, owner: str, hour: int, worker_seconds: float) -> None:
    table = schema.spending
    row = (table.c.owner == owner) & (table.c.hour == hour)
    more = {"worker_seconds": table.c.worker_seconds + worker_seconds}
    if db.execute(table.update().where(row).values(more)).rowcount == 0:
        db.execute(table.insert().values(owner=owner, hour=hour, worker_seconds=worker_seconds))
