"""Column delivery.part_ids: by which the message of each part of a delivery is found."""

from alembic import op

revision = "0015"
down_revision = "0014"


def upgrade() -> None:
    # Of a delivery in several parts: ``<channel id>/<vendor's id of the message>`` of each part that has one.
    op.execute("ALTER TABLE delivery ADD COLUMN part_ids text[]")
    op.execute("CREATE INDEX delivery_parts ON delivery USING gin (part_ids) WHERE part_ids IS NOT NULL")
