"""Buckets of usage cost less: a record's digest is computed once, and a changed bucket stays on its page."""

from alembic import op

revision = "0009"
down_revision = "0008"


def upgrade() -> None:
    # The same columns as before. OFFSET keeps the digest from being computed for each meter of a record.
    op.execute("""
        CREATE OR REPLACE VIEW measure WITH (security_invoker = true) AS
        SELECT tenant_id, usage_id, arrival, period, late, occurred_at, run_id,
               date_trunc('hour', occurred_at, 'UTC') AS hour, agent_id, channel_id, resource,
               coalesce(price_version, '') AS price_version, m.meter, m.quantity, d.digest
        FROM usage, LATERAL (
            SELECT ('x' || encode(substr(sha256(convert_to(
                       concat_ws('|', usage_id, resource, extract(epoch FROM occurred_at), quantities, amount_nanos),
                       'UTF8'
                   )), 1, 8), 'hex'))::bit(64)::bigint AS digest
            OFFSET 0
        ) AS d, LATERAL (
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
    # A bucket changes with every batch of its hour. With space on its page the indexes need no new entry for that.
    op.execute("ALTER TABLE usage_bucket SET (fillfactor = 50)")
