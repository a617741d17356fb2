"""What each user may hold and spend, as admins set it."""

from dataclasses import asdict

from sqlalchemy import Connection, Engine, select

from service.queue import schema
from service.queue.database import reading, writing
from service.queue.records import Quota
from trainer.errors import UsageError


class Quotas:
    """The quotas in one database; a user without a row has the limits of `Quota`'s defaults."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def get(self, user: str) -> Quota:
        """The user's quota."""
        with reading(self._engine) as db:
            return quota_of(db, user)

    def put(self, quota: Quota) -> None:
        """Set a user's quota in place of the one before; UsageError where it makes no sense."""
        _check(quota)
        table, values = schema.quotas, asdict(quota)
        with writing(self._engine) as db:
            known = table.c.user == quota.user
            if db.execute(table.update().where(known).values(values)).rowcount == 0:
                db.execute(table.insert().values(values))

    def list(self) -> list[Quota]:
        """Every quota that was set, by user."""
        table = schema.quotas
        with reading(self._engine) as db:
            found = db.execute(select(table).order_by(table.c.user))
            return [Quota(**row._mapping) for row in found]


def quota_of(db: Connection, user: str) -> Quota:
    """The user's quota, read in a transaction that is under way."""
    table = schema.quotas
    row = db.execute(select(table).where(table.c.user == user)).first()
    return Quota(user) if row is None else Quota(**row._mapping)


def _check(quota: Quota) -> None:
    if not quota.user:
        raise UsageError("a quota needs the name of its user")
    if quota.max_gangs is not None and quota.max_gangs < 0:
        raise UsageError(f"max_gangs={quota.max_gangs} of {quota.user}; write 0 or more")
    if quota.gpu_hours is not None and not 0 <= quota.gpu_hours < float("inf"):
        raise UsageError(f"gpu_hours={quota.gpu_hours} of {quota.user}; write 0 or more")
    if not 0 < quota.window_days <= 3660:
        raise UsageError(f"window_days={quota.window_days} of {quota.user}; write 1 to 3660")
