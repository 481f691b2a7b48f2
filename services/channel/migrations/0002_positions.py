"""Column conversation.position: the number of messages that the conversation has had."""

from alembic import op

revision = "0002"
down_revision = "0001"


def upgrade() -> None:
    op.execute("ALTER TABLE conversation ADD COLUMN position bigint NOT NULL DEFAULT 0")
