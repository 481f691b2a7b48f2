"""The person of a call, and under whose key its outcome is sealed."""

from alembic import op

revision = "0002"
down_revision = "0001"


def upgrade() -> None:
    # Empty: the caller named no person, and the outcome is sealed under the platform's key.
    op.execute("ALTER TABLE tool_call ADD COLUMN subject_id text NOT NULL DEFAULT ''")
