"""Alembic's entry: migrates over the connection, and in the transaction, that it is handed."""

from alembic import context

from service.queue.database import VERSION_TABLE
from service.queue.schema import metadata

context.configure(
    connection=context.config.attributes["connection"],
    target_metadata=metadata,
    version_table=VERSION_TABLE,
    transactional_ddl=True,  # SQLite can, if the driver is told to begin; Alembic assumes not
)
context.run_migrations()
