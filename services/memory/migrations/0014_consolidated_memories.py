"""Memories that were made of several others, and the origin of learned ones. Uses are counted apart from repetitions,
which have events, so that the other columns follow from the events alone."""

from alembic import op

revision = "0014"
down_revision = "0013"


def upgrade() -> None:
    op.execute("ALTER TABLE memory ADD COLUMN parts uuid[] NOT NULL DEFAULT '{}'")
    # rules, or the name of a model; empty: a client wrote it, or it is older than this column.
    op.execute("ALTER TABLE memory ADD COLUMN learned_by text NOT NULL DEFAULT ''")
    # How often and when last it was given to an agent.
    op.execute("ALTER TABLE memory ADD COLUMN recalls int NOT NULL DEFAULT 0")
    op.execute("ALTER TABLE memory ADD COLUMN recalled_at timestamptz")
