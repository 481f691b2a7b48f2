"""Column account.identity: the account's name at its vendor, as last known."""

from alembic import op

revision = "0016"
down_revision = "0015"


def upgrade() -> None:
    # Null: not known.
    op.execute("ALTER TABLE account ADD COLUMN identity text")
