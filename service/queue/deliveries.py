"""Notices on their way out: each is made once, tried until it arrives, and then never again."""

import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Connection, Engine, func, select

from service.queue import schema
from service.queue.database import reading, writing


@dataclass(frozen=True, slots=True)
class Delivery:
    """A notice that has not arrived yet. `key` is unique in its sweep; `attempts` have failed,
    the last of them with `error`. Times are Unix seconds."""

    id: int
    sweep_id: str
    key: str
    kind: str
    payload: dict[str, Any]
    created_at: float
    attempts: int
    due_at: float
    error: str | None


class Deliveries:
    """The outbox of notices in one database; thread-safe."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def add(self, sweep_id: str, key: str, kind: str, payload: dict[str, Any]) -> bool:
        """Put a notice in the outbox; False if the sweep has one of this key already, sent or
        not."""
        with writing(self._engine) as db:
            return _add(db, sweep_id, key, kind, payload)

    def add_all(
        self, sweep_id: str, upto_seq: int, items: Iterable[tuple[str, str, dict[str, Any]]]
    ) -> int:
        """Put in the notices (key, kind, payload) that follow from a sweep's ledger up to event
        `upto_seq`, and remember that with them. Returns how many were new."""
        table = schema.delivery_cursors
        with writing(self._engine) as db:
            num_new = sum(_add(db, sweep_id, *item) for item in items)
            before = _seen(db, sweep_id)
            if before is None:
                db.execute(table.insert().values(sweep_id=sweep_id, seq=upto_seq))
            elif before < upto_seq:
                mine = table.c.sweep_id == sweep_id
                db.execute(table.update().where(mine).values(seq=upto_seq))
            return num_new

    def seen(self, sweep_id: str) -> int:
        """Up to which event of its ledger the sweep's notices are in the outbox."""
        with reading(self._engine) as db:
            return _seen(db, sweep_id) or 0

    def due(self, now: float, limit: int = 100, *, key_start: str = "") -> list[Delivery]:
        """What is to be tried at `now`, the oldest first; only what has a key with this start.
        Of each sweep only its oldest notice, which the others have to wait for."""
        table = schema.deliveries
        shown = [column for column in table.c if column.name != "delivered_at"]
        mine = table.c.due_at.is_not(None) & table.c.key.startswith(key_start, autoescape=True)
        oldest = select(func.min(table.c.id)).where(mine).group_by(table.c.sweep_id)
        wanted = table.c.id.in_(oldest) & (table.c.due_at <= now)
        statement = select(*shown).where(wanted).order_by(table.c.id).limit(limit)
        with reading(self._engine) as db:
            return [Delivery(**row._mapping) for row in db.execute(statement)]

    def num_waiting(self) -> int:
        """How many notices have not arrived yet."""
        table = schema.deliveries
        with reading(self._engine) as db:
            waiting = select(func.count()).where(table.c.due_at.is_not(None))
            return db.execute(waiting).scalar_one()

    def give_up_others(self, key_starts: Iterable[str], error: str) -> int:
        """Give up whatever waits under a key with none of these starts; tell how many those are."""
        table = schema.deliveries
        others = [~table.c.key.startswith(start, autoescape=True) for start in key_starts]
        statement = table.update().where(table.c.due_at.is_not(None), *others)
        with writing(self._engine) as db:
            return db.execute(statement.values(due_at=None, error=error)).rowcount

    def delivered(self, delivery_id: int, at: float) -> None:
        """Note that a notice has arrived."""
        self._set(delivery_id, {"delivered_at": at, "due_at": None, "error": None})

    def failed(self, delivery_id: int, error: str, retry_at: float | None) -> None:
        """Note that a try has failed, and when the next is due: never, where it is given up. One
        that has arrived stays so."""
        tries = schema.deliveries.c.attempts + 1
        self._set(delivery_id, {"error": error, "due_at": retry_at, "attempts": tries})

    def _set(self, delivery_id: int, values: dict[str, Any]) -> None:
        table = schema.deliveries
        waiting = (table.c.id == delivery_id) & table.c.due_at.is_not(None)
        with writing(self._engine) as db:
            db.execute(table.update().where(waiting).values(values))


def _add(db: Connection, sweep_id: str, key: str, kind: str, payload: dict[str, Any]) -> bool:
    table = schema.deliveries
    known = select(table.c.id).where((table.c.sweep_id == sweep_id) & (table.c.key == key))
    if db.execute(known).first() is not None:
        return False
    row = {"sweep_id": sweep_id, "key": key, "kind": kind, "payload": payload, "attempts": 0}
    now = time.time()
    db.execute(table.insert().values(**row, created_at=now, due_at=now))
    return True


def _seen(db: Connection, sweep_id: str) -> int | None:
    table = schema.delivery_cursors
    return db.scalar(select(table.c.seq).where(table.c.sweep_id == sweep_id))
