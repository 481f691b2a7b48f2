"""The model that a run started with, so that the number of its running runs can be limited."""

from alembic import op

revision = "0004"
down_revision = "0003"


def upgrade() -> None:
    op.execute("ALTER TABLE run ADD COLUMN model text")  # its name and its provider's address
    op.execute("CREATE INDEX run_under_way ON run (tenant_id, agent_id) INCLUDE (model) WHERE status = 'running'")
