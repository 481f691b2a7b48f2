-- Writes the records of many runs at the same moment: one call, one transaction, one round trip.
--
-- The arguments are columns. Those of the first group have one entry per write. The others have one entry per row, and
-- their first column (…_w) is the number of the write that the row belongs to, from 1. A run may have several writes in
-- one call; they are written in their order.
--
-- Locks, always in this order: the runs by id, the lanes by id, the streams by name, the sequences by session. All other
-- transactions lock a run before its stream and its lane. A message joins a run only under the lock of the run's row,
-- so the counts of messages below are exact until the commit.
--
-- Returns one row per write, in order. refused: null if it was written; 'lost': another process holds the lane;
-- 'stopped': the run is to be cancelled or is over, and the write would begin a step or end the run with a reply;
-- 'messages': the run has other messages than the write expects. messages: how many the run has. The other columns:
-- the next item of the lane, if the write has ended one and the next one is due.
--
-- Raises P0C01 if a stream is not at the version that its first write expects.
CREATE OR REPLACE FUNCTION write_runs(
    -- the writes
    _lane bigint[],
    _epoch bigint[],
    _run uuid[],
    _tenant text[],
    _begins boolean[],              -- refused if the run is to be cancelled
    _expected bigint[],             -- refused if the run has another number of messages; null: any number
    _version bigint[],              -- of the run's stream before the first event of the write
    _repeated boolean,              -- a call with these writes may have committed before
    -- events
    _event_w int[], _event_version bigint[], _event_id uuid[], _event_type text[], _event_schema int[],
    _event_data bytea[], _event_headers text[],
    -- runs that start
    _started_w int[], _started_model text[],
    -- steps that begin
    _begun_w int[], _begun_n int[], _begun_kind text[], _begun_name text[], _begun_attempt int[], _begun_span text[],
    -- steps that end
    _ended_w int[], _ended_n int[], _ended_status text[], _ended_ms int[], _ended_error text[],
    -- usage
    _used_w int[], _used_id text[], _used_resource text[], _used_quantities text[], _used_estimated boolean[],
    _used_at timestamptz[], _used_input bigint[], _used_cached bigint[], _used_output bigint[],
    -- messages for the buses, in the order of their positions
    _out_w int[], _out_bus text[], _out_bucket smallint[], _out_id uuid[], _out_destination text[],
    _out_routing_key text[], _out_key text[], _out_headers text[], _out_body bytea[], _out_keep interval[],
    -- runs that end with a reply, and the lane items that end with them
    _done_w int[], _done_seq bigint[], _done_go_on boolean[], _done_reply bytea[], _done_calls bytea[],
    -- replies to conversations; the body ends before the value of its last field, the position in the session, and the
    -- header ce_sequence has 0 in its place
    _reply_w int[], _reply_session text[], _reply_delivery uuid[], _reply_bucket smallint[], _reply_id uuid[],
    _reply_destination text[], _reply_routing_key text[], _reply_key text[], _reply_headers text[], _reply_body bytea[],
    _reply_keep interval[]
) RETURNS TABLE (
    refused text, messages bigint,
    seq bigint, item_id uuid, body bytea, headers text, attempts int, faults int, recoveries int,
    age interval, expired boolean, due boolean, expires_in interval
) LANGUAGE plpgsql AS $$
#variable_conflict use_column
DECLARE
    _stopped boolean[];
    _held boolean[];
    _known boolean[];
    _messages bigint[];
    _refused text[];
    _ok boolean[];
    _conflicts bigint;
    _going_on int[];
BEGIN
    -- Locks the runs.
    WITH locked AS MATERIALIZED (
        SELECT id, cancel_reason IS NOT NULL OR status NOT IN ('queued', 'running') AS stopped
        FROM run
        WHERE id = ANY(_run)
        ORDER BY id
        FOR UPDATE
    )
    SELECT array_agg(locked.stopped ORDER BY g.w)
    INTO _stopped
    FROM unnest(_run) WITH ORDINALITY AS g(id, w) LEFT JOIN locked USING (id);

    -- Locks the lanes, and finds those whose epoch is still the one of the claim.
    WITH locked AS MATERIALIZED (
        SELECT lane_id, epoch
        FROM lane
        WHERE lane_id = ANY(_lane)
        ORDER BY lane_id
        FOR UPDATE
    )
    SELECT array_agg(locked.epoch IS NOT DISTINCT FROM g.epoch ORDER BY g.w)
    INTO _held
    FROM unnest(_lane, _epoch) WITH ORDINALITY AS g(lane_id, epoch, w) LEFT JOIN locked USING (lane_id);

    -- A call whose answer did not arrive may have committed: its events are there.
    SELECT array_agg(g.known ORDER BY g.w)
    INTO _known
    FROM (
        SELECT w, _repeated AND EXISTS (
            SELECT FROM event JOIN unnest(_event_w, _event_id) AS e(w, id) ON event.event_id = e.id WHERE e.w = g.w
        ) AS known
        FROM generate_subscripts(_run, 1) AS g(w)
    ) g;

    -- Counts the messages of each run, once.
    WITH counted AS MATERIALIZED (
        SELECT run_id, count(*) FILTER (WHERE NOT decides) AS messages
        FROM message
        WHERE run_id = ANY(_run)
        GROUP BY run_id
    )
    SELECT array_agg(coalesce(counted.messages, 0) ORDER BY g.w)
    INTO _messages
    FROM unnest(_run) WITH ORDINALITY AS g(run_id, w) LEFT JOIN counted USING (run_id);

    -- Decides which writes are written.
    SELECT
        array_agg(d.refused ORDER BY d.w),
        array_agg(d.refused IS NULL AND NOT d.known ORDER BY d.w)
    INTO _refused, _ok
    FROM (
        SELECT
            w, known,
            CASE
                WHEN known THEN NULL
                WHEN NOT held THEN 'lost'
                WHEN begins AND stopped THEN 'stopped'
                WHEN expected <> messages THEN 'messages'
            END AS refused
        FROM unnest(_held, _known, _begins, _stopped, _expected, _messages)
            WITH ORDINALITY AS g(held, known, begins, stopped, expected, messages, w)
    ) d;

    -- Locks the streams and moves their versions. Only then positions are drawn, so that they follow the versions.
    WITH added AS MATERIALIZED (
        SELECT 'run:' || _run[e.w] AS stream_id, count(*) AS events, min(_version[e.w]) AS version
        FROM unnest(_event_w) AS e(w)
        WHERE _ok[e.w]
        GROUP BY 1
    ), moved AS (
        INSERT INTO stream AS s (stream_id, version)
        SELECT stream_id, events FROM added ORDER BY stream_id
        ON CONFLICT (stream_id) DO UPDATE SET version = s.version + excluded.version
        RETURNING stream_id, version
    )
    SELECT count(*)
    INTO _conflicts
    FROM moved JOIN added USING (stream_id)
    WHERE moved.version <> added.version + added.events;
    IF _conflicts > 0 THEN
        RAISE EXCEPTION 'a stream of the group is at another version than expected' USING ERRCODE = 'P0C01';
    END IF;
    INSERT INTO event (stream_id, version, event_id, type, schema_version, data, headers)
    SELECT 'run:' || _run[n.w], n.version, n.id, n.type, n.schema, n.data, n.headers
    FROM unnest(_event_w, _event_version, _event_id, _event_type, _event_schema, _event_data, _event_headers)
        AS n(w, version, id, type, schema, data, headers)
    WHERE _ok[n.w];

    -- The tables of runs, steps and usage.
    IF cardinality(_started_w) > 0 THEN
        UPDATE run
        SET status = 'running', started_at = coalesce(started_at, clock_timestamp()), model = n.model
        FROM unnest(_started_w, _started_model) AS n(w, model)
        WHERE _ok[n.w] AND run.id = _run[n.w];
    END IF;
    IF cardinality(_begun_w) > 0 THEN
        INSERT INTO run_step (tenant_id, run_id, n, kind, name, status, attempts, started_at, span_id)
        SELECT _tenant[b.w], _run[b.w], b.n, b.kind, b.name, 'running', b.attempt, clock_timestamp(), b.span
        FROM unnest(_begun_w, _begun_n, _begun_kind, _begun_name, _begun_attempt, _begun_span)
            AS b(w, n, kind, name, attempt, span)
        WHERE _ok[b.w]
        ON CONFLICT (run_id, n) DO UPDATE
        SET attempts = excluded.attempts, started_at = excluded.started_at, span_id = excluded.span_id,
            status = 'running';
    END IF;
    IF cardinality(_ended_w) > 0 THEN
        UPDATE run_step
        SET status = e.status, duration_ms = e.ms, error = e.error
        FROM unnest(_ended_w, _ended_n, _ended_status, _ended_ms, _ended_error) AS e(w, n, status, ms, error)
        WHERE _ok[e.w] AND run_step.run_id = _run[e.w] AND run_step.n = e.n;
    END IF;
    IF cardinality(_used_w) > 0 THEN
        INSERT INTO run_usage (tenant_id, run_id, usage_id, resource, quantities, estimated, occurred_at)
        SELECT _tenant[u.w], _run[u.w], u.id, u.resource, u.quantities, u.estimated, u.at
        FROM unnest(_used_w, _used_id, _used_resource, _used_quantities, _used_estimated, _used_at)
            AS u(w, id, resource, quantities, estimated, at)
        WHERE _ok[u.w];
        -- A figure that was never reported stays null.
        UPDATE run
        SET input_tokens = coalesce(run.input_tokens + coalesce(u.input, 0), u.input),
            cached_tokens = coalesce(run.cached_tokens + coalesce(u.cached, 0), u.cached),
            output_tokens = coalesce(run.output_tokens + coalesce(u.output, 0), u.output)
        FROM (
            SELECT _run[w] AS id, sum(i)::bigint AS input, sum(c)::bigint AS cached, sum(o)::bigint AS output
            FROM unnest(_used_w, _used_input, _used_cached, _used_output) AS n(w, i, c, o)
            WHERE _ok[w]
            GROUP BY 1
        ) u
        -- The record of a run's seconds has no tokens.
        WHERE run.id = u.id AND coalesce(u.input, u.cached, u.output) IS NOT NULL;
    END IF;
    IF cardinality(_done_w) > 0 THEN
        UPDATE run
        SET status = 'completed', reply = n.reply, calls = n.calls, finished_at = clock_timestamp()
        FROM unnest(_done_w, _done_reply, _done_calls) AS n(w, reply, calls)
        WHERE _ok[n.w] AND run.id = _run[n.w];
    END IF;

    -- The outbox.
    INSERT INTO outbox (bus, bucket, message_id, destination, routing_key, key, headers, body, keep_until)
    SELECT bus, bucket, id, destination, routing_key, key, headers, body, clock_timestamp() + keep
    FROM unnest(_out_w, _out_bus, _out_bucket, _out_id, _out_destination, _out_routing_key, _out_key, _out_headers,
                _out_body, _out_keep)
        AS n(w, bus, bucket, id, destination, routing_key, key, headers, body, keep)
    WHERE _ok[n.w];
    IF cardinality(_reply_w) > 0 THEN
        INSERT INTO delivery (tenant_id, delivery_id, run_id, state, asked_at)
        SELECT _tenant[w], delivery, _run[w], 'queued', clock_timestamp()
        FROM unnest(_reply_w, _reply_delivery) AS n(w, delivery)
        WHERE _ok[w]
        ON CONFLICT DO NOTHING;
        WITH drawn AS (
            INSERT INTO sequence AS s (tenant_id, name, key, last)
            SELECT _tenant[w], 'sent', session, 1
            FROM unnest(_reply_w, _reply_session) AS n(w, session)
            WHERE _ok[w]
            ORDER BY 1, 3
            ON CONFLICT (tenant_id, name, key) DO UPDATE SET last = s.last + 1
            RETURNING tenant_id, key, last
        )
        INSERT INTO outbox (bus, bucket, message_id, destination, routing_key, key, headers, body, keep_until)
        SELECT 'rabbit', n.bucket, n.id, n.destination, n.routing_key, n.key,
               replace(n.headers, '"ce_sequence":"0"', '"ce_sequence":"' || drawn.last || '"'),
               n.body || convert_to(drawn.last::text || '}', 'UTF8'), clock_timestamp() + n.keep
        FROM unnest(_reply_w, _reply_session, _reply_bucket, _reply_id, _reply_destination, _reply_routing_key,
                    _reply_key, _reply_headers, _reply_body, _reply_keep)
            AS n(w, session, bucket, id, destination, routing_key, key, headers, body, keep)
            JOIN drawn ON drawn.tenant_id = _tenant[n.w] AND drawn.key = n.session
        WHERE _ok[n.w];
    END IF;

    -- Ends the items of the lanes. A lane goes on with its next item if that is due, and is given back otherwise.
    IF cardinality(_done_w) > 0 THEN
        UPDATE lane_item i
        SET state = 'done', body = NULL, finished_at = clock_timestamp(), attempts = i.attempts + 1
        FROM unnest(_done_w, _done_seq) AS d(w, seq)
        WHERE _ok[d.w] AND i.lane_id = _lane[d.w] AND i.seq = d.seq;
        SELECT array_agg(d.w)
        INTO _going_on
        FROM unnest(_done_w, _done_go_on) AS d(w, go_on)
            CROSS JOIN LATERAL lane_head(_lane[d.w]) h
        WHERE _ok[d.w] AND d.go_on AND (h.due OR h.expired);
        -- As lane_release. The rows are locked since the beginning, so each update reads the head as it is now.
        UPDATE lane l
        SET owner = NULL, ready_at = (
            SELECT greatest(least(i.not_before, i.expires_at), clock_timestamp())
            FROM lane_item i
            WHERE i.lane_id = l.lane_id AND i.state = 'waiting'
            ORDER BY i.seq
            LIMIT 1
        )
        FROM unnest(_done_w) AS d(w)
        WHERE _ok[d.w] AND d.w <> ALL(coalesce(_going_on, '{}')) AND l.lane_id = _lane[d.w];
    END IF;

    RETURN QUERY
    SELECT _refused[g.w], _messages[g.w], h.seq, h.item_id, h.body, h.headers, h.attempts, h.faults, h.recoveries, h.age,
           h.expired, h.due, h.expires_in
    FROM generate_subscripts(_run, 1) AS g(w)
        LEFT JOIN LATERAL lane_head(_lane[g.w]) h ON g.w = ANY(_going_on)
    ORDER BY g.w;
END $$
