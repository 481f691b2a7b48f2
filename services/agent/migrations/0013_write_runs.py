"""The function that writes a group of steps of many runs: the items of all lanes that end are ended together."""

from pathlib import Path

from alembic import op

revision = "0013"
down_revision = "0012"


def upgrade() -> None:
    # The arguments and the answer stay as they are: processes of the version before call it too.
    op.execute(Path(__file__).with_name("0013_write_runs.sql").read_text())
