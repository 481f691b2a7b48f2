"""Why a run is to be cancelled, the lane item that executes it, messages that decide instead of asking; fallbacks."""

from alembic import op

revision = "0002"
down_revision = "0001"


def upgrade() -> None:
    op.execute("ALTER TABLE run ADD COLUMN cancel_reason text")
    op.execute("UPDATE run SET cancel_reason = 'cancelled on request' WHERE cancel_requested")
    op.execute("ALTER TABLE run DROP COLUMN cancel_requested")
    # Null: the first, whose id is the run's.
    op.execute("ALTER TABLE run ADD COLUMN item_id uuid")
    op.execute("ALTER TABLE message ADD COLUMN decides boolean NOT NULL DEFAULT false")
    # Sealed: the key of the fallback's provider.
    op.execute("ALTER TABLE agent_version ADD COLUMN fallback_key bytea")
