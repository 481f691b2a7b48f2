-- Lanes: work that is long, ordered or delayed, one item of a lane at a time. None has row-level security.

CREATE TABLE lane (
    lane_id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    kind text NOT NULL,
    tenant_id text COLLATE "C" NOT NULL,  -- empty: of no tenant
    lane text NOT NULL,
    last_seq bigint NOT NULL DEFAULT 0,
    -- When somebody may take the lane: its head is due, or the lease of who has it runs out. Null: nothing to do.
    ready_at timestamptz,
    owner uuid,                           -- null: not claimed
    epoch bigint NOT NULL DEFAULT 0,      -- rises with each claim, and fences the writes of the last owner
    UNIQUE (kind, tenant_id, lane)
) WITH (fillfactor = 70);
CREATE INDEX lane_ready ON lane (kind, tenant_id, ready_at) WHERE ready_at IS NOT NULL;

CREATE TABLE lane_item (
    lane_id bigint NOT NULL REFERENCES lane,
    seq bigint NOT NULL,         -- in the order of commits: drawn while the lane's row is locked
    kind text NOT NULL,
    tenant_id text NOT NULL,
    item_id uuid NOT NULL,
    state text NOT NULL DEFAULT 'waiting' CHECK (state IN ('waiting', 'done', 'expired', 'dead', 'cancelled')),
    body bytea,                  -- null once it is over
    headers text NOT NULL,       -- the trace in which it was enqueued; JSON
    attempts int NOT NULL DEFAULT 0,
    faults int NOT NULL DEFAULT 0,      -- attempts that failed and not by something that passes
    recoveries int NOT NULL DEFAULT 0,  -- times that its owner died, or lost the lane, over it
    error text,                  -- of the last attempt
    not_before timestamptz NOT NULL,
    expires_at timestamptz,
    created_at timestamptz NOT NULL DEFAULT clock_timestamp(),
    finished_at timestamptz,
    PRIMARY KEY (lane_id, seq),
    UNIQUE (kind, tenant_id, item_id)
);
CREATE INDEX lane_item_waiting ON lane_item (lane_id, seq) WHERE state = 'waiting';
CREATE INDEX lane_item_finished ON lane_item (finished_at) WHERE finished_at IS NOT NULL;

-- Gives a lane back. The caller has locked its row already: an update that waits for the lock would read the head as it
-- was before, and miss items that were enqueued meanwhile. The lane stands behind the other lanes that are ready, because
-- lanes are claimed by the time since which they are ready.
CREATE FUNCTION lane_release(_lane_id bigint) RETURNS void LANGUAGE sql AS $$
    UPDATE lane SET owner = NULL, ready_at = (
        SELECT greatest(least(not_before, expires_at), clock_timestamp()) FROM lane_item i
        WHERE i.lane_id = _lane_id AND i.state = 'waiting' ORDER BY seq LIMIT 1
    ) WHERE lane_id = _lane_id
$$;

-- The head of the lane, as its runner needs it.
CREATE FUNCTION lane_head(_lane_id bigint) RETURNS TABLE (
    seq bigint, item_id uuid, body bytea, headers text, attempts int, faults int, recoveries int,
    age interval, expired boolean, due boolean, expires_in interval
) LANGUAGE sql STABLE AS $$
    SELECT seq, item_id, body, headers, attempts, faults, recoveries, clock_timestamp() - created_at,
        coalesce(expires_at <= clock_timestamp(), false), not_before <= clock_timestamp(),
        expires_at - clock_timestamp()
    FROM lane_item i WHERE i.lane_id = _lane_id AND i.state = 'waiting' ORDER BY seq LIMIT 1
$$;

-- Locks the lane and ends its head, under the epoch of the claim. If another process holds the lane, the first column is
-- false and nothing has changed. Returns the next head if it is due and `_go_on` is true. Otherwise gives the lane back.
CREATE FUNCTION lane_finish(_lane_id bigint, _epoch bigint, _seq bigint, _state text, _go_on boolean) RETURNS TABLE (
    held boolean,
    seq bigint, item_id uuid, body bytea, headers text, attempts int, faults int, recoveries int,
    age interval, expired boolean, due boolean, expires_in interval
) LANGUAGE plpgsql AS $$
BEGIN
    PERFORM FROM lane l WHERE l.lane_id = _lane_id AND l.epoch = _epoch FOR UPDATE;
    IF NOT FOUND THEN
        RETURN QUERY SELECT false, h.* FROM (VALUES (1)) one LEFT JOIN lane_head(NULL) h ON true;
        RETURN;
    END IF;
    UPDATE lane_item i SET state = _state, body = NULL, finished_at = clock_timestamp(), attempts = i.attempts + 1
    WHERE i.lane_id = _lane_id AND i.seq = _seq;
    IF _go_on THEN
        RETURN QUERY SELECT true, h.* FROM lane_head(_lane_id) h WHERE h.due OR h.expired;
        IF FOUND THEN
            RETURN;
        END IF;
    END IF;
    PERFORM lane_release(_lane_id);
    RETURN QUERY SELECT true, h.* FROM (VALUES (1)) one LEFT JOIN lane_head(NULL) h ON true;
END $$;

-- Effects in the outside world, each with its own commits.
CREATE TABLE lane_effect (
    tenant_id text NOT NULL,
    key text NOT NULL,
    kind text NOT NULL CHECK (kind IN ('repeatable', 'keyed', 'once')),
    -- started: a call may be under way; undone: the last attempt had no effect; the others are final.
    state text NOT NULL CHECK (state IN ('started', 'undone', 'succeeded', 'failed', 'unknown')),
    attempt int NOT NULL,
    lane_id bigint NOT NULL,     -- with epoch: under which claim it was started
    epoch bigint NOT NULL,
    result bytea,                -- JSON
    error text,
    started_at timestamptz NOT NULL,
    finished_at timestamptz,
    PRIMARY KEY (tenant_id, key)
);
CREATE INDEX lane_effect_age ON lane_effect (started_at);
