"""Every delivery as a row of its own."""

from alembic import op

revision = "0001"
down_revision = None


def upgrade() -> None:
    # No key forbids a second row: what was delivered twice, or out of order, would show.
    op.execute(
        "CREATE TABLE delivery (nth bigint GENERATED ALWAYS AS IDENTITY, street text NOT NULL, "
        "number bigint NOT NULL, state text NOT NULL)"
    )
