"""The service's database: SQLite beside the sweeps, or PostgreSQL for a team.

Writers take turns on both, SQLite's by BEGIN IMMEDIATE and PostgreSQL's by an advisory lock. So a
transaction of `writing` may look first and write then, and ids of events become visible in their
order: who has read up to one has missed none before it.
"""

import os
import sqlite3
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.resources import files
from pathlib import Path
from typing import Any, Final

import sqlalchemy
from alembic import command
from alembic.config import Config
from alembic.util import CommandError
from sqlalchemy import URL, Connection, Engine, event, exc, make_url, text

from service.paths import Paths
from trainer.errors import BackendError, UsageError

BUSY_S: Final = 15
"""How long a transaction waits for its turn, a thread for a connection."""

VERSION_TABLE: Final = "fairway_schema_version"
"""Not Alembic's usual name, which MLflow takes where the two share a database."""

_TURN: Final = int.from_bytes(b"fairway")  # what PostgreSQL's writers lock
_MIGRATING = threading.Lock()  # Alembic keeps what it works on in module globals


def default_url(paths: Paths) -> str:
    """The SQLite database of a Fairway home."""
    return f"sqlite:///{(paths.home / 'service.db').resolve()}"


def open_database(url: str) -> Engine:
    """Connect, and bring the tables up to date; safe from several processes at once.

    `url` is sqlite:///PATH or postgresql://USER:PASSWORD@HOST/NAME. UsageError where it is neither
    or the tables are those of a newer Fairway, BackendError where the database is out of reach;
    neither tells the password.
    """
    parsed = _checked(url)
    is_sqlite = parsed.get_backend_name() == "sqlite"
    options: dict[str, Any] = {"pool_size": 10, "max_overflow": 10, "pool_timeout": BUSY_S}
    if not is_sqlite:
        # A server that is gone is noticed, not waited for: before use, and while waiting for it.
        options |= {"pool_pre_ping": True, "connect_args": _patience(parsed)}
    engine = sqlalchemy.create_engine(parsed, hide_parameters=True, **options)
    event.listen(engine, "connect", _prepare_sqlite if is_sqlite else _prepare_postgres)
    event.listen(engine, "begin", _begin_sqlite if is_sqlite else _begin_postgres)
    try:
        if is_sqlite:
            _create_file(engine, Path(parsed.database or ""))
        _migrate(engine)
    except BaseException:
        engine.dispose()
        raise
    return engine


def is_reachable(engine: Engine) -> bool:
    """Whether the database answers."""
    try:
        with reading(engine) as db:
            db.execute(text("SELECT 1"))
    except BackendError:
        return False
    return True


@contextmanager
def reading(engine: Engine) -> Iterator[Connection]:
    """A transaction that sees one state of the database and writes nothing."""
    with _told_in_one_line(engine), engine.connect() as connection, connection.begin():
        yield connection


@contextmanager
def writing(engine: Engine) -> Iterator[Connection]:
    """A transaction that no other writer runs beside; committed at the end, or not at all."""
    with (
        _told_in_one_line(engine),
        engine.connect().execution_options(takes_turn=True) as connection,
        connection.begin(),
    ):
        yield connection


def _checked(url: str) -> URL:
    try:
        parsed = make_url(url)
    except (exc.ArgumentError, ValueError):
        parsed = URL.create("unreadable")
    if parsed.drivername == "sqlite" and parsed.database not in (None, "", ":memory:"):
        return parsed
    if parsed.drivername not in ("postgresql", "postgresql+psycopg"):
        raise UsageError(
            "the database's address is not one; write sqlite:////folder/service.db or "
            "postgresql://user:password@host/name"
        )
    try:
        import psycopg  # noqa: F401  # an extra of its own
    except ImportError as error:
        raise UsageError(
            f"{_name(parsed)}: PostgreSQL needs psycopg; install fairway[postgres]"
        ) from error
    return parsed.set(drivername="postgresql+psycopg")


def _name(url: URL) -> str:
    """The address without what may be secret: the password, and options that may hold one."""
    return url.set(password=None, query={}).render_as_string()


def _patience(url: URL) -> dict[str, Any]:
    """Bounds on waiting for PostgreSQL that the address doesn't set itself, for libpq."""
    bounds = {"connect_timeout": 5, "tcp_user_timeout": 1000 * BUSY_S, "keepalives_idle": BUSY_S}
    return {name: bound for name, bound in bounds.items() if name not in url.query}


def _prepare_sqlite(connection: sqlite3.Connection, _: Any) -> None:
    connection.isolation_level = None  # transactions begin where _begin_sqlite says
    connection.execute(f"PRAGMA busy_timeout = {1000 * BUSY_S}")
    connection.execute("PRAGMA synchronous = FULL")  # what was acknowledged outlives the machine
    connection.execute("PRAGMA foreign_keys = ON")


def _begin_sqlite(connection: Connection) -> None:
    takes_turn = connection.get_execution_options().get("takes_turn", False)
    connection.exec_driver_sql("BEGIN IMMEDIATE" if takes_turn else "BEGIN")


def _prepare_postgres(connection: Any, _: Any) -> None:
    with connection.cursor() as cursor:
        cursor.execute(f"SET lock_timeout = '{BUSY_S}s'")
        # A writer that stands still, say under SIGSTOP, loses its turn.
        cursor.execute(f"SET idle_in_transaction_session_timeout = '{BUSY_S}s'")
    connection.commit()


def _begin_postgres(connection: Connection) -> None:
    if connection.get_execution_options().get("takes_turn", False):
        connection.execute(text("SELECT pg_advisory_xact_lock(:turn)"), {"turn": _TURN})
    else:
        connection.exec_driver_sql("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ, READ ONLY")


def _create_file(engine: Engine, path: Path) -> None:
    """Make the file, for its owner only, and switch it to WAL, which it remembers."""
    with _told_in_one_line(engine):
        path.parent.mkdir(parents=True, exist_ok=True)
        os.close(os.open(path, os.O_RDWR | os.O_CREAT, 0o600))
        deadline = time.monotonic() + BUSY_S
        while not _is_wal(engine, is_last=time.monotonic() > deadline):
            time.sleep(0.05)


def _is_wal(engine: Engine, is_last: bool) -> bool:
    """Switch to WAL; False if another process holds the file. SQLite doesn't wait for its turn
    here, busy_timeout or not."""
    connection = engine.raw_connection()
    try:
        connection.cursor().execute("PRAGMA journal_mode = WAL")
    except sqlite3.OperationalError as error:
        if is_last or error.sqlite_errorcode != sqlite3.SQLITE_BUSY:
            raise
        return False
    finally:
        connection.close()
    return True


def _migrate(engine: Engine) -> None:
    config = Config()
    folder = str(files("service.queue") / "migrations")
    config.set_main_option("script_location", folder.replace("%", "%%"))
    with _MIGRATING, writing(engine) as connection:
        config.attributes["connection"] = connection
        try:
            command.upgrade(config, "head")
        except CommandError as error:
            raise UsageError(
                f"{_name(engine.url)}: its tables are not this Fairway's ({error}); "
                "start the version that made them, or a newer one"
            ) from error


@contextmanager
def _told_in_one_line(engine: Engine) -> Iterator[None]:
    """Turn what the database raises into errors that a user can act on."""
    try:
        yield
    except (exc.DataError, UnicodeEncodeError, OverflowError) as error:
        # A NUL or half a surrogate pair in a text, an integer of 65 bits.
        raise UsageError(f"a value that the database cannot hold: {_line(error)}") from error
    except exc.TimeoutError as error:
        raise BackendError(f"{_name(engine.url)}: every connection is in use; try again") from error
    except (exc.OperationalError, exc.DatabaseError, sqlite3.Error, OSError) as error:
        if isinstance(error, exc.IntegrityError | exc.ProgrammingError):
            raise  # a bug
        raise BackendError(f"{_name(engine.url)}: {_line(error)}") from error


def _line(error: Exception) -> str:
    """The first line of what the driver said; SQLAlchemy's own text has the statement in it."""
    text = str(getattr(error, "orig", None) or error)
    return next(iter(text.splitlines()), type(error).__name__)
