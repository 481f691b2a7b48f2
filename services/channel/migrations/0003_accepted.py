"""Table accepted: messages that were accepted from a vendor and wait to be drained into their conversations."""

from alembic import op

from infra.postgres.schema import tenant_policy

revision = "0003"
down_revision = "0002"


def upgrade() -> None:
    # hash: the first of the message's rows in inbound_seen. sealed: the message, encrypted for its hash. retry_at: set
    # if the message could not be drained; later messages then pass it. Rows live for milliseconds, so the table is
    # vacuumed after a fixed number of them.
    op.execute("""
        CREATE TABLE accepted (
            position bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
            tenant_id text NOT NULL,
            channel_id uuid NOT NULL,
            hash bytea NOT NULL,
            sealed bytea NOT NULL,
            traceparent text,
            attempts int NOT NULL DEFAULT 0,
            retry_at timestamptz,
            accepted_at timestamptz NOT NULL DEFAULT clock_timestamp()
        ) WITH (autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_threshold = 10000)
    """)
    for statement in tenant_policy("channel", "accepted"):
        op.execute(statement)
