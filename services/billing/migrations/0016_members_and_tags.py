"""Usage has a member and a tag, and its sums know the largest and the latest record and the number of sessions."""

from alembic import op

from infra.postgres.schema import tenant_policy

revision = "0016"
down_revision = "0015"

_KEY = "tenant_id, period, hour, meter, resource, agent_id, channel_id, price_version, late, member_id, tag"


def upgrade() -> None:
    op.execute("""
        ALTER TABLE usage
        ADD COLUMN member_id text NOT NULL DEFAULT '',
        ADD COLUMN tag text NOT NULL DEFAULT ''
    """)
    # The members and tags that a tenant has used in a month; their number is bounded.
    op.execute("""
        CREATE TABLE usage_label (
            tenant_id text NOT NULL,
            month date NOT NULL,
            kind text NOT NULL CHECK (kind IN ('member', 'tag')),
            value text NOT NULL,
            PRIMARY KEY (tenant_id, month, kind, value)
        )
    """)
    for statement in tenant_policy("billing", "usage_label"):
        op.execute(statement)
    # The 128 smallest of two sets of hashes, in ascending order.
    op.execute("""
        CREATE FUNCTION smallest(a bigint[], b bigint[]) RETURNS bigint[] LANGUAGE sql IMMUTABLE PARALLEL SAFE
        RETURN ARRAY(SELECT DISTINCT h FROM unnest(a || b) AS n(h) ORDER BY h LIMIT 128)
    """)
    op.execute("""
        CREATE AGGREGATE smallest_of(bigint[]) (sfunc = smallest, stype = bigint[], initcond = '{}', parallel = safe)
    """)
    for table in ("usage_bucket", "deleted_usage"):
        op.execute(f"""
            ALTER TABLE {table}
            ADD COLUMN member_id text NOT NULL DEFAULT '',
            ADD COLUMN tag text NOT NULL DEFAULT '',
            ADD COLUMN largest numeric,                         -- null: its records were deleted before this was kept
            ADD COLUMN latest numeric[],                        -- time of use (epoch), arrival and quantity
            ADD COLUMN sessions bigint[] NOT NULL DEFAULT '{{}}',   -- the smallest hashes of the sessions
            DROP CONSTRAINT {table}_pkey,
            ADD PRIMARY KEY ({_KEY})
        """)
    # The same columns as before, and four more.
    op.execute("""
        CREATE OR REPLACE VIEW measure WITH (security_invoker = true) AS
        SELECT tenant_id, usage_id, arrival, period, late, occurred_at, run_id,
               date_trunc('hour', occurred_at, 'UTC') AS hour, agent_id, channel_id, resource,
               coalesce(price_version, '') AS price_version, m.meter, m.quantity, d.digest,
               member_id, tag, ARRAY[extract(epoch FROM occurred_at), arrival, m.quantity] AS latest, d.session
        FROM usage, LATERAL (
            SELECT ('x' || encode(substr(sha256(convert_to(
                       concat_ws('|', usage_id, resource, extract(epoch FROM occurred_at), quantities, amount_nanos),
                       'UTF8'
                   )), 1, 8), 'hex'))::bit(64)::bigint AS digest,
                   CASE WHEN session_key <> '' THEN
                       ('x' || encode(substr(sha256(convert_to(session_key, 'UTF8')), 1, 8), 'hex'))::bit(64)::bigint
                       & 9223372036854775807
                   END AS session
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
    # A record that is delivered again after its deletion is held under the same id; its old corrections are summed.
    op.execute("ALTER TABLE usage_correction ADD COLUMN summed boolean NOT NULL DEFAULT false")
    op.execute("GRANT UPDATE (summed) ON usage_correction TO billing_worker")
    op.execute("""
        UPDATE usage_correction AS c
        SET summed = true
        WHERE NOT EXISTS (SELECT FROM usage AS u WHERE u.tenant_id = c.tenant_id AND u.usage_id = c.usage_id)
    """)
    op.execute("""
        CREATE OR REPLACE VIEW correction_measure WITH (security_invoker = true) AS
        SELECT c.tenant_id, c.usage_id, u.arrival, c.period, true AS late, u.occurred_at, u.run_id,
               date_trunc('hour', u.occurred_at, 'UTC') AS hour, u.agent_id, u.channel_id, u.resource,
               c.price_version, 'correction_nanos' AS meter, c.nanos::numeric AS quantity,
               ('x' || encode(substr(sha256(convert_to(
                   concat_ws('|', c.usage_id, c.price_version, c.nanos), 'UTF8'
               )), 1, 8), 'hex'))::bit(64)::bigint AS digest,
               u.member_id, u.tag, ARRAY[extract(epoch FROM u.occurred_at), u.arrival, c.nanos] AS latest,
               NULL::bigint AS session
        FROM usage_correction AS c
        JOIN usage AS u USING (tenant_id, usage_id)
        WHERE NOT c.summed
    """)
    op.execute("DELETE FROM usage_bucket")
    op.execute(f"""
        INSERT INTO usage_bucket ({_KEY}, records, quantity, first_arrival, last_arrival, hash, largest, latest,
                                  sessions)
        SELECT {_KEY}, sum(records), sum(quantity), min(first_arrival), max(last_arrival), bit_xor(hash), max(largest),
               max(latest), smallest_of(sessions)
        FROM (
            SELECT {_KEY}, count(*) AS records, sum(quantity) AS quantity, min(arrival) AS first_arrival,
                   max(arrival) AS last_arrival, bit_xor(digest) AS hash, max(quantity) AS largest,
                   max(latest) AS latest,
                   coalesce((array_agg(DISTINCT session) FILTER (WHERE session IS NOT NULL))[1:128], '{{}}') AS sessions
            FROM (TABLE measure UNION ALL TABLE correction_measure) AS m
            GROUP BY {_KEY}
            UNION ALL
            SELECT {_KEY}, records, quantity, first_arrival, last_arrival, hash, largest, latest, sessions
            FROM deleted_usage
        ) AS s
        GROUP BY {_KEY}
    """)
