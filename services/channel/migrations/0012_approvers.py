"""Column account.approvers: who may decide about a tool call by a message in the channel."""

from alembic import op

revision = "0012"
down_revision = "0011"


def upgrade() -> None:
    # Empty: whom the agent's definition names.
    op.execute("ALTER TABLE account ADD COLUMN approvers text[] NOT NULL DEFAULT '{}'")
