"""Table session_alias: sessions whose conversation got another id at its vendor."""

from alembic import op

from infra.postgres.schema import tenant_policy

revision = "0004"
down_revision = "0003"


def upgrade() -> None:
    # session_key: of the new id. target: the session that goes on.
    op.execute("""
        CREATE TABLE session_alias (
            session_key text PRIMARY KEY,
            tenant_id text NOT NULL,
            target text NOT NULL,
            created_at timestamptz NOT NULL DEFAULT clock_timestamp()
        )
    """)
    for statement in tenant_policy("channel", "session_alias"):
        op.execute(statement)
