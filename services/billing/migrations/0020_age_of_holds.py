"""Finds old holds. A BRIN index costs a new hold nothing."""

from alembic import op

revision = "0020"
down_revision = "0019"


def upgrade() -> None:
    op.execute("CREATE INDEX hold_age ON hold USING brin (least(expires_at, ended_at)) WITH (autosummarize = on)")
