"""Credit notes are mailed. The ones that exist are not."""

from alembic import op

revision = "0022"
down_revision = "0021"


def upgrade() -> None:
    op.execute("ALTER TABLE credit_note ADD COLUMN mailed boolean NOT NULL DEFAULT true")
    op.execute("ALTER TABLE credit_note ALTER COLUMN mailed SET DEFAULT false")
    op.execute("CREATE INDEX credit_note_to_mail ON credit_note (made_at) WHERE NOT mailed")
    op.execute("GRANT UPDATE (mailed) ON credit_note TO billing_worker")
