"""Corrections of the usage of an unpaid invoice are given by a credit note on that invoice."""

from alembic import op

revision = "0031"
down_revision = "0030"


def upgrade() -> None:
    op.execute("""
        ALTER TABLE credit_note
        ADD COLUMN corrections_nanos bigint NOT NULL DEFAULT 0  -- before tax, taken over from another invoice
    """)
