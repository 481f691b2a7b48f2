"""The audit chains."""

from alembic import op

from infra.postgres.schema import tenant_policy

revision = "0001"
down_revision = None


def upgrade() -> None:
    # tenant_id: the tenant of the chain, empty for the system's chain. record: canonical JSON, covered by the hash. The
    # other columns are for the search. A verification compares them with the record.
    op.execute("""
        CREATE TABLE audit_record (
            tenant_id text NOT NULL,
            seq bigint NOT NULL,
            at timestamptz NOT NULL,
            actor text NOT NULL,
            action text NOT NULL,
            object_id text NOT NULL,
            record text NOT NULL,
            hash bytea NOT NULL,
            PRIMARY KEY (tenant_id, seq)
        )
    """)
    for column in ("actor", "action", "object_id"):
        op.execute(f"CREATE INDEX audit_record_{column} ON audit_record (tenant_id, {column}, seq)")
    op.execute("""
        CREATE TABLE audit_head (
            tenant_id text PRIMARY KEY,
            seq bigint NOT NULL,
            hash bytea NOT NULL
        )
    """)
    for table in ("audit_record", "audit_head"):
        for statement in tenant_policy("log_aggregator", table):
            op.execute(statement)
    op.execute("REVOKE UPDATE, DELETE, TRUNCATE ON audit_record FROM log_aggregator_request, log_aggregator_worker")
    op.execute("REVOKE INSERT ON audit_record FROM log_aggregator_request")
    op.execute("REVOKE INSERT, UPDATE, DELETE ON audit_head FROM log_aggregator_request")
