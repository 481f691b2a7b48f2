"""The fact of each message by the vendor's ids of it, for edits, deletions and reactions."""

from alembic import op

revision = "0011"
down_revision = "0010"


def upgrade() -> None:
    # Of the message that was accepted under this id; null in rows from before. There need not be such a fact: a
    # message that was ignored has none.
    op.execute("ALTER TABLE inbound_seen ADD COLUMN event_id uuid")
