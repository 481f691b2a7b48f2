"""The key that authenticates the lines which auditors keep."""

from alembic import op

revision = "0002"
down_revision = "0001"


def upgrade() -> None:
    # One row. key: sealed under the master key.
    op.execute("""
        CREATE TABLE audit_line_key (
            is_only boolean PRIMARY KEY DEFAULT true CHECK (is_only),
            key bytea NOT NULL
        )
    """)
    op.execute("REVOKE ALL ON audit_line_key FROM log_aggregator_request")
    op.execute("REVOKE DELETE, TRUNCATE ON audit_line_key FROM log_aggregator_worker")
