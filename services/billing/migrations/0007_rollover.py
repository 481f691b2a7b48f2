"""Rollover of grants."""

from alembic import op

revision = "0007"
down_revision = "0006"


def upgrade() -> None:
    op.execute("""
        ALTER TABLE credit_grant
        ADD COLUMN rollover_until timestamptz,      -- the rest at expires_at stays until then; null: nothing
        ADD COLUMN rollover_nanos bigint,           -- at most; null: all of it
        ADD CHECK (rollover_until > expires_at)
    """)
