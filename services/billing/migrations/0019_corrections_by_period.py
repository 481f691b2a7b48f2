"""A commitment is that of its period: corrections of other periods do not fill it, and its own count when they come."""

from alembic import op

from infra.postgres.schema import tenant_policy

revision = "0019"
down_revision = "0018"


def upgrade() -> None:
    # The lines of a closed period that fill its commitment, and the corrections of its usage on later invoices.
    op.execute("ALTER TABLE period ADD COLUMN counted_nanos bigint")
    op.execute("""
        CREATE TABLE period_correction (
            tenant_id text NOT NULL,
            period bigint NOT NULL,         -- on its invoice
            usage_period bigint NOT NULL,   -- of the corrected usage; 0: none
            nanos bigint NOT NULL,
            PRIMARY KEY (tenant_id, period, usage_period)
        )
    """)
    for statement in tenant_policy("billing", "period_correction"):
        op.execute(statement)
