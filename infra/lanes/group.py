"""Group commit for lanes: what many lanes write at the same moment shares a transaction."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from typing import NamedTuple
from uuid import UUID

from sqlalchemy.ext.asyncio import AsyncConnection

from infra.errors import Transient
from infra.lanes.claims import LaneLost, Lease
from infra.postgres.db import is_transient, sql
from infra.postgres.group_commit import GroupCommit
from infra.postgres.tx import CONFLICT_ATTEMPTS, Database, Tx

LARGEST_GROUP = 500
# In the order in which lanes are locked everywhere.
_LOCK = """
    ORDER BY lane.kind COLLATE "C", lane.tenant_id, lane.lane COLLATE "C"
    FOR UPDATE OF lane
"""


class ForbiddenByGuard(Exception):
    """The guard's statement forbids this write now."""


class _Lost(Exception):
    """A lane went to another process while the group was written: it is written again without that lane's part."""


class _Write(NamedTuple):
    """What one lane writes about `about`."""

    lease: Lease
    tx: Tx
    about: UUID
    may_be_forbidden: bool
    """The write is left out if the guard says so."""


class Group:
    """Commits the writes of a process's lanes in groups.

    `guard` is a statement that locks the rows of the ids ``$1`` in one order, and returns each id and whether writes
    about it are forbidden now. Locks are taken as everywhere else: first the guard's rows, then streams, then lanes.
    """

    def __init__(self, database: Database, guard: str) -> None:
        self._database = database
        self._guard = guard
        self._commits = GroupCommit(self._commit, largest=LARGEST_GROUP)

    def buffered(self, tenant_id: str) -> Tx:
        """A transaction that only collects events, messages and rows. It never takes a connection."""
        return Tx(self._database.engine, self._database.service, tenant_id=tenant_id or None, cause=None)

    async def write(self, lease: Lease, tx: Tx, about: UUID, *, may_be_forbidden: bool = False) -> None:
        """Commits what `tx` has collected, if this process still holds the lane. Commits it once, after however many
        attempts.

        Raises LaneLost, ForbiddenByGuard, Conflict if a stream has moved on, and Transient if the database does not
        come back in time.
        """
        # The messages made from its events belong to the trace in which they were written.
        tx.publish_now()
        await self._commits.write(_Write(lease, tx, about, may_be_forbidden))

    async def _commit(self, group: Sequence[_Write]) -> Mapping[int, Exception]:
        for attempt in range(1, CONFLICT_ATTEMPTS + 1):
            try:
                return await self._try(group)
            except _Lost:
                continue
            except Exception as error:
                # A result that is not recorded now is lost, and its call would be made again.
                if attempt == CONFLICT_ATTEMPTS or not is_transient(error):
                    raise
                await asyncio.sleep(0.05 * 2**attempt)
        raise Transient("lanes lost repeatedly during group commit")

    async def _try(self, group: Sequence[_Write]) -> dict[int, Exception]:
        """Commits the writes that are allowed, and returns the errors of the others by their index."""
        refused: dict[int, Exception] = {}
        async with self._database.begin() as tx:
            connection = await tx.connection()
            guarded = await sql(connection, self._guard, [write.about for write in group])
            forbidden = {UUID(str(id_)) for id_, is_forbidden in guarded if is_forbidden}
            held = await self._held(connection, group, "")
            for index, write in enumerate(group):
                if (write.lease.lane_id, write.lease.epoch) not in held:
                    refused[index] = LaneLost(f"lane {write.lease.kind}: another process holds it")
                elif write.may_be_forbidden and write.about in forbidden:
                    refused[index] = ForbiddenByGuard()
            written = [write for index, write in enumerate(group) if index not in refused]
            await tx.merge([write.tx for write in written])
            await tx.flush()
            if await self._held(connection, written, _LOCK) != {
                (write.lease.lane_id, write.lease.epoch) for write in written
            }:
                raise _Lost
        return refused

    async def _held(self, connection: AsyncConnection, group: Sequence[_Write], lock: str) -> set[tuple[int, int]]:
        rows = await sql(
            connection,
            f"""
            SELECT lane_id, epoch
            FROM lane
            JOIN unnest($1::bigint[], $2::bigint[]) AS h(lane_id, epoch) USING (lane_id, epoch)
            {lock}
            """,
            [write.lease.lane_id for write in group],
            [write.lease.epoch for write in group],
        )
        return {(lane_id, epoch) for lane_id, epoch in rows}
