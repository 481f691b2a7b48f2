"""Lanes: work that is long, ordered or delayed. One item of a lane at a time, head first, across all processes.

A lane is a row in PostgreSQL under a lease with an epoch; its items are rows behind it. Here is how a service
declares a lane and puts items into it; `infra.lanes.runner` works them off.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any, Generic
from uuid import UUID

from infra.postgres.lane_items import Item, NewItem, insert_items
from infra.postgres.tx import Tx

Handler = Callable[..., Awaitable[None]]
Expired = Callable[[Any, Tx], Awaitable[None]]
Dead = Callable[..., Awaitable[None]]

RETRIES = tuple(timedelta(seconds=seconds) for seconds in (1, 5, 30, 120))
# How long an item that is over keeps its id, so that the same id is not enqueued again.
KEEP_ITEMS = timedelta(days=7)
# How long the ledger of effects remembers. A dead letter of a lane is not redriven later: it could repeat one.
KEEP_EFFECTS = timedelta(days=30)


@dataclass(frozen=True)
class Lane(Generic[Item]):
    """A kind of lane, and the type of its items.

    `retries`: the delay before each further attempt of an item whose handler failed by a fault; then it is a dead
    letter. What passes by itself (`Transient`, `RetryLater`, the database away) is tried until the item expires.
    """

    name: str
    item: type[Item]
    retries: tuple[timedelta, ...] = RETRIES

    def runner(
        self,
        *,
        concurrency: int,
        per_tenant: int | None = None,
        expired: Expired | None = None,
        dead: Dead | None = None,
    ) -> Callable[[Handler], Work]:
        """The handler takes ``(item, effects, tx)``; `tx` commits together with the item's completion.

        `concurrency`: lanes at a time per process; `per_tenant`: of them of one tenant, so that what is long does not
        keep all others waiting. `expired`: takes ``(item, tx)`` for an item that came too late,
        instead of the handler. `dead`: takes ``(item, error, tx)``, which commits together with the dead letter that
        the item becomes.
        """
        return lambda handler: Work(self, handler, concurrency, per_tenant or concurrency, expired, dead)


@dataclass(frozen=True)
class Work:
    """Who works off a kind of lane. Passed to ``service.work``."""

    lane: Lane[Any]
    handler: Handler
    concurrency: int
    per_tenant: int
    expired: Expired | None = None
    dead: Dead | None = None


async def postpone(tx: Tx, kind: Lane[Any], lane: str, item_id: UUID, not_before: datetime) -> bool:
    """Moves the time from which a waiting item may be done. False where it has begun or is over: too late."""
    return await _change(tx, kind, lane, item_id, "not_before = $3", not_before)


async def cancel(tx: Tx, kind: Lane[Any], lane: str, item_id: UUID) -> bool:
    """Takes a waiting item out of its lane. False where it has begun or is over: too late."""
    return await _change(tx, kind, lane, item_id, "state = 'cancelled', body = NULL, finished_at = clock_timestamp()")


async def _change(tx: Tx, kind: Lane[Any], lane: str, item_id: UUID, change: str, *arguments: Any) -> bool:
    locked = await tx.sql(
        "SELECT lane_id FROM lane WHERE kind = $1 AND tenant_id = $2 AND lane = $3 FOR UPDATE",
        kind.name,
        tx.tenant_id or "",
        lane,
    )
    if not locked:
        return False
    [(lane_id,)] = locked
    changed = await tx.sql(
        f"UPDATE lane_item i SET {change} FROM lane l WHERE l.lane_id = $1 AND i.lane_id = $1 AND i.item_id = $2 "
        "AND i.state = 'waiting' AND (l.owner IS NULL OR i.seq > (SELECT seq FROM lane_head($1))) RETURNING l.owner",
        lane_id,
        item_id,
        *arguments,
    )
    if changed and changed[0][0] is None:
        await tx.sql("SELECT lane_release($1)", lane_id)
        tx.woken.add(kind.name)
    return bool(changed)


async def restore(tx: Tx, item: NewItem) -> None:
    """Puts an item that was set aside as a dead letter at the end of its lane, to be done again."""
    await tx.sql(
        "DELETE FROM lane_item WHERE kind = $1 AND tenant_id = $2 AND item_id = $3 AND state <> 'waiting'",
        item.kind,
        item.tenant_id,
        item.item_id,
    )
    await insert_items(await tx.connection(), [item])
    tx.woken.add(item.kind)


async def waiting(tx: Tx) -> dict[str, tuple[int, float]]:
    """Kind → how many items are not done, and for how many seconds the oldest has been due."""
    rows = await tx.sql(
        "SELECT kind, count(*), greatest(extract(epoch FROM clock_timestamp() - min(not_before)), 0)::float8 "
        "FROM lane_item WHERE state = 'waiting' GROUP BY kind"
    )
    return {kind: (count, oldest) for kind, count, oldest in rows}


async def forget(tx: Tx) -> None:
    """Deletes what has been over for long enough: items, the lanes they leave empty, effects. A part at a time."""
    gone = await tx.sql(
        "DELETE FROM lane_item WHERE (lane_id, seq) IN (SELECT lane_id, seq FROM lane_item WHERE finished_at < "
        "clock_timestamp() - $1::interval ORDER BY finished_at LIMIT 10000 FOR UPDATE SKIP LOCKED) RETURNING lane_id",
        KEEP_ITEMS,
    )
    await tx.sql(
        # One that gets an item at this moment has a time in ready_at when the lock is granted, and stays.
        "DELETE FROM lane l WHERE lane_id = ANY($1::bigint[]) AND ready_at IS NULL "
        "AND NOT EXISTS (SELECT FROM lane_item i WHERE i.lane_id = l.lane_id)",
        list({lane_id for (lane_id,) in gone}),
    )
    await tx.sql(
        "DELETE FROM lane_effect WHERE (tenant_id, key) IN (SELECT tenant_id, key FROM lane_effect "
        "WHERE started_at < clock_timestamp() - $1::interval ORDER BY started_at LIMIT 10000 FOR UPDATE SKIP LOCKED)",
        KEEP_EFFECTS,
    )
