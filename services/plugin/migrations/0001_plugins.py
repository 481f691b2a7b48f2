"""Registered plugins and their tools, disabled built-in plugins, and the ledger of calls."""

from alembic import op

from infra.postgres.schema import tenant_policy

revision = "0001"
down_revision = None


def upgrade() -> None:
    op.execute(
        """
        CREATE TABLE plugin (
            id uuid PRIMARY KEY,
            tenant_id text NOT NULL,
            name text NOT NULL,
            kind text NOT NULL CHECK (kind IN ('http', 'mcp')),
            url text NOT NULL,
            access bytea NOT NULL,         -- secret and headers, sealed
            header_names text[] NOT NULL,
            config text NOT NULL,          -- JSON, as are the schemas below
            config_schema text NOT NULL,
            enabled boolean NOT NULL DEFAULT true,
            created_at timestamptz NOT NULL DEFAULT clock_timestamp(),
            UNIQUE (tenant_id, name)
        )
        """
    )
    op.execute(
        """
        CREATE TABLE tool (
            tenant_id text NOT NULL,
            name text NOT NULL,
            plugin_id uuid NOT NULL REFERENCES plugin ON DELETE CASCADE,
            remote_name text NOT NULL,     -- the tool's name on its server
            description text NOT NULL,
            schema text NOT NULL,
            effect text NOT NULL CHECK (effect IN ('repeatable', 'keyed', 'once')),
            PRIMARY KEY (tenant_id, name)
        )
        """
    )
    op.execute("CREATE INDEX tool_plugin ON tool (plugin_id)")
    # A built-in plugin is enabled unless it has a row here.
    op.execute("CREATE TABLE builtin_off (tenant_id text NOT NULL, name text NOT NULL, PRIMARY KEY (tenant_id, name))")
    op.execute(
        """
        CREATE TABLE tool_call (
            tenant_id text NOT NULL,
            key text NOT NULL,
            request_hash bytea NOT NULL,   -- hash of tool and arguments
            tool text NOT NULL,
            state text NOT NULL CHECK (state IN ('started', 'succeeded', 'failed', 'unknown')),
            attempt int NOT NULL,          -- from 1; a new attempt fences the one before it
            leased_until timestamptz NOT NULL,
            outcome bytea,                 -- result and error, sealed
            created_at timestamptz NOT NULL DEFAULT clock_timestamp(),
            ended_at timestamptz,
            PRIMARY KEY (tenant_id, key)
        )
        """
    )
    op.execute("CREATE INDEX tool_call_age ON tool_call (tenant_id, created_at)")
    for table in ("plugin", "tool", "builtin_off", "tool_call"):
        for statement in tenant_policy("plugin", table):
            op.execute(statement)
