"""Table attachment: files in the object store, so that they can be deleted when their person is erased."""

from alembic import op

from infra.postgres.schema import tenant_policy

revision = "0006"
down_revision = "0005"


def upgrade() -> None:
    # A row is written before its file.
    op.execute("""
        CREATE TABLE attachment (
            path text PRIMARY KEY,
            tenant_id text NOT NULL,
            subject_id text NOT NULL,
            created_at timestamptz NOT NULL DEFAULT clock_timestamp()
        )
    """)
    op.execute("CREATE INDEX attachment_subject ON attachment (tenant_id, subject_id)")
    for statement in tenant_policy("channel", "attachment"):
        op.execute(statement)
