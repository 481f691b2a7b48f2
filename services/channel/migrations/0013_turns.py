"""Function drain_accepted: takes accepted messages in turns by tenant. The key of the table begins with the tenant."""

from alembic import op

revision = "0013"
down_revision = "0012"


def upgrade() -> None:
    op.execute("ALTER TABLE accepted DROP CONSTRAINT accepted_pkey, ADD PRIMARY KEY (tenant_id, position)")
    # Deletes the oldest rows of the tenants: first the oldest of each tenant, then the second oldest, and so on. So a
    # message waits for few messages of other tenants, however many they have. is_behind: the tenant got its full share,
    # so it may have more rows. Of a tenant at most four shares are read, so that the work does not grow with the rows
    # that wait.
    #
    # A plan is kept, and most are made while the table is almost empty: with the settings they use the key only.
    # Materialized: in a loop of the planner the selection would be repeated, and would select further rows each time.
    op.execute("""
        CREATE FUNCTION drain_accepted(most bigint) RETURNS TABLE (
            "position" bigint, hash bytea, sealed bytea, traceparent text, accepted_at timestamptz, age interval,
            tenant_id text, is_behind boolean
        )
        LANGUAGE plpgsql SET enable_seqscan = off SET enable_hashjoin = off SET enable_mergejoin = off AS $$
        #variable_conflict use_column
        BEGIN
            RETURN QUERY
            WITH RECURSIVE tenant AS (
                (
                    SELECT tenant_id FROM accepted WHERE retry_at IS NULL OR retry_at < clock_timestamp()
                    ORDER BY tenant_id LIMIT 1
                )
                UNION ALL
                SELECT n.tenant_id
                FROM tenant t CROSS JOIN LATERAL (
                    SELECT tenant_id FROM accepted
                    WHERE tenant_id > t.tenant_id AND (retry_at IS NULL OR retry_at < clock_timestamp())
                    ORDER BY tenant_id LIMIT 1
                ) n
            ), share AS (
                SELECT greatest(most / count(*), 1) AS rows FROM tenant
            ), oldest AS MATERIALIZED (
                SELECT t.tenant_id, o.position, o.turn >= (SELECT rows FROM share) AS is_behind
                FROM tenant t CROSS JOIN LATERAL (
                    SELECT position, row_number() OVER (ORDER BY position) AS turn
                    FROM (
                        SELECT position FROM accepted
                        WHERE tenant_id = t.tenant_id AND (retry_at IS NULL OR retry_at < clock_timestamp())
                        ORDER BY position LIMIT (SELECT least(4 * rows, most) FROM share)
                    ) a
                ) o
                ORDER BY o.turn, o.position LIMIT most
            ), locked AS MATERIALIZED (
                SELECT tenant_id, position, o.is_behind FROM accepted a JOIN oldest o USING (tenant_id, position)
                ORDER BY tenant_id, position FOR UPDATE OF a
            )
            DELETE FROM accepted a USING locked l WHERE a.tenant_id = l.tenant_id AND a.position = l.position
            RETURNING a.position, a.hash, a.sealed, a.traceparent, a.accepted_at,
                clock_timestamp() - a.accepted_at, a.tenant_id, l.is_behind;
        END
        $$
    """)
