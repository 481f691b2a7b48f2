"""Grants cover the debits that no invoice has: those of usage outside of the time of a subscription."""

from alembic import op

revision = "0013"
down_revision = "0012"


def upgrade() -> None:
    op.execute("""
        ALTER TABLE account
        ADD COLUMN invoiced_nanos bigint NOT NULL DEFAULT 0     -- the part of the debits that belongs to periods
    """)
    # The debits of a subscribed tenant were not covered by grants until now, also those of usage at other times.
    op.execute("""
        UPDATE account AS a
        SET invoiced_nanos = b.nanos, burned_nanos = a.debited_nanos - b.nanos
        FROM (
            SELECT tenant_id, sum(quantity)::bigint AS nanos
            FROM usage_bucket
            WHERE meter IN ('cost_nanos', 'correction_nanos') AND period <> 0
            GROUP BY tenant_id
        ) AS b
        WHERE b.tenant_id = a.tenant_id
    """)
