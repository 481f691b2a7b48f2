"""The records of a chain since a time are found without reading the whole chain."""

from alembic import op

revision = "0004"
down_revision = "0003"


def upgrade() -> None:
    op.execute("CREATE INDEX audit_record_at ON audit_record (tenant_id, at)")
