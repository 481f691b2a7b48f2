"""A subscription that is cancelled before it begins leaves an empty period, which is closed without an invoice."""

from alembic import op

revision = "0012"
down_revision = "0011"


def upgrade() -> None:
    op.execute("ALTER TABLE period DROP CONSTRAINT period_check")
    op.execute("ALTER TABLE period ADD CONSTRAINT period_order CHECK (begins <= ends)")
    op.execute("ALTER TABLE period DROP CONSTRAINT period_tenant_id_begins_key")
    # Another subscription may begin at the same time.
    op.execute("CREATE UNIQUE INDEX period_begins ON period (tenant_id, begins) WHERE begins < ends")
