"""Lanes: work that is long, ordered or delayed. All processes together handle one item of a lane at a time, in order.

A lane is a row in PostgreSQL under a lease with an epoch. Its items are rows that refer to it. With this module a
service declares its lanes and changes their items; `infra.lanes.runner` processes them.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Generic
from uuid import UUID

from infra.lanes.effects import ItemEnded
from infra.postgres.lane_items import Item, NewItem
from infra.postgres.tx import Tx

Handler = Callable[..., Awaitable[ItemEnded | None]]
Expired = Callable[[Any, Tx], Awaitable[None]]
Dead = Callable[..., Awaitable[None]]

RETRIES = tuple(timedelta(seconds=seconds) for seconds in (1, 5, 30, 120))
# An item that has ended keeps its row for this time, so that the same id is not enqueued again.
KEEP_ITEMS = timedelta(days=7)
# The ledger keeps an effect for this time. An older dead letter of a lane is not redriven: it could repeat an effect.
KEEP_EFFECTS = timedelta(days=30)


@dataclass(frozen=True)
class Lane(Generic[Item]):
    """A kind of lane, and the type of its items."""

    name: str
    item: type[Item]
    retries: tuple[timedelta, ...] = RETRIES
    """The delay before each further attempt after a fault of the handler. After the last one the item becomes a dead
    letter. After a transient error (`Transient`, `RetryLater`, the database is away) it is retried until it expires."""

    def runner(
        self,
        *,
        concurrency: int,
        per_tenant: int | None = None,
        expired: Expired | None = None,
        dead: Dead | None = None,
    ) -> Callable[[Handler], Work]:
        """The handler takes ``(item, effects, tx)``; `tx` commits together with the item's completion. A handler
        that has ended its item by itself returns `ItemEnded`.

        `concurrency`: the most lanes that a process handles at the same time. `per_tenant`: the most of one tenant, so
        that its long items do not keep the others waiting. `expired`: called with ``(item, tx)`` in place of the
        handler if the item has expired. `dead`: called with ``(item, error, tx)``; its transaction also stores the
        dead letter.
        """
        return lambda handler: Work(self, handler, concurrency, per_tenant or concurrency, expired, dead)


@dataclass(frozen=True)
class Work:
    """The handler of a kind of lane, and its limits. Passed to ``service.work``."""

    lane: Lane[Any]
    handler: Handler
    concurrency: int
    per_tenant: int
    expired: Expired | None = None
    dead: Dead | None = None


async def postpone(tx: Tx, kind: Lane[Any], lane: str, item_id: UUID, after: timedelta) -> bool:
    """Lets a waiting item be handled so long after now. False if it has begun or ended: too late."""
    return await _change(tx, kind, lane, item_id, "not_before = clock_timestamp() + $3", after)


async def cancel(tx: Tx, kind: Lane[Any], lane: str, item_id: UUID) -> bool:
    """Removes a waiting item from its lane. False if it has begun or ended: too late."""
    return await _change(tx, kind, lane, item_id, "state = 'cancelled', body = NULL, finished_at = clock_timestamp()")


async def _change(tx: Tx, kind: Lane[Any], lane: str, item_id: UUID, change: str, *arguments: Any) -> bool:
    locked = await tx.sql(
        """
        SELECT lane_id FROM lane
        WHERE kind = $1 AND tenant_id = $2 AND lane = $3
        FOR UPDATE
        """,
        kind.name,
        tx.tenant_id or "",
        lane,
    )
    if not locked:
        return False
    [(lane_id,)] = locked
    changed = await tx.sql(
        f"""
        UPDATE lane_item i SET {change}
        FROM lane l
        WHERE l.lane_id = $1 AND i.lane_id = $1 AND i.item_id = $2 AND i.state = 'waiting'
            AND (l.owner IS NULL OR i.seq > (SELECT seq FROM lane_head($1)))
        RETURNING l.owner
        """,
        lane_id,
        item_id,
        *arguments,
    )
    if changed and changed[0][0] is None:
        await tx.sql("SELECT lane_release($1)", lane_id)
        tx.woken.add(kind.name)
    return bool(changed)


async def restore(tx: Tx, item: NewItem) -> None:
    """Appends an item that became a dead letter to its lane, so that it is handled again."""
    await tx.sql(
        """
        DELETE FROM lane_item
        WHERE kind = $1 AND tenant_id = $2 AND item_id = $3 AND state <> 'waiting'
        """,
        item.kind,
        item.tenant_id,
        item.item_id,
    )
    tx.put(item)


async def waiting(tx: Tx) -> dict[str, tuple[int, float]]:
    """Kind → the number of items that wait, and for how many seconds the oldest one has been due."""
    rows = await tx.sql(
        """
        SELECT kind, count(*), greatest(extract(epoch FROM clock_timestamp() - min(not_before)), 0)::float8
        FROM lane_item
        WHERE state = 'waiting'
        GROUP BY kind
        """
    )
    return {kind: (count, oldest) for kind, count, oldest in rows}


async def forget(tx: Tx) -> None:
    """Deletes items that ended long ago, the lanes that are then empty, and old effects. At most 10,000 of each."""
    gone = await tx.sql(
        # Locks the items that it deletes; those that another process deletes are skipped.
        """
        DELETE FROM lane_item
        WHERE (lane_id, seq) IN (
            SELECT lane_id, seq FROM lane_item
            WHERE finished_at < clock_timestamp() - $1::interval
            ORDER BY finished_at
            LIMIT 10000
            FOR UPDATE SKIP LOCKED
        )
        RETURNING lane_id
        """,
        KEEP_ITEMS,
    )
    await tx.sql(
        # Locks the lanes in the order in which they are locked everywhere. A lane that gets an item at this moment has
        # a time in ready_at when the lock is granted, and stays.
        """
        WITH idle AS MATERIALIZED (
            SELECT lane_id FROM lane
            WHERE lane_id = ANY($1::bigint[]) AND ready_at IS NULL
            ORDER BY kind COLLATE "C", tenant_id, lane COLLATE "C"
            FOR UPDATE
        )
        DELETE FROM lane l USING idle
        WHERE l.lane_id = idle.lane_id AND l.ready_at IS NULL
            AND NOT EXISTS (SELECT FROM lane_item i WHERE i.lane_id = l.lane_id)
        """,
        list({lane_id for (lane_id,) in gone}),
    )
    await tx.sql(
        # Locks the effects that it deletes; those that another process deletes are skipped.
        """
        DELETE FROM lane_effect
        WHERE (tenant_id, key) IN (
            SELECT tenant_id, key FROM lane_effect
            WHERE started_at < clock_timestamp() - $1::interval
            ORDER BY started_at
            LIMIT 10000
            FOR UPDATE SKIP LOCKED
        )
        """,
        KEEP_EFFECTS,
    )
