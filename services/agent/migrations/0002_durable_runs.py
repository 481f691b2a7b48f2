"""Runs that stop and go on, that ask other agents, that are cancelled for a reason; fallbacks; summaries."""

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
    # A summary of the session up to a message, sealed with the key of one person; it may be about several persons.
    op.execute("ALTER TABLE session ADD COLUMN summary bytea")
    op.execute("ALTER TABLE session ADD COLUMN summary_subject text")
    op.execute("ALTER TABLE session ADD COLUMN summary_about text[] NOT NULL DEFAULT '{}'")
    op.execute("ALTER TABLE session ADD COLUMN summary_seq bigint NOT NULL DEFAULT 0")
    # The run that asked for this one, the step that asked, the depth of the chain, and the limit of its cost.
    op.execute("ALTER TABLE run ADD COLUMN parent_run_id uuid REFERENCES run")
    op.execute("ALTER TABLE run ADD COLUMN parent_step int")
    op.execute("ALTER TABLE run ADD COLUMN depth int NOT NULL DEFAULT 0")
    op.execute("ALTER TABLE run ADD COLUMN limit_nanos bigint")
    op.execute("ALTER TABLE run ADD COLUMN forked_from uuid REFERENCES run")
    op.execute("CREATE INDEX run_of_parent ON run (parent_run_id) WHERE parent_run_id IS NOT NULL")
