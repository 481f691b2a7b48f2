"""The channel in which a memory was said."""

from alembic import op

revision = "0013"
down_revision = "0012"


def upgrade() -> None:
    # NULL: it came by the API, or it is older than this column.
    op.execute("ALTER TABLE memory ADD COLUMN channel_id uuid")
