"""A dispute counts the money that was withdrawn for it, which may come back."""

from alembic import op

revision = "0023"
down_revision = "0022"


def upgrade() -> None:
    # `minor` of a dispute is the money that is withdrawn now, by the report with the most movements of it.
    op.execute("ALTER TABLE dispute ADD COLUMN movements int NOT NULL DEFAULT 0")
    op.execute("ALTER TABLE payment_event ADD COLUMN movements int NOT NULL DEFAULT 0")
    op.execute("""
        UPDATE dispute
        SET movements = CASE state WHEN 'won' THEN 2 ELSE 1 END, minor = CASE state WHEN 'won' THEN 0 ELSE minor END
    """)
    op.execute("""
        UPDATE payment_event
        SET movements = CASE kind WHEN 'dispute_won' THEN 2 ELSE 1 END,
            minor = CASE kind WHEN 'dispute_won' THEN 0 ELSE minor END
        WHERE kind LIKE 'dispute\\_%' AND outcome = 'unmatched'
    """)
