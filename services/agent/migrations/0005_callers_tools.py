"""A run may end with calls of tools that are the caller's."""

from alembic import op

revision = "0005"
down_revision = "0004"


def upgrade() -> None:
    # sealed; null: there are none
    op.execute("ALTER TABLE run ADD COLUMN calls bytea")
