-- Messages that are to be handled by their position. Neither table has row-level security.

-- Up to which position the messages of a key have been handled; also a counter, for who gives positions.
CREATE TABLE sequence (
    tenant_id text NOT NULL,
    name text NOT NULL,
    key text NOT NULL,
    last bigint NOT NULL,
    PRIMARY KEY (tenant_id, name, key)
);

-- Those that came before one that they are to follow.
CREATE TABLE early_message (
    tenant_id text NOT NULL,
    name text NOT NULL,
    key text NOT NULL,
    position bigint NOT NULL,
    parcel bytea NOT NULL,   -- for its handler; personal content in it is sealed
    headers text NOT NULL,   -- the trace in which it came; JSON
    PRIMARY KEY (tenant_id, name, key, position)
);
