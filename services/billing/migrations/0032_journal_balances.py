"""Balances of the journal are kept: their cost does not grow with its entries."""

from alembic import op

from infra.postgres.schema import tenant_policy

revision = "0032"
down_revision = "0031"


def upgrade() -> None:
    op.execute("""
        CREATE TABLE journal_balance (
            tenant_id text NOT NULL,
            account text NOT NULL,
            part text NOT NULL,             -- payments, usage, or empty: other entries
            nanos numeric NOT NULL,
            PRIMARY KEY (tenant_id, account, part)
        )
    """)
    for statement in tenant_policy("billing", "journal_balance"):
        op.execute(statement)
    op.execute("""
        INSERT INTO journal_balance (tenant_id, account, part, nanos)
        SELECT tenant_id, l.account, CASE
                   WHEN e.kind LIKE 'payment\\_%' THEN 'payments'
                   WHEN e.kind = 'burn' AND e.reference = 'usage'
                        OR e.kind = 'grant' AND e.reason = 'corrections of earlier usage' AND e.actor = 'billing'
                        THEN 'usage'
                   ELSE ''
               END, sum(l.amount_nanos)
        FROM journal_entry AS e
        JOIN journal_line AS l USING (tenant_id, entry)
        GROUP BY 1, 2, 3
    """)
