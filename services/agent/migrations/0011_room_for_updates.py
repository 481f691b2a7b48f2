"""Room in the pages of runs and steps, so that the updates of a running run stay in the page and change no index."""

from alembic import op

revision = "0011"
down_revision = "0010"


def upgrade() -> None:
    # For rows from now on. A run has four updates while it runs, a step one.
    op.execute("ALTER TABLE run SET (fillfactor = 50)")
    op.execute("ALTER TABLE run_step SET (fillfactor = 50)")
