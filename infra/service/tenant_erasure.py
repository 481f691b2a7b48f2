"""Erasure of a tenant in one service: the keys of its persons at once, and then every row that has its id.

The rows are deleted by an item of a lane, a few thousand in each transaction. A process that dies leaves the item to
another one, and each step may be repeated. Three passes follow each other, because the tenant's work that is under way,
and messages that wait, may add rows after the first one.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Collection
from dataclasses import dataclass
from datetime import timedelta
from graphlib import TopologicalSorter
from typing import Any

import msgspec

from infra.failpoint import failpoint
from infra.lanes.effects import Effects
from infra.lanes.lane import Lane
from infra.postgres.tx import Tx
from infra.security import subjects
from infra.stores.objects import Objects
from protos.catalog import PLATFORM_EVENTS
from protos.messages.user import TenantDataErased, TenantErased
from protos.topology import Subscription

PASSES = (timedelta(0), timedelta(minutes=10), timedelta(days=8))
"""When the passes begin, after the service has learned of the erasure. The second: a revoked key works for seconds, and
queues retry for six minutes. It reports that the service has erased the tenant. The third: topics and outboxes keep
messages with content for seven days, so that they can be delivered again."""
BATCH_ROWS = 5_000
FILES = 1_000
"""Paths that are read at once."""

# Rows of the kernel that stay.
_KEPT = ("erased_tenant",)


class EraseTenant(msgspec.Struct, frozen=True):
    """The item of a lane: one pass over the rows of an erased tenant in this service."""

    tenant_id: str
    number: int
    """Of the pass, from 1."""

    @property
    def is_late(self) -> bool:
        """The work of the tenant that was under way at the erasure has ended."""
        return self.number > 1


# The items are of no tenant: a pass deletes the lanes of the tenant.
ERASURES = Lane("erased tenants", EraseTenant)

Before = Callable[[EraseTenant, Effects], Awaitable[None]]


@dataclass(frozen=True)
class Erasure:
    """The particulars of a service."""

    kept: Collection[str] = ()
    """Its tables whose rows stay."""
    before: Before | None = None
    """Called in each pass before the rows are deleted: it deletes files and vectors that they refer to. It may be
    called again after an error."""
    notes: Collection[str] = ()
    """Its tables that name files before these are stored. Their rows stay in the first pass: a file that is stored
    during it is deleted by the second."""


def queue_erasure(service: str) -> Subscription:
    """The subscription that destroys the keys of an erased tenant's persons, and queues the deletion of its rows."""

    @PLATFORM_EVENTS.each(TenantErased, group=service)
    async def erase_tenant(event: TenantErased, tx: Tx) -> None:
        await subjects.destroy_all(tx, event.tenant_id)
        tx.tenant_id = None
        for number, after in enumerate(PASSES, 1):
            item = EraseTenant(event.tenant_id, number)
            tx.enqueue(ERASURES, lane=event.tenant_id, item=item, after=after)

    return erase_tenant


@ERASURES.runner(concurrency=1)
async def erase_rows(item: EraseTenant, effects: Effects, tx: Tx, erasure: Erasure) -> None:
    """One pass: deletes every row that has the tenant's id, and reports the end of the second pass."""
    if erasure.before:
        await erasure.before(item, effects)
    async with effects.begin() as reading:
        tables = await _tables(reading, {*_KEPT, *erasure.kept, *(() if item.is_late else erasure.notes)})
    for table in tables:
        failpoint("before_erased_table")
        await _delete_rows(effects, table, item.tenant_id)
    await _delete_events(effects, item.tenant_id)
    if item.is_late:
        tx.tenant_id = item.tenant_id
        event = TenantDataErased(tenant_id=item.tenant_id, service=tx.service)
        tx.publish(PLATFORM_EVENTS, event, key=item.tenant_id)


async def delete_files(objects: Objects, effects: Effects, select: str, tenant_id: str, *more: Any) -> None:
    """Deletes files of the tenant.

    select: a statement for their paths above $2, in their order, at most $3. $1 is the tenant's id; from $4 on come the
    arguments `more`.
    """
    paths = [""]
    while paths:
        async with effects.begin() as tx:
            paths = [path for (path,) in await tx.sql(select, tenant_id, paths[-1], FILES, *more)]
        for path in paths:
            await objects.delete(path)


async def _tables(tx: Tx, kept: Collection[str]) -> list[str]:
    """The tables of this schema whose rows name a tenant, those that refer to others first."""
    rows = await tx.sql(
        """
        SELECT c.relname, coalesce(array_agg(DISTINCT r.relname) FILTER (WHERE r.relname <> c.relname), '{}')
        FROM pg_class AS c
        JOIN pg_attribute AS a ON a.attrelid = c.oid AND a.attname = 'tenant_id' AND NOT a.attisdropped
        LEFT JOIN pg_constraint AS f ON f.confrelid = c.oid AND f.contype = 'f'
        LEFT JOIN pg_class AS r ON r.oid = f.conrelid
        WHERE c.relnamespace = current_schema()::regnamespace AND c.relkind IN ('r', 'p') AND NOT c.relispartition
        GROUP BY c.relname
        ORDER BY c.relname
        """
    )
    order = TopologicalSorter({table: set(referring) for table, referring in rows}).static_order()
    return [table for table in order if table not in kept]


async def _delete_rows(effects: Effects, table: str, tenant_id: str) -> None:
    deleted = True
    while deleted:
        async with effects.begin() as tx:
            deleted = bool(
                await tx.sql(
                    f"""
                    WITH gone AS (
                        DELETE FROM "{table}"
                        WHERE ctid = ANY(ARRAY(
                            SELECT ctid FROM "{table}" WHERE tenant_id = $1 LIMIT {BATCH_ROWS} FOR UPDATE
                        ))
                        RETURNING 1
                    )
                    SELECT FROM gone LIMIT 1
                    """,
                    tenant_id,
                )
            )


async def _delete_events(effects: Effects, tenant_id: str) -> None:
    """Reads all events of the service: a tenant is erased so rarely that an index of tenants would cost more."""
    position: int | None = 0
    while position is not None:
        async with effects.begin() as tx:
            [(position, streams)] = await tx.sql(
                f"""
                WITH part AS (
                    SELECT position, stream_id, headers
                    FROM event
                    WHERE position > $2
                    ORDER BY position
                    LIMIT {BATCH_ROWS}
                ),
                gone AS (
                    DELETE FROM event AS e
                    USING part
                    WHERE e.position = part.position AND part.headers::jsonb ->> 'tenant_id' = $1
                    RETURNING e.stream_id
                )
                SELECT (SELECT max(position) FROM part), ARRAY(SELECT DISTINCT stream_id FROM gone ORDER BY 1)
                """,
                tenant_id,
                position,
            )
            # A statement of its own: it sees which streams have no event left.
            await tx.sql(
                """
                DELETE FROM stream AS s
                WHERE stream_id = ANY($1::text[])
                  AND NOT EXISTS (SELECT FROM event AS e WHERE e.stream_id = s.stream_id)
                """,
                streams,
            )
