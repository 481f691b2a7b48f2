"""The seller as it was when an invoice was finalised: an invoice's files must not change with the settings."""

from alembic import op

revision = "0011"
down_revision = "0010"


def upgrade() -> None:
    op.execute("ALTER TABLE invoice ADD COLUMN seller text NOT NULL DEFAULT '{}'")  # JSON, as `buyer`
