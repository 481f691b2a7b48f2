"""The groups of usage, and its sums by hour."""

from alembic import op

from infra.postgres.schema import tenant_policy

revision = "0002"
down_revision = "0001"


def upgrade() -> None:
    op.execute("""
        ALTER TABLE usage
        ADD COLUMN agent_id text NOT NULL DEFAULT '',
        ADD COLUMN channel_id text NOT NULL DEFAULT '',
        ADD COLUMN session_key text NOT NULL DEFAULT '',
        ADD COLUMN api_key_id text NOT NULL DEFAULT '',
        ADD COLUMN period bigint NOT NULL DEFAULT 0,    -- the period whose invoice it is in; 0: none
        ADD COLUMN late boolean NOT NULL DEFAULT false  -- it belonged to a period that was closed already
    """)
    # Corrections of a usage record's charge are part of its period's cost too.
    op.execute("ALTER TABLE ledger_entry ADD COLUMN period bigint NOT NULL DEFAULT 0")
    # One row for each meter of each counted record, and one for its cost. The digest covers the record's content.
    op.execute("""
        CREATE VIEW measure WITH (security_invoker = true) AS
        SELECT tenant_id, usage_id, arrival, period, late, occurred_at, run_id,
               date_trunc('hour', occurred_at, 'UTC') AS hour, agent_id, channel_id, resource,
               coalesce(price_version, '') AS price_version, m.meter, m.quantity,
               ('x' || encode(substr(sha256(convert_to(
                   concat_ws('|', usage_id, resource, extract(epoch FROM occurred_at), quantities, amount_nanos), 'UTF8'
               )), 1, 8), 'hex'))::bit(64)::bigint AS digest
        FROM usage, LATERAL (
            SELECT CASE
                       WHEN key = 'input_tokens' AND resource LIKE 'embedding/%' THEN 'embedding_tokens'
                       WHEN key = 'calls' AND resource LIKE 'tool/%' THEN 'tool_calls'
                       ELSE key
                   END,
                   value::numeric
            FROM jsonb_each_text(quantities)
            UNION ALL
            SELECT 'cost_nanos', amount_nanos::numeric
        ) AS m(meter, quantity)
        WHERE verdict = 'counted'
    """)
    op.execute("""
        CREATE TABLE usage_bucket (
            tenant_id text NOT NULL,
            period bigint NOT NULL,
            hour timestamptz NOT NULL,
            meter text NOT NULL,
            resource text NOT NULL,
            agent_id text NOT NULL,
            channel_id text NOT NULL,
            price_version text NOT NULL,
            late boolean NOT NULL,
            records bigint NOT NULL,
            quantity numeric NOT NULL,
            first_arrival bigint NOT NULL,
            last_arrival bigint NOT NULL,
            hash bigint NOT NULL,       -- the digests of its records, combined by exclusive or
            PRIMARY KEY (tenant_id, period, hour, meter, resource, agent_id, channel_id, price_version, late)
        )
    """)
    op.execute("CREATE INDEX usage_bucket_hour ON usage_bucket (tenant_id, hour)")
    for statement in tenant_policy("billing", "usage_bucket"):
        op.execute(statement)
    op.execute("""
        INSERT INTO price (resource, version, currency, valid_from, prices, made_by)
        VALUES ('channel/*', 1, 'USD', '1970-01-01Z', '{"nanos":{"messages":"0"},"tiers":[]}', 'genai-prices')
        ON CONFLICT DO NOTHING
    """)
    op.execute("""
        INSERT INTO usage_bucket
        SELECT tenant_id, period, hour, meter, resource, agent_id, channel_id, price_version, late, count(*),
               sum(quantity), min(arrival), max(arrival), bit_xor(digest)
        FROM measure
        GROUP BY 1, 2, 3, 4, 5, 6, 7, 8, 9
    """)
