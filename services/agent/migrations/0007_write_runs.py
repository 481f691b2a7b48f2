"""The function that writes a group of steps of many runs in one call."""

from pathlib import Path

from alembic import op

revision = "0007"
down_revision = "0006"


def upgrade() -> None:
    op.execute(Path(__file__).with_name("0007_write_runs.sql").read_text())
