"""One row for each delivery."""

from alembic import op

revision = "0001"
down_revision = None


def upgrade() -> None:
    # There is no primary key, so that a parcel that was delivered twice leaves two rows.
    op.execute(
        "CREATE TABLE delivery (nth bigint GENERATED ALWAYS AS IDENTITY, street text NOT NULL, "
        "number bigint NOT NULL, state text NOT NULL)"
    )
