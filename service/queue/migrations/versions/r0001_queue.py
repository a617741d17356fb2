"""The first tables: sweeps in their order, who may, and what is to be told."""

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None

COUNTER = sa.BigInteger().with_variant(sa.Integer, "sqlite")


def upgrade() -> None:
    """Make them."""
    _make_sweeps()
    _make_what_sweeps_leave()
    _make_users()
    _make_notices()


def _make_sweeps() -> None:
    op.create_table(
        "sweeps",
        sa.Column("seq", COUNTER, primary_key=True),
        sa.Column("sweep_id", sa.Text, nullable=False),
        sa.Column("name", sa.Text, nullable=False),
        sa.Column("recipe", sa.Text, nullable=False),
        sa.Column("owner", sa.Text, nullable=False),
        sa.Column("priority", sa.Integer, nullable=False),
        sa.Column("gangs", sa.Integer, nullable=False),
        sa.Column("bundle", sa.Text, nullable=False),
        sa.Column("assignments", sa.JSON, nullable=False),
        sa.Column("digest", sa.Text, nullable=False),
        sa.Column("state", sa.String(16), nullable=False),
        sa.Column("reason", sa.Text),
        sa.Column("want", sa.String(16), nullable=False),
        sa.Column("wanted_by", sa.Text),
        sa.Column("attempt", sa.Integer, nullable=False),
        sa.Column("restarts", sa.Integer, nullable=False),
        sa.Column("gangs_held", sa.Integer, nullable=False),
        sa.Column("submitted_at", sa.Double, nullable=False),
        sa.Column("started_at", sa.Double),
        sa.Column("ended_at", sa.Double),
        sa.Column("trainings_total", sa.Integer, nullable=False),
        sa.Column("trainings_done", sa.Integer, nullable=False),
        sa.Column("finals_total", sa.Integer, nullable=False),
        sa.Column("finals_done", sa.Integer, nullable=False),
        sa.Column("num_events", sa.Integer, nullable=False),
        sa.Column("best_final", sa.Text),
        sa.Column("best_bpb", sa.Double),
        sa.Column("best_bytes", sa.BigInteger),
        sa.Column("cap_bytes", sa.BigInteger),
        sa.Column("worker_seconds", sa.Double, nullable=False),
        sa.Column("gpu_seconds", sa.Double, nullable=False),
        sa.UniqueConstraint("sweep_id", name="uq_sweeps_sweep_id"),
        sqlite_autoincrement=True,
    )
    op.create_index("ix_sweeps_state", "sweeps", ["state", "seq"])
    op.create_index("ix_sweeps_owner", "sweeps", ["owner", "seq"])
    op.create_index("ix_sweeps_name", "sweeps", ["name", "seq"])
    op.create_index("ix_sweeps_gangs_held", "sweeps", ["gangs_held"])
    op.create_table(
        "plans",
        sa.Column(
            "seq", COUNTER, sa.ForeignKey("sweeps.seq"), primary_key=True, autoincrement=False
        ),
        sa.Column("plan", sa.JSON, nullable=False),
    )


def _make_what_sweeps_leave() -> None:
    op.create_table(
        "keys",
        sa.Column("user", sa.Text, primary_key=True),
        sa.Column("key", sa.Text, primary_key=True),
        sa.Column("sweep_id", sa.Text, nullable=False),
        sa.Column("digest", sa.Text, nullable=False),
        sa.Column("at", sa.Double, nullable=False),
    )
    op.create_table(
        "events",
        sa.Column("id", COUNTER, primary_key=True),
        sa.Column("at", sa.Double, nullable=False),
        sa.Column("sweep_id", sa.Text, nullable=False),
        sa.Column("event", sa.String(16), nullable=False),
        sa.Column("by", sa.Text),
        sa.Column("facts", sa.JSON, nullable=False),
        sqlite_autoincrement=True,
    )
    op.create_index("ix_events_sweep_id", "events", ["sweep_id", "id"])
    op.create_table(
        "spending",
        sa.Column("owner", sa.Text, primary_key=True),
        sa.Column("hour", sa.Integer, primary_key=True, autoincrement=False),
        sa.Column("worker_seconds", sa.Double, nullable=False),
    )


def _make_users() -> None:
    op.create_table(
        "quotas",
        sa.Column("user", sa.Text, primary_key=True),
        sa.Column("max_gangs", sa.Integer),
        sa.Column("gpu_hours", sa.Double),
        sa.Column("window_days", sa.Double, nullable=False),
        sa.Column("max_priority", sa.Integer, nullable=False),
    )
    op.create_table(
        "tokens",
        sa.Column("id", COUNTER, primary_key=True),
        sa.Column("user", sa.Text, nullable=False),
        sa.Column("role", sa.String(16), nullable=False),
        sa.Column("hash", sa.String(64), nullable=False),
        sa.Column("note", sa.Text, nullable=False),
        sa.Column("created_at", sa.Double, nullable=False),
        sa.Column("expires_at", sa.Double),
        sa.Column("revoked_at", sa.Double),
        sa.UniqueConstraint("hash", name="uq_tokens_hash"),
        sqlite_autoincrement=True,
    )
    op.create_table(
        "audit",
        sa.Column("id", COUNTER, primary_key=True),
        sa.Column("at", sa.Double, nullable=False),
        sa.Column("user", sa.Text, nullable=False),
        sa.Column("action", sa.Text, nullable=False),
        sa.Column("subject", sa.Text, nullable=False),
        sa.Column("outcome", sa.Text, nullable=False),
        sa.Column("address", sa.Text),
        sqlite_autoincrement=True,
    )


def _make_notices() -> None:
    op.create_table(
        "deliveries",
        sa.Column("id", COUNTER, primary_key=True),
        sa.Column("sweep_id", sa.Text, nullable=False),
        sa.Column("key", sa.Text, nullable=False),
        sa.Column("kind", sa.Text, nullable=False),
        sa.Column("payload", sa.JSON, nullable=False),
        sa.Column("created_at", sa.Double, nullable=False),
        sa.Column("attempts", sa.Integer, nullable=False),
        sa.Column("due_at", sa.Double),
        sa.Column("error", sa.Text),
        sa.Column("delivered_at", sa.Double),
        sa.UniqueConstraint("sweep_id", "key", name="uq_deliveries_sweep_id_key"),
        sqlite_autoincrement=True,
    )
    op.create_index("ix_deliveries_due_at", "deliveries", ["due_at"])
    op.create_table(
        "delivery_cursors",
        sa.Column("sweep_id", sa.Text, primary_key=True),
        sa.Column("seq", sa.Integer, nullable=False),
    )
