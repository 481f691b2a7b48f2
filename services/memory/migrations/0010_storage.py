"""The bytes that a tenant stores, for the meter of byte-hours."""

from alembic import op

from infra.postgres.schema import tenant_policy

revision = "0010"
down_revision = "0009"


def upgrade() -> None:
    op.execute("""
        CREATE TABLE storage (
            tenant_id text PRIMARY KEY,
            bytes bigint NOT NULL CHECK (bytes >= 0),   -- stored since `since`
            rest numeric NOT NULL,                      -- byte-microseconds before `since` that are not reported yet
            since timestamptz NOT NULL
        )
    """)
    op.execute("""
        INSERT INTO storage
        SELECT tenant_id, sum(size), 0, clock_timestamp()
        FROM document
        GROUP BY tenant_id
    """)
    for statement in tenant_policy("memory", "storage"):
        op.execute(statement)
