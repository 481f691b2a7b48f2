"""Totals per notebook, and every effect as a row of its own."""

from alembic import op

revision = "0001"
down_revision = None


def upgrade() -> None:
    op.execute("CREATE TABLE total (notebook text PRIMARY KEY, notes bigint NOT NULL, letters bigint NOT NULL)")
    # nth: how many notes of the notebook were counted when this one was. Counted once and in order, nth = number;
    # no key forbids a second row, so an effect that happened twice would show.
    op.execute("CREATE TABLE effect (notebook text NOT NULL, number bigint NOT NULL, nth bigint NOT NULL)")
