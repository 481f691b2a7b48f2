"""The inbox: the messages that a consumer has handled. It is written in the transaction of the effect."""

from __future__ import annotations

from collections.abc import Sequence
from uuid import UUID

from sqlalchemy.ext.asyncio import AsyncConnection

from infra.postgres.db import sql


async def mark_handled(connection: AsyncConnection, consumer: str, ids: Sequence[UUID]) -> set[UUID]:
    """Marks `ids` (each at most once in the list) as handled. Returns those that were not handled before.

    A second transaction with the same id waits until the first one ends. If the first one commits, the id is not
    returned to the second one; if it rolls back, it is.
    """
    rows = await sql(
        connection,
        # Ids are inserted in their order. Transactions that share ids would otherwise deadlock.
        """
        INSERT INTO inbox (message_id, consumer)
        SELECT id, $1::text FROM unnest($2::uuid[]) AS n(id)
        ON CONFLICT DO NOTHING
        RETURNING message_id
        """,
        consumer,
        sorted(ids),
    )
    return {id_ for (id_,) in rows}


async def maintain(connection: AsyncConnection) -> None:
    """Makes the partitions of the next months, and drops those from which no message can be delivered again.

    Deletes published messages that are no longer kept, and the members of leases that have gone."""
    await sql(connection, "SELECT inbox_partitions()")
    await sql(connection, "DELETE FROM lease_member WHERE seen_at < clock_timestamp() - interval '1 hour'")
    await sql(
        connection,
        # Skips rows that are locked: a `resend` locks them in another order.
        """
        DELETE FROM outbox
        WHERE position IN (
            SELECT position FROM outbox
            WHERE published_at IS NOT NULL AND keep_until < clock_timestamp()
            LIMIT 50000
            FOR UPDATE SKIP LOCKED
        )
        """,
    )
