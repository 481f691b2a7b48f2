-- Tables of the kernel, the same in every service's schema. None has row-level security.

-- Events: one row per stream holds the version; its lock orders everything that is appended to the stream.
CREATE TABLE stream (
    stream_id text PRIMARY KEY,
    version bigint NOT NULL
);

CREATE SEQUENCE event_position CACHE 1;
CREATE TABLE event (
    stream_id text NOT NULL REFERENCES stream,
    version bigint NOT NULL,
    event_id uuid NOT NULL UNIQUE,
    position bigint NOT NULL UNIQUE DEFAULT nextval('event_position'),
    type text NOT NULL,
    schema_version int NOT NULL,
    data bytea NOT NULL,
    headers text NOT NULL,  -- of the messages made from it: tenant, trace; JSON
    recorded_at timestamptz NOT NULL DEFAULT clock_timestamp(),
    PRIMARY KEY (stream_id, version)
);

-- Outbox. A position is drawn after the stream's row is locked, so per key positions follow the stream.
-- CACHE 1: a cached block would let a later transaction draw an earlier position.
CREATE SEQUENCE outbox_position CACHE 1;
CREATE TABLE outbox (
    position bigint PRIMARY KEY DEFAULT nextval('outbox_position'),
    bus text NOT NULL CHECK (bus IN ('kafka', 'rabbit')),
    bucket smallint NOT NULL,
    message_id uuid NOT NULL,
    destination text NOT NULL,  -- topic or exchange
    routing_key text NOT NULL,  -- empty on Kafka
    key text NOT NULL,          -- order is kept per destination and key
    headers text NOT NULL,      -- JSON, final
    body bytea NOT NULL,        -- final bytes
    created_at timestamptz NOT NULL DEFAULT clock_timestamp(),
    keep_until timestamptz NOT NULL,
    published_at timestamptz
);
CREATE INDEX outbox_pending ON outbox (bus, position) WHERE published_at IS NULL;
CREATE INDEX outbox_kept ON outbox (destination, created_at);
CREATE INDEX outbox_done ON outbox (keep_until) WHERE published_at IS NOT NULL;

-- A destination and key that cannot be published for now. Its rows are passed over until then, so they do not fill
-- the relay's window. An empty key stands for the whole destination.
CREATE TABLE outbox_set_aside (
    bus text NOT NULL,
    destination text NOT NULL,
    key text NOT NULL,
    attempts int NOT NULL,
    retry_at timestamptz NOT NULL,
    error text NOT NULL,
    PRIMARY KEY (bus, destination, key)
);

-- Leases: the epoch rises with each new owner, and fences the writes of the last one.
CREATE TABLE lease (
    name text PRIMARY KEY,
    owner uuid NOT NULL,
    epoch bigint NOT NULL,
    expires_at timestamptz NOT NULL
);
CREATE TABLE lease_member (
    kind text NOT NULL,
    owner uuid NOT NULL,
    seen_at timestamptz NOT NULL,
    PRIMARY KEY (kind, owner)
);

-- Inbox: which messages a consumer has handled. Partitioned by the time inside the UUIDv7.
CREATE TABLE inbox (
    message_id uuid NOT NULL,
    consumer text NOT NULL,
    PRIMARY KEY (message_id, consumer)
) PARTITION BY RANGE (message_id);
CREATE TABLE inbox_default PARTITION OF inbox DEFAULT;

-- Makes this month's partition and the next two; drops those whose month ended more than 120 days ago, which is
-- beyond the longest retention of any topic, so nothing can be delivered again.
CREATE FUNCTION inbox_partitions() RETURNS void LANGUAGE plpgsql SECURITY DEFINER SET search_path FROM CURRENT AS $$
DECLARE
    month timestamptz;
    part text;
    old record;
BEGIN
    FOR i IN 0..2 LOOP
        month := date_trunc('month', now() AT TIME ZONE 'UTC') AT TIME ZONE 'UTC' + make_interval(months => i);
        part := 'inbox_' || to_char(month AT TIME ZONE 'UTC', 'YYYYMM');
        IF to_regclass(format('%I.%I', current_schema(), part)) IS NULL THEN
            EXECUTE format('CREATE TABLE %I (LIKE inbox INCLUDING ALL)', part);
            -- Ids of this month that came while its partition was missing lie in the default one.
            EXECUTE format('WITH moved AS (DELETE FROM inbox_default WHERE message_id >= %L AND message_id < %L '
                'RETURNING *) INSERT INTO %I SELECT * FROM moved',
                uuid7_floor(month), uuid7_floor(month + interval '1 month'), part);
            EXECUTE format('ALTER TABLE inbox ATTACH PARTITION %I FOR VALUES FROM (%L) TO (%L)',
                part, uuid7_floor(month), uuid7_floor(month + interval '1 month'));
        END IF;
    END LOOP;
    FOR old IN
        SELECT inhrelid::regclass::text AS name FROM pg_inherits
        WHERE inhparent = 'inbox'::regclass AND inhrelid::regclass::text ~ 'inbox_\d{6}$'
          AND to_timestamp(right(inhrelid::regclass::text, 6), 'YYYYMM') + interval '1 month' < now() - interval '120 days'
    LOOP
        EXECUTE 'DROP TABLE ' || old.name;
    END LOOP;
END $$;

-- The smallest UUIDv7 of a moment: 48 bits of Unix milliseconds, then zeros.
CREATE FUNCTION uuid7_floor(moment timestamptz) RETURNS uuid LANGUAGE sql IMMUTABLE AS $$
    SELECT rpad(lpad(to_hex((extract(epoch FROM moment) * 1000)::bigint), 12, '0'), 32, '0')::uuid
$$;

-- The position of a consumer in a partition, written in the transaction of the effect. The second uuid is the topic's
-- id at the broker (renamed in 0005): a topic that was created again is read from its beginning.
CREATE TABLE consumer_offset (
    consumer text NOT NULL,
    topic text NOT NULL,
    partition int NOT NULL,
    incarnation uuid NOT NULL,
    next_offset bigint NOT NULL,
    updated_at timestamptz NOT NULL DEFAULT now(),
    PRIMARY KEY (consumer, topic, partition)
);

-- Dead letters: messages that could not be processed, and those of the same key that wait behind them.
CREATE TABLE dead_letter (
    id uuid PRIMARY KEY,
    seq bigint GENERATED ALWAYS AS IDENTITY,
    consumer text NOT NULL,
    source text NOT NULL,       -- kafka, rabbit or outbox
    destination text NOT NULL,  -- topic or queue
    place text NOT NULL,        -- topic id/partition/offset, or the routing key
    message_id text NOT NULL,   -- sha256:… of the payload if it has no readable id
    key text,
    tenant_id text,
    state text NOT NULL CHECK (state IN ('failed', 'waiting', 'redriving', 'redriven', 'discarded')),
    attempts int NOT NULL,
    error text NOT NULL,
    first_failed_at timestamptz NOT NULL DEFAULT clock_timestamp(),
    last_failed_at timestamptz NOT NULL DEFAULT clock_timestamp(),
    headers text NOT NULL,      -- JSON; bytes that are not UTF-8 are escaped
    payload bytea NOT NULL
);
-- A message that is delivered again while it lies here is one dead letter, not two.
CREATE UNIQUE INDEX dead_letter_once ON dead_letter (consumer, source, destination, message_id)
    WHERE state IN ('failed', 'waiting', 'redriving');
CREATE INDEX dead_letter_open ON dead_letter (consumer, destination, key, seq)
    WHERE state IN ('failed', 'waiting', 'redriving');

-- A key of an ordered topic whose head failed. Consumer and drainer lock the same row.
CREATE TABLE parked_key (
    consumer text NOT NULL,
    topic text NOT NULL,
    key text NOT NULL,
    parked_at timestamptz NOT NULL DEFAULT clock_timestamp(),
    PRIMARY KEY (consumer, topic, key)
);

-- Row-level security: see infra.postgres.schema.tenant_policy.
CREATE FUNCTION current_tenant() RETURNS text LANGUAGE plpgsql STABLE AS $$
DECLARE
    tenant text := current_setting('claw.tenant', true);
BEGIN
    IF tenant IS NULL OR tenant = '' THEN
        RAISE EXCEPTION 'no tenant is set in this transaction' USING ERRCODE = 'insufficient_privilege';
    END IF;
    RETURN tenant;
END $$;
