"""Index of deliveries by the vendor's id of their message, for receipts."""

from alembic import op

revision = "0009"
down_revision = "0008"


def upgrade() -> None:
    op.execute(
        "CREATE INDEX delivery_message ON delivery (channel_id, vendor_message_id) WHERE vendor_message_id IS NOT NULL"
    )
