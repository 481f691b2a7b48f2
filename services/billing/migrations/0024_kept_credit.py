"""Credit of expired grants that is kept for the invoices of earlier usage."""

from alembic import op

from infra.postgres.schema import tenant_policy

revision = "0024"
down_revision = "0023"


def upgrade() -> None:
    op.execute("""
        CREATE TABLE kept_credit (
            tenant_id text NOT NULL,
            period bigint NOT NULL,         -- of the usage; its invoice is not finalised
            grant_id uuid NOT NULL,
            nanos bigint NOT NULL CHECK (nanos > 0),
            PRIMARY KEY (tenant_id, period, grant_id),
            FOREIGN KEY (tenant_id, grant_id) REFERENCES credit_grant
        )
    """)
    for statement in tenant_policy("billing", "kept_credit"):
        op.execute(statement)
