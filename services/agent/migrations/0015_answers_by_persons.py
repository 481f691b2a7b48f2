"""The model reads messages that a member wrote in a session that was taken over as answers."""

from alembic import op

revision = "0015"
down_revision = "0014"


def upgrade() -> None:
    op.execute("ALTER TABLE message ADD COLUMN is_answer boolean NOT NULL DEFAULT false")
