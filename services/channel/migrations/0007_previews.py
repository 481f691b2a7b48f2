"""Table preview: messages that show an answer while it is written. Column account.streaming: whether they are sent."""

from alembic import op

from infra.postgres.schema import tenant_policy

revision = "0007"
down_revision = "0006"


def upgrade() -> None:
    op.execute("ALTER TABLE account ADD COLUMN streaming boolean NOT NULL DEFAULT true")
    # message_id: the vendor's id of the message that shows the answer; null: there is none. delivery_id: the delivery
    # that has replaced it, or has been sent before there was one; from then on the message is not edited any more.
    # stopped: showing it failed, and is not tried again. Each process that edits the message holds the row's lock.
    op.execute("""
        CREATE TABLE preview (
            run_id uuid PRIMARY KEY,
            tenant_id text NOT NULL,
            channel_id uuid NOT NULL,
            session_key text NOT NULL,
            message_id text,
            delivery_id uuid,
            stopped boolean NOT NULL DEFAULT false,
            updated_at timestamptz NOT NULL DEFAULT clock_timestamp()
        )
    """)
    op.execute("CREATE INDEX preview_age ON preview (updated_at)")
    for statement in tenant_policy("channel", "preview"):
        op.execute(statement)
