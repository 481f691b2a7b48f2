"""A session that branched off from another one, as a thread does from its channel."""

from alembic import op

revision = "0006"
down_revision = "0005"


def upgrade() -> None:
    # parent_seq: the number of messages that the parent had then. Both null: it has no parent, or an empty one.
    op.execute("ALTER TABLE session ADD COLUMN parent_key text, ADD COLUMN parent_seq bigint")
