"""Sums over the whole life of an account or a budget have no upper limit.

In a currency of small units (VND, IRR) a bigint of nano-units would end at the worth of some hundred thousand dollars.
"""

from alembic import op

revision = "0036"
down_revision = "0035"


def upgrade() -> None:
    op.execute("""
        ALTER TABLE account
        ALTER COLUMN credit_nanos TYPE numeric,
        ALTER COLUMN debited_nanos TYPE numeric,
        ALTER COLUMN invoiced_nanos TYPE numeric,
        ALTER COLUMN burned_nanos TYPE numeric
    """)
    op.execute("ALTER TABLE budget ALTER COLUMN spent_nanos TYPE numeric")
