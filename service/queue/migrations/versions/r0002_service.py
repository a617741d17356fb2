"""Which home the database serves."""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"


def upgrade() -> None:
    """Make room for it."""
    op.create_table(
        "service",
        sa.Column("id", sa.String(32), primary_key=True),
        sa.Column("home", sa.Text, nullable=False),
    )
