"""The person whose run a reply ended, and under whose key it is sealed."""

from alembic import op

revision = "0006"
down_revision = "0005"


def upgrade() -> None:
    # Empty: the reply is from before events named the person, and is sealed under the platform's key.
    op.execute("ALTER TABLE utterance ADD COLUMN subject_id text NOT NULL DEFAULT ''")
    op.execute("CREATE INDEX utterance_subject ON utterance (tenant_id, subject_id)")
