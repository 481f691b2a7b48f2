-- Rows that requests leave in every service's schema. None has row-level security: each row is found by its tenant.

-- Answers to requests that carried an Idempotency-Key, sealed, for a day. `answer` is null while the first one runs.
CREATE TABLE idempotency (
    tenant_id text NOT NULL,
    key text NOT NULL,
    route text NOT NULL,
    request_hash bytea NOT NULL,
    status int,
    answer bytea,
    created_at timestamptz NOT NULL DEFAULT clock_timestamp(),
    PRIMARY KEY (tenant_id, route, key)
);
CREATE INDEX idempotency_age ON idempotency (created_at);

-- The key under which a person's content is sealed. Destroyed: wrapped is null, and the row stays, so that a late
-- message of that person does not make a new one.
CREATE TABLE subject_key (
    tenant_id text NOT NULL,
    subject_id text NOT NULL,
    wrapped bytea,
    created_at timestamptz NOT NULL DEFAULT clock_timestamp(),
    destroyed_at timestamptz,
    PRIMARY KEY (tenant_id, subject_id)
);
