"""The function that locks and reads all that a group of new messages is decided by, in one call."""

from pathlib import Path

from alembic import op

revision = "0009"
down_revision = "0008"


def upgrade() -> None:
    op.execute(Path(__file__).with_name("0009_lock_arrivals.sql").read_text())
