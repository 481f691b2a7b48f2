"""Totals per notebook, and one row for each effect."""

from alembic import op

revision = "0001"
down_revision = None


def upgrade() -> None:
    op.execute("CREATE TABLE total (notebook text PRIMARY KEY, notes bigint NOT NULL, letters bigint NOT NULL)")
    # nth: the count of the notebook's notes including this one. If each is counted once and in order, nth = number.
    # There is no primary key, so that an effect that happened twice leaves two rows.
    op.execute("CREATE TABLE effect (notebook text NOT NULL, number bigint NOT NULL, nth bigint NOT NULL)")
