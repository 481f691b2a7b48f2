"""An event about a payment that is not known yet is applied when it becomes known."""

from alembic import op

revision = "0017"
down_revision = "0016"


def upgrade() -> None:
    op.execute("""
        ALTER TABLE payment_event
        ADD COLUMN currency text NOT NULL DEFAULT '',
        ADD COLUMN detail text NOT NULL DEFAULT ''
    """)
    op.execute("CREATE INDEX payment_event_unmatched ON payment_event (reference) WHERE outcome = 'unmatched'")
    op.execute("GRANT UPDATE (outcome) ON payment_event TO billing_worker")
