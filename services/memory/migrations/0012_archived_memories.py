"""People put memories away, and take them back."""

from alembic import op

revision = "0012"
down_revision = "0011"


def upgrade() -> None:
    op.execute("ALTER TABLE memory ADD COLUMN archived_at timestamptz")
