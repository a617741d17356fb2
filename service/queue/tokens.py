"""Who may call the service: tokens of 256 random bits, of which only the sha256 is kept."""

import hashlib
import re
import secrets
import time
from dataclasses import dataclass
from typing import Any, Final

from sqlalchemy import Engine, Row, select

from service.queue import schema
from service.queue.database import reading, writing
from service.queue.records import Role, User
from trainer.errors import UsageError

PREFIX: Final = "fwy_"
"""What every token begins with, so that scanners of secrets and log filters know one."""

_TOKEN: Final = re.compile(r"fwy_[A-Za-z0-9_-]{43}")
_USER: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._@-]{0,62}")


@dataclass(frozen=True, slots=True)
class TokenRecord:
    """What is known of a token: everything but itself. Times are Unix seconds."""

    id: int
    user: str
    role: Role
    note: str
    created_at: float
    expires_at: float | None
    revoked_at: float | None

    def is_active(self, now: float) -> bool:
        """Whether it opens anything at `now`."""
        return self.revoked_at is None and (self.expires_at is None or now < self.expires_at)


class Tokens:
    """The tokens in one database; thread-safe."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def create(
        self, user: str, role: Role, expires_at: float | None = None, note: str = ""
    ) -> tuple[TokenRecord, str]:
        """Make a token; the plain one is returned here and never again."""
        if not _USER.fullmatch(user):
            raise UsageError(
                f"user {user!r}: a name has 1 to 63 letters, digits or ._@- and begins with one "
                "of the first two"
            )
        if expires_at is not None and not time.time() < expires_at < float("inf"):
            raise UsageError(f"expires_at={expires_at} has passed; give a time to come, or none")
        token = PREFIX + secrets.token_urlsafe(32)
        row = {"user": user, "role": role, "note": note, "hash": _hash(token)}
        row |= {"created_at": time.time(), "expires_at": expires_at}
        with writing(self._engine) as db:
            made = db.execute(schema.tokens.insert().values(row).returning(schema.tokens))
            return _record(made.one()), token

    def verify(self, token: str) -> User | None:
        """Whose the token is; None for one that is unknown, revoked or expired.

        It is looked up by its hash, so how long that takes tells nothing of other tokens.
        """
        if not _TOKEN.fullmatch(token):
            return None
        with reading(self._engine) as db:
            statement = select(schema.tokens).where(schema.tokens.c.hash == _hash(token))
            row = db.execute(statement).first()
        if row is None or not (record := _record(row)).is_active(time.time()):
            return None
        return User(record.user, record.role)

    def list(self) -> list[TokenRecord]:
        """Every token that was made, the oldest first."""
        with reading(self._engine) as db:
            found = db.execute(select(schema.tokens).order_by(schema.tokens.c.id))
            return [_record(row) for row in found]

    def revoke(self, token_id: int) -> TokenRecord:
        """Let a token open nothing from now on; UsageError where there is none of this id."""
        table = schema.tokens
        with writing(self._engine) as db:
            still = (table.c.id == token_id) & table.c.revoked_at.is_(None)
            db.execute(table.update().where(still).values(revoked_at=time.time()))
            row = db.execute(select(table).where(table.c.id == token_id)).first()
        if row is None:
            raise UsageError(f"no token {token_id}; `fairway token ls` shows them")
        return _record(row)

    def any_active(self) -> bool:
        """Whether any token opens anything now."""
        table = schema.tokens.c
        in_time = table.expires_at.is_(None) | (table.expires_at > time.time())
        active = select(table.id).where(table.revoked_at.is_(None) & in_time).limit(1)
        with reading(self._engine) as db:
            return db.execute(active).first() is not None


def _hash(token: str) -> str:
    return hashlib.sha256(token.encode()).hexdigest()


def _record(row: Row[Any]) -> TokenRecord:
    values = dict(row._mapping)
    del values["hash"]
    return TokenRecord(**values)
