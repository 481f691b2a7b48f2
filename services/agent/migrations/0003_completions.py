"""The context that a caller gives with a message in place of the session's history."""

from alembic import op

revision = "0003"
down_revision = "0002"


def upgrade() -> None:
    # sealed
    op.execute("ALTER TABLE message ADD COLUMN context bytea")
