"""Columns account.routes and account.groups: which agent gets a message, and which messages of groups count."""

from alembic import op

revision = "0008"
down_revision = "0007"


def upgrade() -> None:
    # routes: encrypted, because a conversation's id may be a person's. null: all messages go to agent_id.
    op.execute("ALTER TABLE account ADD COLUMN routes bytea, ADD COLUMN groups text NOT NULL DEFAULT 'all'")
