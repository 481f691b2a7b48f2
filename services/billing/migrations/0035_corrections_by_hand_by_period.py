"""Corrections by hand on another invoice limit the void and the credit notes of the usage's own, as re-rating does."""

from alembic import op

revision = "0035"
down_revision = "0034"


def upgrade() -> None:
    # Above zero: charged. At face value, and so beside the commitment.
    op.execute("ALTER TABLE period_correction ADD COLUMN by_hand_nanos bigint NOT NULL DEFAULT 0")
    op.execute("""
        INSERT INTO period_correction (tenant_id, period, usage_period, nanos, by_hand_nanos)
        SELECT l.tenant_id, l.period, u.period, 0, -sum(l.amount_nanos)
        FROM ledger_entry AS l
        JOIN usage AS u USING (tenant_id, usage_id)
        WHERE l.kind = 'correction' AND l.price_version IS NULL AND u.verdict = 'counted' AND u.period <> 0
        GROUP BY l.tenant_id, l.period, u.period
        ON CONFLICT (tenant_id, period, usage_period) DO UPDATE SET by_hand_nanos = excluded.by_hand_nanos
    """)
