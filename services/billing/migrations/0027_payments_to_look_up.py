"""Payments that are not decided are looked up at their provider: the event of one may be lost."""

from alembic import op

revision = "0027"
down_revision = "0026"


def upgrade() -> None:
    op.execute("""
        ALTER TABLE payment
        ADD COLUMN look_at timestamptz NOT NULL DEFAULT clock_timestamp() + interval '1 hour'
    """)
    op.execute("CREATE INDEX payment_to_look_up ON payment (look_at) WHERE status = 'pending' AND reference <> ''")
