"""The tables of the service's database. `migrations` makes them; a test holds the two equal.

A sweep's plan stands apart from its row, because the row is rewritten with every bit of progress
and read in every list. Times are Unix seconds.
"""

from enum import StrEnum

from sqlalchemy import (
    JSON,
    BigInteger,
    Column,
    Double,
    Enum,
    ForeignKey,
    Index,
    Integer,
    MetaData,
    String,
    Table,
    Text,
    UniqueConstraint,
)

from service.queue.records import Role, Want
from service.states import State

metadata = MetaData()

# SQLite counts only a column of type INTEGER up by itself.
_COUNTER = BigInteger().with_variant(Integer, "sqlite")


def _one_of(names: type[StrEnum]) -> Enum:
    """A column of these words, as plain text: a new word needs no migration."""
    return Enum(
        names, native_enum=False, length=16, values_callable=lambda kind: [m.value for m in kind]
    )


sweeps = Table(
    "sweeps",
    metadata,
    Column("seq", _COUNTER, primary_key=True),
    Column("sweep_id", Text, nullable=False),
    Column("name", Text, nullable=False),
    Column("recipe", Text, nullable=False),
    Column("owner", Text, nullable=False),
    Column("priority", Integer, nullable=False),
    Column("gangs", Integer, nullable=False),
    Column("bundle", Text, nullable=False),
    Column("assignments", JSON, nullable=False),
    Column("digest", Text, nullable=False),
    Column("state", _one_of(State), nullable=False),
    Column("reason", Text),
    Column("want", _one_of(Want), nullable=False),
    Column("wanted_by", Text),
    Column("attempt", Integer, nullable=False),
    Column("restarts", Integer, nullable=False),
    Column("gangs_held", Integer, nullable=False),
    Column("submitted_at", Double, nullable=False),
    Column("started_at", Double),
    Column("ended_at", Double),
    # Summary, field by field
    Column("trainings_total", Integer, nullable=False),
    Column("trainings_done", Integer, nullable=False),
    Column("finals_total", Integer, nullable=False),
    Column("finals_done", Integer, nullable=False),
    Column("num_events", Integer, nullable=False),
    Column("best_final", Text),
    Column("best_bpb", Double),
    Column("best_bytes", BigInteger),
    Column("cap_bytes", BigInteger),
    Column("worker_seconds", Double, nullable=False),
    Column("gpu_seconds", Double, nullable=False),
    UniqueConstraint("sweep_id", name="uq_sweeps_sweep_id"),
    Index("ix_sweeps_state", "state", "seq"),
    Index("ix_sweeps_owner", "owner", "seq"),
    Index("ix_sweeps_name", "name", "seq"),
    Index("ix_sweeps_gangs_held", "gangs_held"),
    sqlite_autoincrement=True,
)

service = Table(
    "service",
    metadata,
    Column("id", String(32), primary_key=True),
    Column("home", Text, nullable=False),
)
"""The one home whose sweeps these are: its folder, and what HOME/service.id holds."""

plans = Table(
    "plans",
    metadata,
    Column("seq", _COUNTER, ForeignKey("sweeps.seq"), primary_key=True, autoincrement=False),
    Column("plan", JSON, nullable=False),
)

keys = Table(
    "keys",
    metadata,
    Column("user", Text, primary_key=True),
    Column("key", Text, primary_key=True),
    Column("sweep_id", Text, nullable=False),
    Column("digest", Text, nullable=False),
    Column("at", Double, nullable=False),
)
"""Idempotency keys: what each user has submitted under which."""

events = Table(
    "events",
    metadata,
    Column("id", _COUNTER, primary_key=True),
    Column("at", Double, nullable=False),
    Column("sweep_id", Text, nullable=False),
    Column("event", String(16), nullable=False),
    Column("by", Text),
    Column("facts", JSON, nullable=False),
    Index("ix_events_sweep_id", "sweep_id", "id"),
    sqlite_autoincrement=True,
)

spending = Table(
    "spending",
    metadata,
    Column("owner", Text, primary_key=True),
    Column("hour", Integer, primary_key=True, autoincrement=False),
    Column("worker_seconds", Double, nullable=False),
)
"""Worker-seconds by the hour (since 1970) in which the queue learned of them."""

quotas = Table(
    "quotas",
    metadata,
    Column("user", Text, primary_key=True),
    Column("max_gangs", Integer),
    Column("gpu_hours", Double),
    Column("window_days", Double, nullable=False),
    Column("max_priority", Integer, nullable=False),
)

tokens = Table(
    "tokens",
    metadata,
    Column("id", _COUNTER, primary_key=True),
    Column("user", Text, nullable=False),
    Column("role", _one_of(Role), nullable=False),
    Column("hash", String(64), nullable=False),
    Column("note", Text, nullable=False),
    Column("created_at", Double, nullable=False),
    Column("expires_at", Double),
    Column("revoked_at", Double),
    UniqueConstraint("hash", name="uq_tokens_hash"),
    sqlite_autoincrement=True,
)

audit = Table(
    "audit",
    metadata,
    Column("id", _COUNTER, primary_key=True),
    Column("at", Double, nullable=False),
    Column("user", Text, nullable=False),
    Column("action", Text, nullable=False),
    Column("subject", Text, nullable=False),
    Column("outcome", Text, nullable=False),
    Column("address", Text),
    sqlite_autoincrement=True,
)

deliveries = Table(
    "deliveries",
    metadata,
    Column("id", _COUNTER, primary_key=True),
    Column("sweep_id", Text, nullable=False),
    Column("key", Text, nullable=False),
    Column("kind", Text, nullable=False),
    Column("payload", JSON, nullable=False),
    Column("created_at", Double, nullable=False),
    Column("attempts", Integer, nullable=False),
    Column("due_at", Double),
    Column("error", Text),
    Column("delivered_at", Double),
    UniqueConstraint("sweep_id", "key", name="uq_deliveries_sweep_id_key"),
    Index("ix_deliveries_due_at", "due_at"),
    sqlite_autoincrement=True,
)
"""Notices to send; `due_at` is empty once one is delivered."""

delivery_cursors = Table(
    "delivery_cursors",
    metadata,
    Column("sweep_id", Text, primary_key=True),
    Column("seq", Integer, nullable=False),
)
"""Up to which event of its ledger each sweep's notices have been made."""
