"""Budgets, and the agent, channel, session and key of a hold."""

from alembic import op

from infra.postgres.schema import tenant_policy

revision = "0004"
down_revision = "0003"


def upgrade() -> None:
    op.execute("""
        ALTER TABLE hold
        ADD COLUMN agent_id text NOT NULL DEFAULT '',
        ADD COLUMN channel_id text NOT NULL DEFAULT '',
        ADD COLUMN session_key text NOT NULL DEFAULT '',
        ADD COLUMN api_key_id text NOT NULL DEFAULT '',
        ADD COLUMN refused_by text NOT NULL DEFAULT ''
    """)
    op.execute("""
        CREATE TABLE budget (
            tenant_id text NOT NULL,
            budget_id uuid NOT NULL,
            scope text NOT NULL CHECK (scope IN ('tenant', 'agent', 'channel', 'session', 'key')),
            scope_id text NOT NULL,         -- empty for the tenant
            period text NOT NULL CHECK (period IN ('day', 'month', 'total')),
            nanos bigint NOT NULL CHECK (nanos >= 0),
            soft_percent int[] NOT NULL,
            window_starts timestamptz NOT NULL,
            spent_nanos bigint NOT NULL DEFAULT 0,  -- in the window
            made_at timestamptz NOT NULL DEFAULT clock_timestamp(),
            PRIMARY KEY (tenant_id, budget_id),
            UNIQUE (tenant_id, scope, scope_id, period)
        )
    """)
    for statement in tenant_policy("billing", "budget"):
        op.execute(statement)
