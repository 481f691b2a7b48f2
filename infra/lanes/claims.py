"""A process's hold on lanes: claims, renewals and wake-ups, by the database's clock.

On a connection of its own: handlers that fill the pool must not keep the leases from being renewed.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import NamedTuple
from uuid import UUID

from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from infra.clock import uuid7
from infra.postgres.db import sql
from infra.postgres.tx import Tx

# Walks the tenants that have anything in lanes of the kind, from one on, until enough of them have a lane to take: a
# tenant with ten thousand ready lanes is one step, and has as many turns as the others.
_CLAIM = """
WITH RECURSIVE walk AS (
    (SELECT tenant_id, ready_at, (ready_at <= now())::int AS found FROM lane
     WHERE kind = $1 AND tenant_id >= $2 AND ready_at IS NOT NULL AND tenant_id <> ALL($9::text[])
     ORDER BY tenant_id, ready_at LIMIT 1)
    UNION ALL
    SELECT n.tenant_id, n.ready_at, walk.found + (n.ready_at <= now())::int FROM walk CROSS JOIN LATERAL
    (SELECT tenant_id, ready_at FROM lane WHERE kind = $1 AND tenant_id > walk.tenant_id AND ready_at IS NOT NULL
     AND tenant_id <> ALL($9::text[]) ORDER BY tenant_id, ready_at LIMIT 1) n WHERE walk.found < $3::int
), picked AS (
    SELECT p.lane_id, p.recovered FROM walk CROSS JOIN LATERAL (
        SELECT lane_id, owner IS NOT NULL AS recovered FROM lane
        WHERE kind = $1 AND tenant_id = walk.tenant_id AND ready_at <= now() ORDER BY ready_at
        LIMIT (SELECT least(ceil($3::int / greatest(max(found), 1)::float8)::bigint, greatest($6::int - coalesce((
            SELECT taken FROM unnest($7::text[], $8::int[]) AS has(tenant_id, taken)
            WHERE has.tenant_id = walk.tenant_id), 0), 0)) FROM walk w) FOR UPDATE SKIP LOCKED
    ) p WHERE walk.ready_at <= now() LIMIT $3::int
), claimed AS (
    UPDATE lane l SET owner = $4, epoch = l.epoch + 1, ready_at = clock_timestamp() + make_interval(secs => $5)
    FROM picked p WHERE l.lane_id = p.lane_id RETURNING l.lane_id, l.tenant_id, l.lane, l.epoch, p.recovered
)
SELECT walked.*, claimed.* FROM (
    SELECT max(found), extract(epoch FROM min(ready_at) FILTER (WHERE ready_at > now()) - now())::float8 FROM walk
) walked LEFT JOIN claimed ON true ORDER BY claimed.tenant_id
"""


class LaneLost(Exception):
    """The lane's lease ran out and another process may have it: whatever is under way for it must stop."""


@dataclass
class Lease:
    """A lane that this process has. `until`: how long at least, by the monotonic clock."""

    kind: str
    tenant_id: str
    lane: str
    lane_id: int
    epoch: int
    until: float

    def check(self) -> None:
        """Raises LaneLost where the lease may have run out, as in a process that was stopped and woke up."""
        if time.monotonic() > self.until:
            raise LaneLost(f"lane {self.kind}: its lease ran out")

    async def fence(self, tx: Tx) -> None:
        """Locks the lane for the rest of the transaction. Raises LaneLost where it is in other hands."""
        held = await tx.sql("SELECT 1 FROM lane WHERE lane_id = $1 AND epoch = $2 FOR UPDATE", self.lane_id, self.epoch)
        if not held:
            raise LaneLost(f"lane {self.kind}: another process has it")


class Head(NamedTuple):
    """The first item of a lane, as the SQL function `lane_head` returns it."""

    seq: int
    item_id: UUID
    body: bytes
    headers: str
    attempts: int
    faults: int
    recoveries: int
    age: timedelta
    expired: bool
    due: bool
    expires_in: timedelta | None


class Claimed(NamedTuple):
    """What a claim found. `tenants`: with something to take; `due`: seconds until there is more, if known."""

    lanes: list[tuple[Lease, Head | None]]
    tenants: int
    due: float | None


class Claims:
    """Claims lanes for this process. `wake` is called with the kind when another process has more than it can take."""

    def __init__(self, engine: AsyncEngine, service: str, wake: Callable[[str], None], *, lease_seconds: float) -> None:
        self._engine = engine
        self._channel = f"claw_lanes_{service}"
        self._wake = wake
        self._lease_seconds = lease_seconds
        self._owner = uuid7()
        self._connection: AsyncConnection | None = None
        self._lock = asyncio.Lock()

    @asynccontextmanager
    async def _use(self) -> AsyncIterator[AsyncConnection]:
        async with self._lock:
            if self._connection is None:
                self._connection = await self._connect()
            connection = self._connection
            try:
                yield connection
            except BaseException:
                # Also a cancellation: what the connection is in the middle of is not known.
                self._connection = None
                await connection.invalidate()
                await connection.close()
                raise

    async def _connect(self) -> AsyncConnection:
        connection = await self._engine.connect()
        await connection.execution_options(isolation_level="AUTOCOMMIT")
        raw = (await connection.get_raw_connection()).driver_connection
        assert raw is not None
        await raw.add_listener(self._channel, lambda _connection, _pid, _channel, kind: self._wake(kind))
        return connection

    async def close(self) -> None:
        async with self._lock:
            if self._connection is not None:
                await self._connection.invalidate()
                await self._connection.close()
                self._connection = None

    async def claim(self, kind: str, start: str, wanted: int, per_tenant: int, taken: Mapping[str, int]) -> Claimed:
        """Takes up to `wanted` lanes, tenants in turn, beginning with the first one from `start` on.

        per_tenant: so many at most of each, with those that it has, `taken`.
        """
        until = time.monotonic() + self._lease_seconds
        async with self._use() as connection:
            rows = await sql(
                connection,
                _CLAIM,
                kind,
                start,
                wanted,
                self._owner,
                self._lease_seconds,
                per_tenant,
                list(taken),
                list(taken.values()),
                [tenant for tenant, count in taken.items() if count >= per_tenant],
            )
            tenants, due = rows[0][:2]
            leases = {
                lane_id: Lease(kind, tenant_id, lane, lane_id, epoch, until)
                for _, _, lane_id, tenant_id, lane, epoch, _ in rows
                if lane_id is not None
            }
            if recovered := [row[2] for row in rows if row[6]]:
                await sql(
                    connection,
                    "UPDATE lane_item i SET recoveries = i.recoveries + 1 FROM unnest($1::bigint[]) AS r(lane_id), "
                    "lane_head(r.lane_id) h WHERE i.lane_id = r.lane_id AND i.seq = h.seq",
                    recovered,
                )
            heads: dict[int, Head] = {}
            if leases:
                # A statement of its own: the one that claimed began before it had the locks, and may have seen a
                # head that the former owner finished meanwhile.
                heads = {
                    row[0]: Head(*row[1:])
                    for row in await sql(
                        connection,
                        "SELECT c.lane_id, h.* FROM unnest($1::bigint[]) AS c(lane_id), lane_head(c.lane_id) h",
                        list(leases),
                    )
                }
        return Claimed([(lease, heads.get(id_)) for id_, lease in leases.items()], tenants or 0, due)

    async def renew(self, leases: Sequence[Lease]) -> list[Lease]:
        """Renews; returns those that another process has meanwhile."""
        by_id = {lease.lane_id: lease for lease in leases}
        until = time.monotonic() + self._lease_seconds
        held = [list(by_id), [lease.epoch for lease in by_id.values()]]
        async with self._use() as connection:
            renewed = await sql(
                connection,
                # Passing over rows that are locked: one long transaction must not cost all the other leases. And
                # only what has an owner: a lane given back meanwhile is to stay as it is.
                "WITH mine AS (SELECT lane_id FROM lane l JOIN unnest($1::bigint[], $2::bigint[]) AS h(lane_id, epoch) "
                "USING (lane_id, epoch) WHERE l.owner = $3 FOR UPDATE OF l SKIP LOCKED) "
                "UPDATE lane l SET ready_at = clock_timestamp() + make_interval(secs => $4) FROM mine "
                "WHERE l.lane_id = mine.lane_id RETURNING l.lane_id",
                *held,
                self._owner,
                self._lease_seconds,
            )
            for (lane_id,) in renewed:
                by_id.pop(lane_id).until = until
            if not by_id:
                return []
            same = await sql(
                connection,
                "SELECT lane_id FROM lane JOIN unnest($1::bigint[], $2::bigint[]) AS h(lane_id, epoch) "
                "USING (lane_id, epoch)",
                list(by_id),
                [lease.epoch for lease in by_id.values()],
            )
        return [lease for id_, lease in by_id.items() if (id_,) not in same]

    async def give_back(self, leases: Sequence[Lease]) -> None:
        """Lets others take these lanes at once."""
        async with self._use() as connection:
            for lease in leases:
                await sql(
                    connection,
                    "SELECT lane_release(lane_id) FROM (SELECT lane_id FROM lane WHERE lane_id = $1 AND epoch = $2 "
                    "AND owner = $3 FOR UPDATE) l",
                    lease.lane_id,
                    lease.epoch,
                    self._owner,
                )

    async def call_others(self, kind: str) -> None:
        """Wakes the other processes: there is more than this one can take. They may not hear it."""
        async with self._use() as connection:
            await sql(connection, "SELECT pg_notify($1, $2)", self._channel, kind)


def after(tenant_id: str) -> str:
    """The first tenant id behind `tenant_id`, by bytes: where the next claim starts."""
    return tenant_id + "\x01"
