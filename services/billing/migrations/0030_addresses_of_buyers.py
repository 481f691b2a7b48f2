"""The buyer's address, which stands on its invoices."""

from alembic import op

revision = "0030"
down_revision = "0029"


def upgrade() -> None:
    op.execute("ALTER TABLE buyer ADD COLUMN address text NOT NULL DEFAULT ''")
