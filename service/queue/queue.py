"""The queue: which sweeps there are, who asked what of them, and every change as an event.

Each method is one transaction of its own, so any thread or process may call it, and what it has
returned from is on disk. What a change may be is decided in `moves`; here it is looked up, fenced
and written. Which sweep runs next is decided in `order`.
"""

import base64
import binascii
import time
from collections.abc import Iterable, Sequence
from typing import Any, Final

from sqlalchemy import Connection, Engine, func, select

from service.queue import moves, rows, schema
from service.queue.database import reading, writing
from service.queue.quotas import quota_of
from service.queue.records import (
    Conflict,
    Forbidden,
    NewSweep,
    Page,
    QueueEvent,
    Quota,
    Role,
    Summary,
    SweepRecord,
    UnknownSweep,
    User,
    Verb,
)
from service.states import WAITS, State
from trainer.codec import suggest
from trainer.errors import UsageError

MAX_PAGE: Final = 1000
MAX_KEY: Final = 255

_sweeps = schema.sweeps.c


class Queue:
    """The persistent queue in one database; thread-safe."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def submit(self, new: NewSweep, user: User, key: str | None = None) -> tuple[SweepRecord, bool]:
        """Put a sweep in the queue; True if it wasn't there.

        With the key of an earlier submission of the user's, return that one's sweep; Conflict if
        it was another request. A known sweep with the same digest is returned as it is, or with the
        new priority if it waits and is the user's to control. With another digest, such as more
        budget, it takes the new request and its turn again; Conflict while it acts. Forbidden: a
        reader, another's sweep, a priority over the user's quota.
        """
        if not user.role.includes(Role.SUBMITTER):
            raise Forbidden(f"{user.name} may only read; ask an admin for a submitter's token")
        if key is not None and not 0 < len(key) <= MAX_KEY:
            raise UsageError(f"an idempotency key has 1 to {MAX_KEY} characters, got {len(key)}")
        with writing(self._engine) as db:
            earlier = None if key is None else _sweep_of_key(db, user.name, key, new.digest)
            if earlier is not None:
                return _get(db, earlier), False
            record = rows.first(db, rows.WITH_PLAN.where(_sweeps.sweep_id == new.sweep_id))
            is_new = record is None
            if record is None or record.digest != new.digest:
                _check_priority(db, new, user)
                record = _entered(db, new, user, record)
            elif record.priority != new.priority and _may_reorder(user, record):
                _check_priority(db, new, user)
                rows.tell(db, new.sweep_id, "submitted", user.name, _facts(new, is_new=False))
                record = rows.change(db, record, {"priority": new.priority}, user.name)
            if key is not None:
                _keep_key(db, user.name, key, new)
            return record, is_new

    def of_key(self, user: str, key: str, digest: str) -> SweepRecord | None:
        """The sweep that a user's key stands for, None for a new one; Conflict as `submit`."""
        with reading(self._engine) as db:
            known = _sweep_of_key(db, user, key, digest)
            return None if known is None else _get(db, known)

    def get(self, sweep_id: str) -> SweepRecord:
        """The sweep of this id, with its plan; UnknownSweep."""
        with reading(self._engine) as db:
            return _get(db, sweep_id)

    def find(self, ref: str) -> SweepRecord:
        """A sweep by its id, its name (the newest) or a unique start of its id, with its plan.
        UnknownSweep, or UsageError where several begin so."""
        by_seq = rows.WITH_PLAN.order_by(_sweeps.seq.desc())
        with reading(self._engine) as db:
            for condition in (_sweeps.sweep_id == ref, _sweeps.name == ref):
                record = rows.first(db, by_seq.where(condition))
                if record is not None:
                    return record
            starts = _sweeps.sweep_id.startswith(ref, autoescape=True)
            ids = db.scalars(select(_sweeps.sweep_id).where(starts).order_by(_sweeps.seq)).all()
            ids = [name for name in ids if name.startswith(ref)]  # SQLite's LIKE ignores case
            if not ref or not ids:
                known = db.scalars(select(_sweeps.sweep_id).order_by(_sweeps.seq.desc()).limit(200))
                raise UnknownSweep(f"no sweep {ref!r} in the queue{suggest(ref, known.all())}")
            if len(ids) > 1:
                shown = ", ".join(ids[:5]) + (", ..." if len(ids) > 5 else "")
                raise UsageError(f"{ref!r} fits {len(ids)} sweeps: {shown}")
            return _get(db, ids[0])

    def page(
        self,
        *,
        limit: int = 50,
        cursor: str | None = None,
        states: Sequence[State] = (),
        owner: str | None = None,
        name: str | None = None,
    ) -> Page:
        """Up to `limit` sweeps, the newest first, without their plans.

        `cursor` is the `next_cursor` of the page before, with the same filters. Sweeps that are
        added meanwhile are newer than every page to come: none is shown twice, none left out.
        """
        if not 1 <= limit <= MAX_PAGE:
            raise UsageError(f"limit={limit}: a page has 1 to {MAX_PAGE} sweeps")
        statement = rows.WITHOUT_PLAN.order_by(_sweeps.seq.desc()).limit(limit + 1)
        if cursor is not None:
            statement = statement.where(_sweeps.seq < _seq_of(cursor))
        if states:
            statement = statement.where(_sweeps.state.in_(states))
        if owner is not None:
            statement = statement.where(_sweeps.owner == owner)
        if name is not None:
            statement = statement.where(_sweeps.name == name)
        with reading(self._engine) as db:
            found = [rows.record_of(row) for row in db.execute(statement)]
        items = tuple(found[:limit])
        return Page(items, _cursor_after(items[-1]) if len(found) > limit else None)

    def ask(self, sweep_id: str, verb: Verb, user: User) -> SweepRecord:
        """Ask something of a sweep, as `moves.asked` says; it is done at once unless it acts.

        Conflict where it makes no sense, Forbidden to readers and to submitters on another's
        sweep. What is so already is no error and no event.
        """
        with writing(self._engine) as db:
            record = _get(db, sweep_id)
            _check_may_control(user, record, verb)
            changes = moves.asked(record, verb, user.name, time.time())
            if not changes:
                return record
            rows.tell(db, sweep_id, "asked", user.name, {"verb": verb})
            return rows.change(db, record, changes, user.name)

    def acting(self) -> list[SweepRecord]:
        """The sweeps that hold gangs, by submission, without their plans."""
        return self._list(_sweeps.gangs_held > 0)

    def queued(self) -> list[SweepRecord]:
        """The sweeps that could be claimed, by submission, without their plans."""
        return self._list(_sweeps.state.in_(WAITS) & (_sweeps.gangs_held == 0))

    def claim(self, sweep_id: str, gangs: int) -> SweepRecord | None:
        """Begin an attempt with so many gangs; None if the sweep doesn't wait for one any more.
        Of several who try, one gets it."""
        if gangs < 1:
            raise ValueError(f"an attempt needs gangs, got {gangs}")
        with writing(self._engine) as db:
            record = _get(db, sweep_id)
            if record.state not in WAITS or moves.is_acting(record):
                return None
            return rows.change(db, record, moves.claimed(record, gangs, time.time()), None)

    def advance(
        self,
        record: SweepRecord,
        *,
        state: State | None = None,
        reason: str | None = None,
        summary: Summary | None = None,
        earlier_s: float = 0.0,
    ) -> bool:
        """Write how far the attempt that `record` knows has come; False, and nothing written, if
        the sweep has moved on: another attempt, or at rest by somebody's word.

        A state takes its reason with it, a reason alone leaves the state. Being paused, queued
        again or ended frees the gangs. What was asked in between is kept: see `moves.advanced`.
        `earlier_s`: worker-seconds of the summary that were spent before the first attempt.
        """
        with writing(self._engine) as db:
            now = rows.first(db, rows.WITHOUT_PLAN.where(_sweeps.sweep_id == record.sweep_id))
            if now is None or now.attempt != record.attempt:
                return False
            if state is None and reason is not None:
                state = now.state
            if state is not None and not moves.may_advance(record, now, state):
                return False
            if summary is not None:
                now = rows.change_summary(db, now, summary, earlier_s)
            if state is not None:
                rows.change(db, now, moves.advanced(now, state, reason, time.time()), None)
            return True

    def hold(self, reasons: Iterable[tuple[SweepRecord, str]]) -> None:
        """Write why sweeps wait, all in one transaction: those that still do, and for another
        reason than the record knows."""
        new = [
            (record, reason)
            for record, reason in reasons
            if (record.state, record.reason) != (State.WAITING, reason)
        ]
        if not new:
            return
        with writing(self._engine) as db:
            for seen, reason in new:
                known = (_sweeps.sweep_id == seen.sweep_id) & (_sweeps.attempt == seen.attempt)
                now = rows.first(db, rows.WITHOUT_PLAN.where(known))
                if now is not None and moves.may_advance(seen, now, State.WAITING):
                    changes = moves.advanced(now, State.WAITING, reason, time.time())
                    rows.change(db, now, changes, None)

    def events(
        self, after: int = 0, *, sweep_id: str | None = None, limit: int = 1000
    ) -> list[QueueEvent]:
        """The first `limit` events with an id over `after`. They appear in the order of their
        ids, so that going on after the last one misses none."""
        table = schema.events
        statement = select(table).where(table.c.id > after).order_by(table.c.id).limit(limit)
        if sweep_id is not None:
            statement = statement.where(table.c.sweep_id == sweep_id)
        with reading(self._engine) as db:
            return [rows.event_of(row) for row in db.execute(statement)]

    def last_event_id(self) -> int:
        """The id of the newest event, 0 before the first."""
        with reading(self._engine) as db:
            return db.scalar(select(func.max(schema.events.c.id))) or 0

    def counts(self) -> dict[State, int]:
        """How many sweeps are in each state."""
        statement = select(_sweeps.state, func.count()).group_by(_sweeps.state)
        with reading(self._engine) as db:
            found = {state: count for state, count in db.execute(statement)}
        return {state: found.get(state, 0) for state in State}

    def usage(self, now: float) -> dict[str, tuple[int, float]]:
        """What each user holds and has spent: gangs now, and worker-seconds in the window of
        their quota before `now` (Unix seconds). Who has neither is not named."""
        spent, quotas = schema.spending.c, schema.quotas.c
        window_days = func.coalesce(quotas.window_days, Quota("").window_days)
        in_window = spent.hour > (now - 86400 * window_days) / 3600 - 1
        spending = (
            select(spent.owner, func.sum(spent.worker_seconds))
            .outerjoin(schema.quotas, spent.owner == quotas.user)
            .where(in_window)
            .group_by(spent.owner)
        )
        holding = select(_sweeps.owner, func.sum(_sweeps.gangs_held)).where(_sweeps.gangs_held > 0)
        with reading(self._engine) as db:
            seconds = {owner: float(total) for owner, total in db.execute(spending)}
            gangs = {
                owner: int(total) for owner, total in db.execute(holding.group_by(_sweeps.owner))
            }
        users = sorted({*seconds, *gangs})
        return {user: (gangs.get(user, 0), seconds.get(user, 0.0)) for user in users}

    def audit(
        self, user: str, action: str, subject: str, outcome: str, address: str | None = None
    ) -> None:
        """Note who did what to what, how it went, and from where."""
        row = {"user": user, "action": action, "subject": subject, "outcome": outcome}
        with writing(self._engine) as db:
            db.execute(schema.audit.insert().values(at=time.time(), address=address, **row))

    def audit_log(self, *, limit: int = 100) -> list[dict[str, Any]]:
        """The newest entries, the newest first: id, at, user, action, subject, outcome, address."""
        table = schema.audit
        with reading(self._engine) as db:
            found = db.execute(select(table).order_by(table.c.id.desc()).limit(limit))
            return [dict(row._mapping) for row in found]

    def _list(self, condition: Any) -> list[SweepRecord]:
        statement = rows.WITHOUT_PLAN.where(condition).order_by(_sweeps.seq)
        with reading(self._engine) as db:
            return [rows.record_of(row) for row in db.execute(statement)]


def _get(db: Connection, sweep_id: str) -> SweepRecord:
    record = rows.first(db, rows.WITH_PLAN.where(_sweeps.sweep_id == sweep_id))
    if record is None:
        raise UnknownSweep(f"no sweep {sweep_id!r} in the queue")
    return record


def _check_may_control(user: User, record: SweepRecord, verb: Verb) -> None:
    if not user.role.includes(Role.SUBMITTER):
        raise Forbidden(f"{user.name} may only read; {verb} needs a submitter's token")
    if record.owner != user.name and not user.role.includes(Role.ADMIN):
        raise Forbidden(f"{record.sweep_id} is {record.owner}'s; {verb} needs their token")


def _check_priority(db: Connection, new: NewSweep, user: User) -> None:
    highest = quota_of(db, user.name).max_priority
    if new.priority > highest and not user.role.includes(Role.ADMIN):
        raise Forbidden(f"priority={new.priority}: {user.name} may give up to {highest}")


def _sweep_of_key(db: Connection, user: str, key: str, digest: str) -> str | None:
    table = schema.keys
    mine = (table.c.user == user) & (table.c.key == key)
    known = db.execute(select(table.c.sweep_id, table.c.digest).where(mine)).first()
    if known is None:
        return None
    if known.digest != digest:
        raise Conflict(f"idempotency key {key!r} was used for another request; take a new one")
    return known.sweep_id


def _keep_key(db: Connection, user: str, key: str, new: NewSweep) -> None:
    row = {"user": user, "key": key, "sweep_id": new.sweep_id, "digest": new.digest}
    db.execute(schema.keys.insert().values(at=time.time(), **row))


def _may_reorder(user: User, record: SweepRecord) -> bool:
    """Whether the user may give a sweep that they have submitted again another place."""
    is_theirs = record.owner == user.name or user.role.includes(Role.ADMIN)
    return is_theirs and record.state in WAITS and not moves.is_acting(record)


def _facts(new: NewSweep, *, is_new: bool) -> dict[str, Any]:
    return {
        "name": new.name,
        "digest": new.digest,
        "priority": new.priority,
        "gangs": new.gangs,
        "is_new": is_new,
    }


def _entered(db: Connection, new: NewSweep, user: User, known: SweepRecord | None) -> SweepRecord:
    """A sweep that takes its place in the queue: a new one, or one with another request."""
    if known is None:
        first_values = {**moves.requeued(), "attempt": 0, "submitted_at": time.time()}
        rows.insert(db, new, first_values, user.name)
        rows.tell(db, new.sweep_id, "submitted", user.name, _facts(new, is_new=True))
        return _get(db, new.sweep_id)
    _check_may_control(user, known, Verb.RESUME)
    if moves.is_acting(known):
        raise Conflict(
            f"{new.sweep_id} is {known.state} with another request (budget, limits, ...); "
            "pause it first, then submit again"
        )
    record = rows.replace_request(db, known, new)
    rows.tell(db, new.sweep_id, "submitted", user.name, _facts(new, is_new=False))
    return rows.change(db, record, moves.requeued(), user.name)


def _cursor_after(record: SweepRecord) -> str:
    return base64.urlsafe_b64encode(f"seq<{record.seq}".encode()).decode().rstrip("=")


def _seq_of(cursor: str) -> int:
    try:
        padded = cursor.encode("ascii") + b"=" * (-len(cursor) % 4)
        mark, _, seq = base64.b64decode(padded, altchars=b"-_", validate=True).partition(b"<")
        if mark != b"seq" or len(seq) > 18:
            raise ValueError
        return int(seq)
    except (ValueError, binascii.Error):
        raise UsageError(
            f"cursor={cursor[:40]!r} is none of ours; pass the next_cursor of a page, or none"
        ) from None
