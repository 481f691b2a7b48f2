"""When the last message of a session was deleted: a run from before keeps no summary."""

from alembic import op

revision = "0012"
down_revision = "0011"


def upgrade() -> None:
    op.execute("ALTER TABLE session ADD COLUMN message_deleted_at timestamptz")
