"""Which service may dispatch: one, for the one home whose sweeps the database holds.

Two services that shared a database would start every sweep twice. So the database remembers the
home it serves, by the random id in HOME/service.id, which tells a home from one at the same path of
another machine. In PostgreSQL the service holds a lock of its session besides: flock on a shared
home may not reach from one machine to the next.
"""

import secrets
from collections.abc import Callable, Generator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final

from sqlalchemy import Connection, Engine, exc, select, text

from service.queue import schema
from service.queue.database import writing
from trainer.errors import BackendError, UsageError
from trainer.runtime.files import write_text

_DISPATCHES: Final = int.from_bytes(b"service")  # what a service locks in PostgreSQL
_OTHER: Final = (
    "another service dispatches the sweeps of this database; stop it, or give --database-url"
)


@contextmanager
def owned(engine: Engine, home: Path) -> Generator[Callable[[], None]]:
    """Be the one service of this database for as long as the block lasts.

    Yields what the dispatcher asks before every tick: BackendError where the lock was lost with
    its connection and cannot be had again. UsageError where the database serves another home, or
    another service.
    """
    _claim(engine, home.resolve())
    if engine.dialect.name != "postgresql":
        yield lambda: None  # a file of one machine, where the lock on the home is enough
        return
    lock = _SessionLock(engine)
    if not lock.take():
        raise UsageError(_OTHER)
    try:
        yield lock.confirm
    finally:
        lock.release()


def _claim(engine: Engine, home: Path) -> None:
    """Note that the database serves this home, wherever it lies by now."""
    path = home / "service.id"
    ours = _id_of(path)
    table = schema.service
    with writing(engine) as db:
        served = db.execute(select(table)).first()
        if served is None:
            db.execute(table.insert().values(id=ours, home=str(home)))
        elif served.id != ours:
            raise UsageError(
                f"the database serves the home {served.home}, not {home}: give one of them "
                f"another --database-url, or write {served.id} into {path} if they are the same"
            )
        elif served.home != str(home):
            db.execute(table.update().values(home=str(home)))


def _id_of(path: Path) -> str:
    """The id of a home, made when it is first asked for. The caller holds the home's lock."""
    if path.is_file():
        return path.read_text(encoding="utf-8").strip()
    made = secrets.token_hex(16)
    write_text(path, made + "\n")
    return made


class _SessionLock:
    """An advisory lock of PostgreSQL, which a session of its own holds."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._session: Connection | None = None

    def take(self) -> bool:
        """Whether it was to be had. BackendError where the database is out of reach."""
        try:
            session = self._engine.connect()
            words = text("SELECT pg_try_advisory_lock(:key)")
            has_it = bool(session.scalar(words, {"key": _DISPATCHES}))
            session.commit()
        except exc.SQLAlchemyError as error:
            raise BackendError(f"the database: {_line(error)}") from error
        if has_it:
            self._session = session
        else:
            session.close()
        return has_it

    def confirm(self) -> None:
        """See that the session lives, and take the lock anew where it has died."""
        if self._session is not None:
            try:
                self._session.execute(text("SELECT 1"))
                self._session.commit()
            except exc.SQLAlchemyError:
                self.release()
        if self._session is None and not self.take():
            raise BackendError(_OTHER)

    def release(self) -> None:
        """Give it back; the connection is closed with it, not pooled."""
        session, self._session = self._session, None
        if session is not None:
            with suppress(exc.SQLAlchemyError):
                session.invalidate()
                session.close()


def _line(error: Exception) -> str:
    """The first line of what the driver said; SQLAlchemy's own text has the statement in it."""
    words = str(getattr(error, "orig", None) or error)
    return next(iter(words.splitlines()), type(error).__name__)
