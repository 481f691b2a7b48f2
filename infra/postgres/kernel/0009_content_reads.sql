-- Who has read which person's content in which hour. The first read of an hour is audited; its row holds back the others.
-- Pruned after two hours. No row-level security, as for the other rows of requests: each statement names the tenant.
CREATE TABLE content_read (
    tenant_id text NOT NULL,  -- empty: the operator of the platform, for no tenant
    reader text NOT NULL,
    kind text NOT NULL,
    object_id text NOT NULL,
    hour timestamptz NOT NULL,
    PRIMARY KEY (tenant_id, reader, kind, object_id, hour)
);
CREATE INDEX content_read_age ON content_read (hour);
