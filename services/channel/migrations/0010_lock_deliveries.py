"""The function that locks and reads all that a group of new deliveries needs, in one call."""

from alembic import op

revision = "0010"
down_revision = "0009"


def upgrade() -> None:
    op.execute("""
        -- The arguments are columns with one entry per delivery. _name is that of the positions. _subject: whose key
        -- seals the text; empty: that of the person who wrote last.
        --
        -- Locks the positions of the conversations, in the order of their names. The second statement comes after the
        -- locks: it sees all that other transactions have committed before they gave the positions free.
        --
        -- Returns one row per delivery, in order. subject_id: null if the channel has no such conversation. last: the
        -- position up to which deliveries are queued. is_simple: no early delivery waits in the conversation, and the
        -- delivery is new. has_key, wrapped: the person's key; without bytes it was destroyed.
        CREATE FUNCTION lock_deliveries(
            _name text, _tenant text[], _session text[], _channel uuid[], _delivery uuid[], _subject text[]
        ) RETURNS TABLE (subject_id text, last bigint, is_simple boolean, has_key boolean, wrapped bytea)
        LANGUAGE plpgsql AS $$
        #variable_conflict use_column
        BEGIN
            INSERT INTO sequence AS s (tenant_id, name, key, last)
            SELECT n.tenant_id, _name, n.key, 0
            FROM unnest(_tenant, _session) AS n(tenant_id, key)
            GROUP BY n.tenant_id, n.key
            ORDER BY n.tenant_id, n.key
            ON CONFLICT (tenant_id, name, key) DO UPDATE SET last = s.last;

            RETURN QUERY
            SELECT w.subject_id, q.last,
                   NOT EXISTS (
                       SELECT FROM early_message e
                       WHERE e.tenant_id = n.tenant_id AND e.name = _name AND e.key = n.session_key
                   )
                   AND NOT EXISTS (SELECT FROM delivery d WHERE d.id = n.delivery_id),
                   k.subject_id IS NOT NULL, k.wrapped
            FROM unnest(_tenant, _session, _channel, _delivery, _subject)
                    WITH ORDINALITY AS n(tenant_id, session_key, channel_id, delivery_id, subject_id, n)
                JOIN sequence q ON q.tenant_id = n.tenant_id AND q.name = _name AND q.key = n.session_key
                LEFT JOIN LATERAL (
                    SELECT coalesce(nullif(n.subject_id, ''), c.subject_id) AS subject_id
                    FROM conversation c
                    WHERE c.session_key = n.session_key AND c.channel_id = n.channel_id AND c.tenant_id = n.tenant_id
                ) w ON true
                LEFT JOIN subject_key k ON k.tenant_id = n.tenant_id AND k.subject_id = w.subject_id
            ORDER BY n.n;
        END $$
    """)
