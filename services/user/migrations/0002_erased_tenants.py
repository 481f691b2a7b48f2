"""Erased tenants, and which services have erased them."""

from alembic import op

from infra.postgres.schema import tenant_policy

revision = "0002"
down_revision = "0001"


def upgrade() -> None:
    op.execute("ALTER TABLE tenant ADD COLUMN erased_at timestamptz")
    op.execute("""
        CREATE TABLE tenant_erasure (
            tenant_id text NOT NULL REFERENCES tenant,
            service text NOT NULL,
            erased_at timestamptz NOT NULL DEFAULT clock_timestamp(),
            PRIMARY KEY (tenant_id, service)
        )
    """)
    for statement in tenant_policy("user", "tenant_erasure"):
        op.execute(statement)
