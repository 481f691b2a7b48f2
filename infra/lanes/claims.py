"""How a process claims lanes, renews its claims, and wakes other processes. All times are by the database's clock.

This happens on a connection of its own: if the handlers use the whole pool, the leases are renewed nevertheless.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Collection, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import NamedTuple
from uuid import UUID

from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from infra.clock import uuid7
from infra.postgres.db import sql
from infra.postgres.tx import Tx

# Walks over the tenants that have lanes of the kind, from one tenant on, until enough of them have a ready lane. A
# tenant with ten thousand ready lanes is one step, and has as many turns as the others. Locks the lanes that it claims;
# skips lanes that are locked.
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


# The head of a lane is a suspect after so many recoveries: it may be the one that ends its processes.
SUSPECT_RECOVERIES = 3
# A lane that was claimed and not started is ready again after this time.
PASSED_ON_SECONDS = 1.0


class LaneLost(Exception):
    """The lane's lease ran out, and another process may hold the lane: all work for it must stop."""


@dataclass(eq=False)
class Lease:
    """One claim of a lane by this process."""

    kind: str
    tenant_id: str
    lane: str
    lane_id: int
    epoch: int
    until: float
    """The lease runs out at this time of the monotonic clock, or later."""
    given_back: bool = False
    """The transaction that gives the lane back is about to commit, or has committed. Then the lease needs no renewal,
    and a later claim of the same lane is not a loss."""

    def check(self) -> None:
        """Raises LaneLost if the lease may have run out, for example because the process was paused."""
        if time.monotonic() > self.until:
            raise LaneLost(f"lane {self.kind}: its lease ran out")

    async def fence(self, tx: Tx) -> None:
        """Locks the lane until the transaction ends. Raises LaneLost if another process holds it."""
        held = await tx.sql("SELECT 1 FROM lane WHERE lane_id = $1 AND epoch = $2 FOR UPDATE", self.lane_id, self.epoch)
        if not held:
            raise self.lost()

    def lost(self) -> LaneLost:
        return LaneLost(f"lane {self.kind}: another process holds it")


class LaneHead(NamedTuple):
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
    """The result of a claim."""

    lanes: list[tuple[Lease, LaneHead | None]]
    tenants: int
    """The number of tenants that have a lane which is ready."""
    due: float | None
    """Seconds until the next lane is ready, if known."""
    suspect: bool
    """The only lane is one whose head is a suspect."""
    taken_over: int
    """The number of lanes whose owner's lease had run out."""


class Claims:
    """Claims lanes for this process. `wake` is called with the kind if another process has more lanes than slots."""

    def __init__(self, engine: AsyncEngine, service: str, wake: Callable[[str], None], *, lease_seconds: float) -> None:
        self._engine = engine
        self._channel = f"claw_lanes_{service}"
        self._wake = wake
        self.lease_seconds = lease_seconds
        self.owner = uuid7()
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
                # Also after a cancellation: the connection may be in the middle of a statement.
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

    async def claim(
        self, kind: str, start: str, wanted: int, per_tenant: int, taken: Mapping[str, int], *, suspects: bool = True
    ) -> Claimed:
        """Claims up to `wanted` lanes, from the tenants in turn, beginning at the tenant id `start`.

        per_tenant: the most lanes that a tenant may have, those included that it has already (`taken`). A suspect comes
        alone, the one with the fewest recoveries, or not at all if this process has one already (`suspects` is false).
        If one item ends all its processes, the items beside it are suspects with it, and soon no other goes down.
        """
        until = time.monotonic() + self.lease_seconds
        async with self._use() as connection:
            rows = await sql(
                connection,
                _CLAIM,
                kind,
                start,
                wanted,
                self.owner,
                self.lease_seconds,
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
            recovered = [row[2] for row in rows if row[6]]
            if recovered:
                await sql(
                    connection,
                    """
                    UPDATE lane_item i SET recoveries = i.recoveries + 1 FROM unnest($1::bigint[]) AS r(lane_id),
                    lane_head(r.lane_id) h WHERE i.lane_id = r.lane_id AND i.seq = h.seq
                    """,
                    recovered,
                )
            heads: dict[int, LaneHead] = {}
            if leases:
                # A statement of its own: the claiming statement began before it had the locks, and may have seen a head
                # that the last owner finished meanwhile.
                heads = {
                    row[0]: LaneHead(*row[1:])
                    for row in await sql(
                        connection,
                        "SELECT c.lane_id, h.* FROM unnest((SELECT $1::bigint[])) AS c(lane_id), lane_head(lane_id) h",
                        list(leases),
                    )
                }
            found = [id_ for id_, head in heads.items() if head.recoveries >= SUSPECT_RECOVERIES]
            alone = min(found, key=lambda id_: heads[id_].recoveries) if found and suspects else None
            passed_on = set(found) if alone is None else leases.keys() - {alone}
            if passed_on:
                await self._pass_on(connection, [leases.pop(id_) for id_ in passed_on])
        claimed = [(lease, heads.get(id_)) for id_, lease in leases.items()]
        return Claimed(claimed, tenants or 0, due, alone is not None, len(recovered))

    async def _pass_on(self, connection: AsyncConnection, leases: Sequence[Lease]) -> None:
        """Gives back lanes that were claimed and not started, so that their heads are not recovered later."""
        await sql(
            connection,
            # Locks the lanes in the order in which they are locked everywhere.
            """
            WITH mine AS MATERIALIZED (
                SELECT lane_id FROM lane l
                JOIN unnest($1::bigint[], $2::bigint[]) AS h(lane_id, epoch) USING (lane_id, epoch)
                ORDER BY kind COLLATE "C", tenant_id, lane COLLATE "C"
                FOR UPDATE OF l
            )
            UPDATE lane l SET owner = NULL, ready_at = clock_timestamp() + make_interval(secs => $3)
            FROM mine
            WHERE l.lane_id = mine.lane_id
            """,
            *_columns([(lease.lane_id, lease.epoch) for lease in leases]),
            PASSED_ON_SECONDS,
        )

    async def renew(self, leases: Sequence[Lease]) -> list[Lease]:
        """Renews the leases. Returns those whose lane was claimed by another process."""
        # By claim: a lane that was given back and claimed again can be among the leases twice for a moment.
        by_claim = {(lease.lane_id, lease.epoch): lease for lease in leases}
        until = time.monotonic() + self.lease_seconds
        async with self._use() as connection:
            renewed = await sql(
                connection,
                # Locks the lanes of this process. Skips those that are locked: one long transaction must not cost all
                # other leases. Skips those without an owner: a lane that was given back meanwhile must stay as it is.
                """
                WITH mine AS (
                    SELECT lane_id FROM lane l
                    JOIN unnest($1::bigint[], $2::bigint[]) AS h(lane_id, epoch) USING (lane_id, epoch)
                    WHERE l.owner = $3
                    FOR UPDATE OF l SKIP LOCKED
                )
                UPDATE lane l SET ready_at = clock_timestamp() + make_interval(secs => $4)
                FROM mine
                WHERE l.lane_id = mine.lane_id
                RETURNING l.lane_id, l.epoch
                """,
                *_columns(by_claim),
                self.owner,
                self.lease_seconds,
            )
            for claim in renewed:
                by_claim.pop(claim).until = until
            if not by_claim:
                return []
            same = await sql(
                connection,
                """
                SELECT lane_id, epoch FROM lane
                JOIN unnest($1::bigint[], $2::bigint[]) AS h(lane_id, epoch) USING (lane_id, epoch)
                """,
                *_columns(by_claim),
            )
        return [lease for claim, lease in by_claim.items() if claim not in same]

    async def give_back(self, leases: Sequence[Lease]) -> None:
        """Gives the lanes back, so that other processes can claim them at once."""
        async with self._use() as connection:
            for lease in leases:
                await sql(
                    connection,
                    # Locks the lane, if this process still holds it: it must not be claimed between check and release.
                    """
                    SELECT lane_release(lane_id)
                    FROM (SELECT lane_id FROM lane WHERE lane_id = $1 AND epoch = $2 AND owner = $3 FOR UPDATE) l
                    """,
                    lease.lane_id,
                    lease.epoch,
                    self.owner,
                )

    async def call_others(self, kind: str) -> None:
        """Wakes the other processes: there are more lanes than this one can take. They may miss it."""
        async with self._use() as connection:
            await sql(connection, "SELECT pg_notify($1, $2)", self._channel, kind)


def next_tenant_id(tenant_id: str) -> str:
    """The first tenant id behind `tenant_id`, in the order of bytes: the next claim begins there."""
    return tenant_id + "\x01"


def _columns(claims: Collection[tuple[int, int]]) -> tuple[list[int], list[int]]:
    """The lane ids and epochs, as two columns in one order."""
    return [lane_id for lane_id, _ in claims], [epoch for _, epoch in claims]
