"""Reads of personal content are audited: one record for each reader, object and hour.

The record commits in the transaction that reads, before the content is shown. Content that cannot be recorded is not
shown. A reader that polls costs one statement for each request, and one record an hour.
"""

from __future__ import annotations

from collections.abc import Iterable

from infra.clock import utcnow
from infra.observe import telemetry
from infra.postgres.tx import Tx
from infra.security.audit import audit
from infra.security.auth import Identity


async def record_reads(tx: Tx, who: Identity, kind: str, ids: Iterable[str], **details: str) -> None:
    """Records ``<kind>.read`` for each of the objects whose content the client is about to see.

    Leave out the client's own objects: the reads of a person's own words are not recorded.
    """
    wanted = sorted(set(ids))
    if not wanted:
        return
    hour = utcnow().replace(minute=0, second=0, microsecond=0)
    first = await tx.sql(
        """
        -- Inserts in the order of the key. A row of another transaction that has not ended makes this one wait.
        INSERT INTO content_read (tenant_id, reader, kind, object_id, hour)
        SELECT $1, $2, $3, id, $5 FROM unnest($4::text[]) AS n(id) ORDER BY id
        ON CONFLICT DO NOTHING
        RETURNING object_id
        """,
        who.tenant_id,
        who.actor,
        kind,
        wanted,
        hour,
    )
    context = telemetry.extract(telemetry.carrier())
    if context:
        details["trace_id"] = f"{context.trace_id:032x}"
    for (id_,) in first:
        audit(tx, who.actor, f"{kind}.read", kind, id_, **details)


async def prune_reads(tx: Tx) -> None:
    """Deletes rows of hours that are over for an hour. The audit chain keeps the records."""
    await tx.sql(
        # Locks the rows that it deletes; those that another process deletes are skipped.
        """
        DELETE FROM content_read
        WHERE (tenant_id, reader, kind, object_id, hour) IN (
            SELECT tenant_id, reader, kind, object_id, hour
            FROM content_read
            WHERE hour < clock_timestamp() - interval '2 hours'
            LIMIT 10000
            FOR UPDATE SKIP LOCKED
        )
        """
    )
