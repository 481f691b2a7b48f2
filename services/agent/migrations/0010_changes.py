"""The last change of each message, so that an older one changes nothing."""

from alembic import op

revision = "0010"
down_revision = "0009"


def upgrade() -> None:
    # The vendor's number of it.
    op.execute("ALTER TABLE message ADD COLUMN changed bigint NOT NULL DEFAULT 0")
