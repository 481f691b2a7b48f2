"""Which model a run began with: how many of them go on at once can be limited."""

from alembic import op

revision = "0004"
down_revision = "0003"


def upgrade() -> None:
    op.execute("ALTER TABLE run ADD COLUMN model text")  # its name, and where it is asked
    op.execute("CREATE INDEX run_under_way ON run (tenant_id, agent_id) INCLUDE (model) WHERE status = 'running'")
