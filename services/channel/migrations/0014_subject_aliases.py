"""Table subject_alias: persons who got another id at their vendor."""

from alembic import op

from infra.postgres.schema import tenant_policy

revision = "0014"
down_revision = "0013"


def upgrade() -> None:
    # subject_id: of the new id. target: the subject that the person stays.
    op.execute("""
        CREATE TABLE subject_alias (
            subject_id text PRIMARY KEY,
            tenant_id text NOT NULL,
            target text NOT NULL,
            created_at timestamptz NOT NULL DEFAULT clock_timestamp()
        )
    """)
    for statement in tenant_policy("channel", "subject_alias"):
        op.execute(statement)
