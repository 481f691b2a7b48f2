"""Tables of tenants' webhook endpoints and of the events for them."""

from alembic import op

from infra.postgres.schema import tenant_policy

revision = "0002"
down_revision = "0001"


def upgrade() -> None:
    op.execute("""
        CREATE TABLE webhook_endpoint (
            id uuid PRIMARY KEY,
            tenant_id text NOT NULL,
            url text NOT NULL,
            events text[] NOT NULL,
            secret bytea NOT NULL,          -- sealed
            old_secret bytea,               -- sealed; it signs too until old_until
            old_until timestamptz,
            disabled_reason text,           -- null: enabled
            failing_since timestamptz,      -- null: its last answer was good
            created_at timestamptz NOT NULL DEFAULT clock_timestamp(),
            updated_at timestamptz NOT NULL DEFAULT clock_timestamp()
        )
    """)
    op.execute("CREATE INDEX webhook_endpoint_tenant ON webhook_endpoint (tenant_id, id)")
    op.execute("""
        CREATE TABLE webhook_delivery (
            id uuid PRIMARY KEY,            -- derived from the endpoint and the event's message
            endpoint_id uuid NOT NULL REFERENCES webhook_endpoint ON DELETE CASCADE,
            tenant_id text NOT NULL,
            message_id uuid NOT NULL,
            type text NOT NULL,
            body bytea NOT NULL,            -- JSON without personal content
            state text NOT NULL DEFAULT 'waiting' CHECK (state IN ('waiting', 'delivered', 'failed')),
            attempts int NOT NULL DEFAULT 0,
            status int,
            error text,
            created_at timestamptz NOT NULL DEFAULT clock_timestamp(),
            updated_at timestamptz NOT NULL DEFAULT clock_timestamp()
        )
    """)
    op.execute("CREATE INDEX webhook_delivery_newest ON webhook_delivery (endpoint_id, created_at DESC, id DESC)")
    op.execute("CREATE INDEX webhook_delivery_old ON webhook_delivery (tenant_id, created_at)")
    for table in ("webhook_endpoint", "webhook_delivery"):
        for statement in tenant_policy("notification", table):
            op.execute(statement)
