"""Documents have the days of the subscription's time zone. Those that are finalised stay as they are."""

from alembic import op

revision = "0033"
down_revision = "0032"


def upgrade() -> None:
    op.execute("ALTER TABLE invoice ADD COLUMN time_zone text NOT NULL DEFAULT 'UTC'")
    op.execute("""
        UPDATE invoice AS i
        SET time_zone = s.time_zone
        FROM period AS p
        JOIN subscription AS s USING (tenant_id, subscription_id)
        WHERE p.tenant_id = i.tenant_id AND p.period = i.period AND i.status = 'draft'
    """)
