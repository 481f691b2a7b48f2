"""Sessions that a person has taken over: their agent answers nothing."""

from alembic import op

revision = "0008"
down_revision = "0007"


def upgrade() -> None:
    # taken_over_by: who answers in place of the agent; null: the agent answers.
    op.execute("ALTER TABLE session ADD COLUMN taken_over_by text")
