"""Alembic's entry for every service: the connection and the schema come from `infra.postgres.schema.migrate`."""

from alembic import context

context.configure(
    connection=context.config.attributes["connection"],
    version_table_schema=context.config.attributes["schema"],
)
with context.begin_transaction():
    context.run_migrations()
