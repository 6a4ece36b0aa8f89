"""Runs migrations inside the transaction that Database.migrate opened."""

from alembic import context

from service.stores.schema import metadata

context.configure(connection=context.config.attributes["connection"], target_metadata=metadata)
context.run_migrations()
