"""What a caller gives along with a message, instead of a session's past."""

from alembic import op

revision = "0003"
down_revision = "0002"


def upgrade() -> None:
    # sealed
    op.execute("ALTER TABLE message ADD COLUMN context bytea")
