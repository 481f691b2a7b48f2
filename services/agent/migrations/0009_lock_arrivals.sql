-- Locks and reads all that new messages are decided by. The arguments are columns with one entry per message, in the order
-- of the messages; _name is that of the positions. A new session remembers how far its parent was.
--
-- Locks, always in this order: the positions of the conversations by name, the sessions by name, and their unfinished runs
-- by id, as group writes do. The last statement comes after the locks: it sees all that other transactions have committed
-- before they gave the rows free, early messages included.
--
-- Returns one row per message. last: the position up to which its conversation is handled. messages, run_id, run_messages,
-- run_waits: the session. is_simple: the session has no early message and no unfinished run, and no person has taken it
-- over. definition: of the agent's newest version; null: the tenant has no such agent. has_key, wrapped: the person's key;
-- without bytes it was destroyed.
CREATE FUNCTION lock_arrivals(
    _name text, _tenant text[], _session text[], _parent text[], _agent uuid[], _subject text[]
) RETURNS TABLE (
    last bigint, messages bigint, run_id uuid, run_messages int, run_waits boolean, is_simple boolean,
    definition text, has_key boolean, wrapped bytea
) LANGUAGE plpgsql AS $$
#variable_conflict use_column
BEGIN
    INSERT INTO sequence AS s (tenant_id, name, key, last)
    SELECT n.tenant_id, _name, n.key, 0
    FROM unnest(_tenant, _session) AS n(tenant_id, key)
    GROUP BY n.tenant_id, n.key
    ORDER BY n.tenant_id, n.key
    ON CONFLICT (tenant_id, name, key) DO UPDATE SET last = s.last;

    -- The parent of a session is that of its first message here.
    INSERT INTO session AS s (tenant_id, session_key, parent_key, parent_seq)
    SELECT n.tenant_id, n.key, nullif(n.parent, ''),
           (SELECT p.messages FROM session p WHERE p.tenant_id = n.tenant_id AND p.session_key = n.parent)
    FROM (
        SELECT tenant_id, key, (array_agg(parent ORDER BY n))[1] AS parent
        FROM unnest(_tenant, _session, _parent) WITH ORDINALITY AS a(tenant_id, key, parent, n)
        GROUP BY tenant_id, key
    ) n
    ORDER BY n.tenant_id, n.key
    ON CONFLICT (tenant_id, session_key) DO UPDATE SET messages = s.messages;

    PERFORM r.id
    FROM run r JOIN (SELECT DISTINCT * FROM unnest(_tenant, _session)) n(tenant_id, key)
        ON r.tenant_id = n.tenant_id AND r.session_key = n.key
    WHERE r.status IN ('queued', 'running', 'waiting')
    ORDER BY r.id
    FOR UPDATE OF r;

    RETURN QUERY
    SELECT q.last, s.messages, s.run_id, s.run_messages, s.run_waits,
           s.taken_over_by IS NULL
               AND NOT EXISTS (
                   SELECT FROM early_message e
                   WHERE e.tenant_id = s.tenant_id AND e.name = _name AND e.key = s.session_key
               )
               AND NOT EXISTS (
                   SELECT FROM run r
                   WHERE r.tenant_id = s.tenant_id AND r.session_key = s.session_key
                       AND r.status IN ('queued', 'running', 'waiting')
               ),
           v.definition::text, k.subject_id IS NOT NULL, k.wrapped
    FROM unnest(_tenant, _session, _agent, _subject)
            WITH ORDINALITY AS n(tenant_id, session_key, agent_id, subject_id, n)
        JOIN sequence q ON q.tenant_id = n.tenant_id AND q.name = _name AND q.key = n.session_key
        JOIN session s ON s.tenant_id = n.tenant_id AND s.session_key = n.session_key
        LEFT JOIN agent a ON a.id = n.agent_id AND a.tenant_id = n.tenant_id
        LEFT JOIN agent_version v ON v.agent_id = a.id AND v.version = a.version
        LEFT JOIN subject_key k ON k.tenant_id = n.tenant_id AND k.subject_id = n.subject_id
    ORDER BY n.n;
END $$;
