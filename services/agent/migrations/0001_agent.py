"""Agents and their versions, sessions, messages, runs with their steps and usage, deliveries."""

from alembic import op

from infra.postgres.schema import tenant_policy

revision = "0001"
down_revision = None


def upgrade() -> None:
    op.execute("""
        CREATE TABLE agent (
            id uuid PRIMARY KEY,
            tenant_id text NOT NULL,
            version int NOT NULL,
            enabled boolean NOT NULL DEFAULT true,
            created_at timestamptz NOT NULL DEFAULT clock_timestamp()
        )
    """)
    op.execute("CREATE INDEX agent_of ON agent (tenant_id, id)")
    op.execute("""
        CREATE TABLE agent_version (
            agent_id uuid NOT NULL REFERENCES agent,
            version int NOT NULL,
            tenant_id text NOT NULL,
            definition text NOT NULL,   -- JSON, without the key
            api_key bytea,              -- sealed
            created_at timestamptz NOT NULL DEFAULT clock_timestamp(),
            created_by text NOT NULL,
            PRIMARY KEY (agent_id, version)
        )
    """)
    op.execute("""
        CREATE TABLE session (
            tenant_id text NOT NULL,
            session_key text NOT NULL,
            messages bigint NOT NULL DEFAULT 0,     -- all of the session
            run_id uuid,                            -- the last one that was opened
            run_messages int NOT NULL DEFAULT 0,    -- those that it answers
            run_waits boolean NOT NULL DEFAULT false,
            created_at timestamptz NOT NULL DEFAULT clock_timestamp(),
            PRIMARY KEY (tenant_id, session_key)
        )
    """)
    op.execute("""
        CREATE TABLE run (
            id uuid PRIMARY KEY,
            tenant_id text NOT NULL,
            session_key text NOT NULL,
            agent_id uuid NOT NULL,     -- as the message had it: there may be no such agent
            subject_id text NOT NULL,   -- under whose key the run's content is sealed
            status text NOT NULL DEFAULT 'queued',
            cancel_requested boolean NOT NULL DEFAULT false,
            channel_id uuid,            -- null: it came by the API
            reply bytea,                -- sealed
            error text,
            trace_id text,
            input_tokens bigint,        -- null: not reported
            cached_tokens bigint,
            output_tokens bigint,
            budget_nanos bigint NOT NULL DEFAULT 0,     -- held of its agent's budget, later its true cost
            budget_step int NOT NULL DEFAULT 0,         -- the last step for which it holds some
            budget_settled boolean NOT NULL DEFAULT false,
            created_at timestamptz NOT NULL DEFAULT clock_timestamp(),
            started_at timestamptz,
            finished_at timestamptz
        )
    """)
    op.execute("CREATE INDEX run_of_session ON run (tenant_id, session_key, id)")
    op.execute("""
        CREATE INDEX run_open ON run (tenant_id, session_key) WHERE status IN ('queued', 'running', 'waiting')
    """)
    op.execute("CREATE INDEX run_of_tenant ON run (tenant_id, created_at, id)")
    op.execute("CREATE INDEX run_of_agent ON run (tenant_id, agent_id, created_at)")
    op.execute("""
        CREATE TABLE message (
            tenant_id text NOT NULL,
            message_id uuid NOT NULL,
            session_key text NOT NULL,
            seq bigint NOT NULL,        -- within the session
            run_id uuid NOT NULL REFERENCES run,
            subject_id text NOT NULL,
            text bytea NOT NULL,        -- sealed
            conversation bytea,         -- sealed: the vendor's id of the conversation
            vendor_message_id text,
            idempotency_key text,
            received_at timestamptz NOT NULL,
            PRIMARY KEY (tenant_id, message_id)
        )
    """)
    op.execute("CREATE UNIQUE INDEX message_seq ON message (tenant_id, session_key, seq)")
    op.execute("CREATE INDEX message_of_run ON message (run_id, seq)")
    op.execute("""
        CREATE UNIQUE INDEX message_once ON message (tenant_id, session_key, idempotency_key)
            WHERE idempotency_key IS NOT NULL
    """)
    op.execute("""
        CREATE TABLE run_step (
            tenant_id text NOT NULL,
            run_id uuid NOT NULL REFERENCES run,
            n int NOT NULL,
            kind text NOT NULL,
            name text NOT NULL,
            status text NOT NULL,
            attempts int NOT NULL,
            started_at timestamptz NOT NULL,    -- the last attempt
            duration_ms int,
            error text,
            span_id text,
            PRIMARY KEY (run_id, n)
        )
    """)
    op.execute("""
        CREATE TABLE run_usage (
            tenant_id text NOT NULL,
            run_id uuid NOT NULL REFERENCES run,
            usage_id text NOT NULL,
            resource text NOT NULL,
            quantities text NOT NULL,   -- JSON: unit → count
            estimated boolean NOT NULL,
            occurred_at timestamptz NOT NULL,
            PRIMARY KEY (run_id, usage_id)
        )
    """)
    op.execute("""
        CREATE TABLE delivery (
            tenant_id text NOT NULL,
            delivery_id uuid NOT NULL,
            run_id uuid NOT NULL REFERENCES run,
            state text NOT NULL,
            reason text,
            asked_at timestamptz NOT NULL,
            ended_at timestamptz,
            PRIMARY KEY (tenant_id, delivery_id)
        )
    """)
    op.execute("CREATE INDEX delivery_of_run ON delivery (run_id)")
    for table in ("agent", "agent_version", "session", "run", "message", "run_step", "run_usage", "delivery"):
        for statement in tenant_policy("agent", table):
            op.execute(statement)
