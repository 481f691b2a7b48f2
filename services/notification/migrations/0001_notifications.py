"""Table of notifications: the recipients, the sealed content, and the result."""

from alembic import op

from infra.postgres.schema import tenant_policy

revision = "0001"
down_revision = None


def upgrade() -> None:
    op.execute("""
        CREATE TABLE notification (
            tenant_id text NOT NULL,
            id uuid NOT NULL,               -- of the message that requested it
            kind text NOT NULL CHECK (kind IN ('email', 'push')),
            state text NOT NULL CHECK (state IN ('queued', 'sent', 'failed')),
            reason text NOT NULL DEFAULT '',
            recipients text[] NOT NULL DEFAULT '{}',    -- masked
            content bytea,                  -- sealed; null after the notification has ended
            created_at timestamptz NOT NULL DEFAULT clock_timestamp(),
            finished_at timestamptz,
            PRIMARY KEY (tenant_id, id),
            CHECK ((state = 'queued') = (content IS NOT NULL)),
            CHECK ((state = 'queued') = (finished_at IS NULL))
        )
    """)
    op.execute("CREATE INDEX notification_newest ON notification (tenant_id, created_at DESC, id DESC)")
    for statement in tenant_policy("notification", "notification"):
        op.execute(statement)
