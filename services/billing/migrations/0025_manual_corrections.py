"""Finds corrections that an operator has booked for a record: re-rating leaves such a record out."""

from alembic import op

revision = "0025"
down_revision = "0024"


def upgrade() -> None:
    op.execute("""
        CREATE INDEX ledger_manual ON ledger_entry (tenant_id, usage_id)
        WHERE kind = 'correction' AND price_version IS NULL
    """)
