"""Budgets by minute, which are rates."""

from alembic import op

revision = "0014"
down_revision = "0013"


def upgrade() -> None:
    op.execute("ALTER TABLE budget DROP CONSTRAINT budget_period_check")
    op.execute("""
        ALTER TABLE budget
        ADD CONSTRAINT budget_period_check CHECK (period IN ('minute', 'day', 'month', 'total'))
    """)
    # A rate has refused, and the same request fits into another minute.
    op.execute("ALTER TABLE hold ADD COLUMN retry_later boolean NOT NULL DEFAULT false")
