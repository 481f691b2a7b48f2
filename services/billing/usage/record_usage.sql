-- Stores a batch of rated usage records, debits the counted ones and closes the holds that they name. A held record
-- keeps its hold open until it is resolved, so that its cost stays reserved. Returns the records' numbers of arrival, in
-- their order, and the accounts that were debited.
--
-- Each parameter is a column: its values joined by U+001F, in the order of the records. An empty value is null. (An array
-- parameter would be faster here, but the driver examines each of its elements in Python.)
--
-- Locks: the accounts in the order of tenant_id, then their holds, then the new keys of usage in their order. Every
-- transaction keeps this order, so two batches that share tenants or usage_ids do not deadlock. The holds are changed
-- after all accounts are counted, and so locked. (A join with the locked accounts would compare each record with each.)
WITH record AS MATERIALIZED (
    SELECT *, nextval('arrival') AS arrival
    FROM unnest(
        string_to_array($1, E'\x1f'),
        string_to_array($2, E'\x1f'),
        string_to_array($3, E'\x1f')::uuid[],
        string_to_array($4, E'\x1f'),
        string_to_array($5, E'\x1f'),
        string_to_array($6, E'\x1f')::timestamptz[],
        string_to_array($7, E'\x1f')::boolean[],
        string_to_array($8, E'\x1f', '')::uuid[],
        string_to_array($9, E'\x1f', '')::uuid[],
        string_to_array($10, E'\x1f'),
        string_to_array($11, E'\x1f'),
        string_to_array($12, E'\x1f', '')::bigint[],
        string_to_array($13, E'\x1f', ''),
        string_to_array($14, E'\x1f'),
        string_to_array($15, E'\x1f'),
        string_to_array($16, E'\x1f'),
        string_to_array($17, E'\x1f'),
        string_to_array($18, E'\x1f'),
        string_to_array($19, E'\x1f')::bigint[],
        string_to_array($20, E'\x1f')::boolean[],
        string_to_array($21, E'\x1f'),
        string_to_array($22, E'\x1f')
    ) AS r(tenant_id, usage_id, message_id, resource, quantities, occurred_at, estimated, run_id, hold_id, verdict,
           reason, amount_nanos, price_version, span_id, agent_id, channel_id, session_key, api_key_id,
           period, late, member_id, tag)
),
due AS (
    SELECT tenant_id, coalesce(sum(amount_nanos), 0)::bigint AS nanos,
           coalesce(sum(amount_nanos) FILTER (WHERE period <> 0), 0)::bigint AS invoiced
    FROM record
    WHERE verdict = 'counted' OR verdict = 'held' AND hold_id IS NOT NULL
    GROUP BY tenant_id
),
locked AS MATERIALIZED (
    SELECT account.tenant_id, due.nanos, due.invoiced
    FROM account JOIN due USING (tenant_id)
    ORDER BY account.tenant_id
    FOR UPDATE OF account
),
debited AS (
    UPDATE account AS a
    SET debited_nanos = a.debited_nanos + locked.nanos, invoiced_nanos = a.invoiced_nanos + locked.invoiced
    FROM locked
    WHERE a.tenant_id = locked.tenant_id AND locked.nanos <> 0
    RETURNING a.tenant_id, a.currency, a.credit_nanos, a.debited_nanos, locked.nanos
),
closed AS (
    UPDATE hold AS h
    SET ended_at = clock_timestamp(), outcome = 'charged'
    FROM record AS r
    WHERE r.verdict = 'counted' AND h.tenant_id = r.tenant_id AND h.hold_id = r.hold_id AND h.ended_at IS NULL
        AND (SELECT count(*) FROM locked) > 0
),
kept AS (
    UPDATE hold AS h
    SET expires_at = 'infinity'
    FROM record AS r
    WHERE r.verdict = 'held' AND h.tenant_id = r.tenant_id AND h.hold_id = r.hold_id AND h.ended_at IS NULL
        AND (SELECT count(*) FROM locked) > 0
),
booked AS (
    INSERT INTO ledger_entry (tenant_id, kind, amount_nanos, usage_id, price_version, reason, actor)
    SELECT tenant_id, 'charge', -amount_nanos, usage_id, price_version, '', 'billing'
    FROM record
    WHERE verdict = 'counted'
    ORDER BY arrival
),
stored AS (
    INSERT INTO usage (tenant_id, usage_id, message_id, resource, quantities, occurred_at, estimated, run_id, hold_id,
                       verdict, reason, amount_nanos, price_version, span_id, agent_id, channel_id, session_key,
                       api_key_id, period, late, member_id, tag, rated_at, arrival)
    SELECT tenant_id, usage_id, message_id, resource, quantities::jsonb, occurred_at, estimated, run_id, hold_id,
           verdict, coalesce(reason, ''), amount_nanos, price_version, coalesce(span_id, ''), coalesce(agent_id, ''),
           coalesce(channel_id, ''), coalesce(session_key, ''), coalesce(api_key_id, ''), period,
           late, coalesce(member_id, ''), coalesce(tag, ''), $23, arrival
    FROM record
    WHERE verdict <> 'duplicate'
    ORDER BY tenant_id, usage_id
),
repeated AS (
    INSERT INTO duplicate (tenant_id, usage_id, message_id, resource, quantities, occurred_at, run_id, reason, rated_at,
                           arrival)
    SELECT tenant_id, usage_id, message_id, resource, quantities::jsonb, occurred_at, run_id, coalesce(reason, ''), $23,
           arrival
    FROM record
    WHERE verdict = 'duplicate'
)
SELECT ARRAY(SELECT arrival FROM record ORDER BY arrival),
       ARRAY(SELECT ROW(tenant_id, currency, credit_nanos, debited_nanos, nanos) FROM debited ORDER BY tenant_id)
