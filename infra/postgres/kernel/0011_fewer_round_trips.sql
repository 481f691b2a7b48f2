-- What a transaction writes at its end, and what it locks before it decides: each is one call.

-- Locks the row of the stream, so that decisions on it take turns, and returns its events in order. Two statements: the
-- second one sees the events that another transaction has appended before the lock was granted.
CREATE FUNCTION lock_stream(_stream text) RETURNS TABLE (type text, schema_version int, data bytea)
LANGUAGE plpgsql AS $$
BEGIN
    PERFORM FROM stream s WHERE s.stream_id = _stream FOR UPDATE;
    RETURN QUERY SELECT e.type, e.schema_version, e.data FROM event e WHERE e.stream_id = _stream ORDER BY e.version;
END $$;

-- Appends events to their streams, in the order given. The arguments are columns with one entry per event. _expected: the
-- version of the stream before its first event here; null: any. _maybe: the ids of those that may be stored already.
--
-- Locks the streams in the order of their names, before anything else. Positions are drawn after that, in the order of
-- the versions. Returns the ids of _maybe that are stored: a stream all of whose events are stored is not changed.
-- Raises P0C01 if a stream is at another version than expected, or if only a part of its events is stored.
CREATE FUNCTION append_events(
    _stream text[], _id uuid[], _expected bigint[], _type text[], _schema int[], _data bytea[], _headers text[],
    _maybe uuid[]
) RETURNS uuid[] LANGUAGE plpgsql AS $$
#variable_conflict use_column
DECLARE
    _stored uuid[] := '{}';
    _conflict text;
BEGIN
    INSERT INTO stream AS s (stream_id, version)
    SELECT n.stream_id, count(*) FROM unnest(_stream) AS n(stream_id) GROUP BY 1 ORDER BY n.stream_id COLLATE "C"
    ON CONFLICT (stream_id) DO UPDATE SET version = s.version + excluded.version;

    -- A statement of its own: it sees the events that were stored before the locks were granted.
    IF cardinality(_maybe) > 0 THEN
        SELECT coalesce(array_agg(event_id), '{}') INTO _stored FROM event WHERE event_id = ANY(_maybe);
    END IF;

    SELECT format('stream %s: at version %s, expected %s', n.stream_id, s.version - n.events, n.expected)
    INTO _conflict
    FROM (
        SELECT stream_id, count(*) AS events, count(*) FILTER (WHERE id = ANY(_stored)) AS repeated,
               (array_agg(expected ORDER BY n))[1] AS expected
        FROM unnest(_stream, _id, _expected) WITH ORDINALITY AS e(stream_id, id, expected, n)
        GROUP BY stream_id
    ) n
    JOIN stream s USING (stream_id)
    WHERE n.repeated < n.events AND (n.repeated > 0 OR n.expected <> s.version - n.events)
    LIMIT 1;
    IF FOUND THEN
        RAISE EXCEPTION '%', _conflict USING ERRCODE = 'P0C01';
    END IF;

    IF cardinality(_stored) > 0 THEN
        UPDATE stream s
        SET version = s.version - n.events
        FROM (
            SELECT stream_id, count(*) AS events
            FROM unnest(_stream, _id) AS e(stream_id, id)
            WHERE id = ANY(_stored)
            GROUP BY stream_id
        ) n
        WHERE s.stream_id = n.stream_id;
    END IF;
    INSERT INTO event (stream_id, version, event_id, type, schema_version, data, headers)
    SELECT n.stream_id, n.version, n.id, n.type, n.schema, n.data, n.headers
    FROM (
        SELECT e.*, s.version - count(*) OVER (PARTITION BY e.stream_id)
            + row_number() OVER (PARTITION BY e.stream_id ORDER BY e.n) AS version
        FROM unnest(_stream, _id, _type, _schema, _data, _headers)
            WITH ORDINALITY AS e(stream_id, id, type, schema, data, headers, n)
            JOIN stream s USING (stream_id)
        WHERE e.id <> ALL(_stored)
    ) n
    ORDER BY n.stream_id COLLATE "C", n.version;
    RETURN _stored;
END $$;

-- Appends items to their lanes, in the order given. The arguments are columns with one entry per item. An item whose id
-- its kind has had already is skipped.
--
-- _claim: whether the process _owner has a place for the lane of the item. If the lane has nothing else to do and the
-- item is due, the process claims it here for _lease seconds, and need not look for it after the commit. Returns the
-- claimed lanes, with the place of their item in the arguments.
--
-- Locks the lanes in the order of their keys, until the transaction ends: an item that commits later stands behind.
CREATE FUNCTION enqueue_items(
    _kind text[], _tenant text[], _lane text[], _item uuid[], _body bytea[], _headers text[], _not_before timestamptz[],
    _expires_in interval[], _claim boolean[], _owner uuid, _lease float8
) RETURNS TABLE (n bigint, lane_id bigint, epoch bigint, seq bigint) LANGUAGE plpgsql AS $$
#variable_conflict use_column
DECLARE
    _lanes bigint[];
BEGIN
    WITH locked AS (
        INSERT INTO lane AS l (kind, tenant_id, lane)
        SELECT kind, tenant_id, lane
        FROM unnest(_kind, _tenant, _lane) AS n(kind, tenant_id, lane)
        GROUP BY kind, tenant_id, lane
        ORDER BY kind COLLATE "C", tenant_id COLLATE "C", lane COLLATE "C"
        ON CONFLICT (kind, tenant_id, lane) DO UPDATE SET last_seq = l.last_seq
        RETURNING kind, tenant_id, lane, lane_id
    )
    SELECT array_agg(locked.lane_id ORDER BY n.n)
    INTO _lanes
    FROM unnest(_kind, _tenant, _lane) WITH ORDINALITY AS n(kind, tenant_id, lane, n)
    JOIN locked ON locked.kind = n.kind AND locked.tenant_id = n.tenant_id AND locked.lane = n.lane;

    -- A statement of its own: it sees the items that others enqueued before the locks were granted. Items are inserted in
    -- the order of their ids: two transactions may enqueue the same ids in different lanes.
    RETURN QUERY
    WITH fresh AS (
        INSERT INTO lane_item (lane_id, seq, kind, tenant_id, item_id, body, headers, not_before, expires_at)
        SELECT l.lane_id, l.last_seq + row_number() OVER (PARTITION BY l.lane_id ORDER BY n.n),
            l.kind, l.tenant_id, n.id, n.body, n.headers, coalesce(n.not_before, clock_timestamp()),
            clock_timestamp() + n.expires_in
        FROM unnest(_lanes, _item, _body, _headers, _not_before, _expires_in)
            WITH ORDINALITY AS n(lane_id, id, body, headers, not_before, expires_in, n)
        JOIN lane l USING (lane_id)
        WHERE NOT EXISTS (
            SELECT FROM lane_item o
            WHERE o.kind = l.kind AND o.tenant_id = l.tenant_id AND o.item_id = n.id
        )
        ORDER BY n.id
        ON CONFLICT (kind, tenant_id, item_id) DO NOTHING
        RETURNING lane_id, seq, item_id, not_before, expires_at
    ), added AS (
        SELECT DISTINCT ON (lane_id) lane_id, seq AS first, item_id, max(seq) OVER (PARTITION BY lane_id) AS last,
            least(not_before, expires_at) AS ready_at,
            not_before <= clock_timestamp() AND coalesce(expires_at > clock_timestamp(), true) AS due
        FROM fresh
        ORDER BY lane_id, seq
    ), moving AS (
        SELECT added.*, n.n, n.claim AND added.due AND l.ready_at IS NULL AS claimed
        FROM added
        JOIN lane l USING (lane_id)
        JOIN unnest(_lanes, _item, _claim) WITH ORDINALITY AS n(lane_id, item_id, claim, n) USING (lane_id, item_id)
    ), moved AS (
        UPDATE lane l
        SET last_seq = m.last,
            ready_at = CASE
                WHEN m.claimed THEN clock_timestamp() + make_interval(secs => _lease)
                ELSE coalesce(l.ready_at, m.ready_at)
            END,
            owner = CASE WHEN m.claimed THEN _owner ELSE l.owner END,
            epoch = l.epoch + m.claimed::int
        FROM moving m
        WHERE l.lane_id = m.lane_id
        RETURNING m.claimed, m.n, l.lane_id, l.epoch, m.first
    )
    SELECT n, lane_id, epoch, first FROM moved WHERE claimed;
END $$;
