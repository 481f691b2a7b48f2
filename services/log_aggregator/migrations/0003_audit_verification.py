"""The time of the last verification of each audit chain, and its result."""

from alembic import op

from infra.postgres.schema import tenant_policy

revision = "0003"
down_revision = "0002"


def upgrade() -> None:
    # A chain stays here when its head is gone, so that a chain that was deleted as a whole is still compared with its
    # stored heads. due_at: of the next verification; a process that verifies the chain moves it ahead.
    op.execute("""
        CREATE TABLE audit_verification (
            tenant_id text PRIMARY KEY,
            seen_at timestamptz NOT NULL DEFAULT clock_timestamp(),
            due_at timestamptz NOT NULL DEFAULT clock_timestamp(),
            verified_at timestamptz,
            broken_at bigint
        )
    """)
    op.execute("CREATE INDEX audit_verification_due ON audit_verification (due_at)")
    for statement in tenant_policy("log_aggregator", "audit_verification"):
        op.execute(statement)
    op.execute("REVOKE INSERT, UPDATE, DELETE ON audit_verification FROM log_aggregator_request")
