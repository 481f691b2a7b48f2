"""Payment methods that were removed. The rows stay: payments name them, and one of them names the customer."""

from alembic import op

revision = "0029"
down_revision = "0028"


def upgrade() -> None:
    op.execute("ALTER TABLE payment_method ADD COLUMN removed_at timestamptz")
