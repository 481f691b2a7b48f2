-- Tenants that were erased. No key of a subject is made for them again. Their other rows are deleted; this one stays.
CREATE TABLE erased_tenant (
    tenant_id text PRIMARY KEY,
    asked_at timestamptz NOT NULL DEFAULT clock_timestamp()
);
