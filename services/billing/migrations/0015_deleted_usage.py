"""The sums of deleted usage records."""

from alembic import op

from infra.postgres.schema import tenant_policy

revision = "0015"
down_revision = "0014"


def upgrade() -> None:
    op.execute("CREATE TABLE deleted_usage (LIKE usage_bucket INCLUDING ALL)")
    for statement in tenant_policy("billing", "deleted_usage"):
        op.execute(statement)
    # A correction is a booking: it stays when the record that it corrects is deleted.
    op.execute("ALTER TABLE usage_correction DROP CONSTRAINT usage_correction_tenant_id_usage_id_fkey")
