"""The inbox: which messages a consumer has handled, written in the transaction of the effect."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from uuid import UUID

from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncConnection

from infra.errors import Transient
from infra.postgres.db import sql


async def mark_handled(connection: AsyncConnection, consumer: str, ids: Sequence[UUID]) -> set[UUID]:
    """Marks `ids` (each at most once in the list) as handled and returns those that were not yet.

    A second transaction with the same id waits for the first one's outcome: after its commit it gets nothing
    back, after its rollback the id.
    """
    # Sorted: two transactions that share ids wait for each other in one order, never in a circle.
    rows = await sql(
        connection,
        "INSERT INTO inbox (message_id, consumer) SELECT id, $1::text FROM unnest($2::uuid[]) AS n(id) "
        "ON CONFLICT DO NOTHING RETURNING message_id",
        consumer,
        sorted(ids),
    )
    return {UUID(int=id_.int) for (id_,) in rows}


async def mark_batch(connection: AsyncConnection, consumer: str, ids: Iterable[UUID]) -> set[UUID]:
    """Marks all `ids` as handled and returns those that already were.

    For batches: it takes half the time of `mark_handled`. Raises Transient where another transaction marks one of
    the ids at the same moment and commits; the batch is then to be tried again from its beginning.
    """
    try:
        repeats = await sql(
            connection,
            "WITH repeat AS MATERIALIZED (SELECT message_id FROM inbox WHERE consumer = $1 "
            "AND message_id = ANY($2::uuid[])), "
            "fresh AS (INSERT INTO inbox (message_id, consumer) SELECT id, $1::text FROM unnest($2::uuid[]) AS n(id) "
            "WHERE id NOT IN (SELECT message_id FROM repeat)) SELECT message_id FROM repeat",
            consumer,
            sorted(ids),
        )
    except IntegrityError as error:
        raise Transient(f"{consumer}: another transaction handled a message of the batch meanwhile") from error
    return {id_ for (id_,) in repeats}


async def maintain(connection: AsyncConnection) -> None:
    """Makes the coming months' partitions, drops those beyond every redelivery, and clears
    the outbox's past and the leases' dead members."""
    await sql(connection, "SELECT inbox_partitions()")
    await sql(connection, "DELETE FROM lease_member WHERE seen_at < clock_timestamp() - interval '1 hour'")
    await sql(
        connection,
        "DELETE FROM outbox WHERE position IN (SELECT position FROM outbox "
        "WHERE published_at IS NOT NULL AND keep_until < clock_timestamp() LIMIT 50000)",
    )
