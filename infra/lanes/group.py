"""Group commit: what many lanes write at the same moment shares a transaction, and so a flush of the disk.

While one group commits the next one gathers. Alone, a write is a group of one and waits for nobody.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from uuid import UUID

from sqlalchemy.ext.asyncio import AsyncConnection

from infra.errors import Transient
from infra.lanes.claims import LaneLost, Lease
from infra.postgres.db import is_transient, sql
from infra.postgres.tx import CONFLICT_ATTEMPTS, Database, Tx

MAX_GROUP = 500


class Forbidden(Exception):
    """The write was one that the guard forbids."""


class _Lost(Exception):
    """A lane went to another process while the group was written: it is written again without that lane's part."""


@dataclass(eq=False)
class _Write:
    """What one lane writes about `about`. may_be_forbidden: it is left out where the guard says so."""

    lease: Lease
    tx: Tx
    about: UUID
    may_be_forbidden: bool
    done: asyncio.Future[None] = field(default_factory=lambda: asyncio.get_running_loop().create_future())


class Group:
    """Commits of one process, in groups. `guard`: a statement that locks the rows of the ids ``$1``, in one order, and
    returns each id and whether writes about it are forbidden now.

    Locks are taken as everywhere: the guard's rows, streams, lanes.
    """

    def __init__(self, database: Database, guard: str) -> None:
        self._database = database
        self._guard = guard
        self._waiting: deque[_Write] = deque()
        self._working: asyncio.Task[None] | None = None

    def buffered(self, tenant_id: str) -> Tx:
        """A transaction to collect in: events, messages, rows. It is never used itself."""
        return Tx(self._database.engine, self._database.service, tenant_id=tenant_id or None, cause=None)

    async def write(self, lease: Lease, tx: Tx, about: UUID, *, may_be_forbidden: bool = False) -> None:
        """Commits what `tx` has collected, while this process has the lane; once, however often it has to be tried.

        Raises LaneLost, Forbidden where the guard says so, Conflict where a stream has moved on, Transient where the
        database does not come back in time.
        """
        # What its events tell the world belongs to the trace in which they were written.
        tx.publish_now()
        write = _Write(lease, tx, about, may_be_forbidden)
        self._waiting.append(write)
        if self._working is None:
            self._working = asyncio.create_task(self._work())
        await write.done

    async def _work(self) -> None:
        try:
            while self._waiting:
                group = [self._waiting.popleft() for _ in range(min(len(self._waiting), MAX_GROUP))]
                await self._commit(group)
        finally:
            self._working = None

    async def _commit(self, group: Sequence[_Write]) -> None:
        for attempt in range(CONFLICT_ATTEMPTS):
            try:
                refused = await self._try(group)
            except _Lost:
                continue
            except Exception as error:
                if is_transient(error) and attempt < CONFLICT_ATTEMPTS - 1:
                    # What is not recorded now is not known later.
                    await asyncio.sleep(0.1 * 2**attempt)
                    continue
                if len(group) > 1:
                    # One of them does not go in. The others must not suffer for it.
                    for write in group:
                        await self._commit([write])
                    return
                refused = {group[0]: error}
            break
        else:
            refused = {write: Transient("lanes change hands too fast") for write in group}
        for write in group:
            if write.done.done():
                continue  # whoever wrote has gone; it is written all the same
            if error_of := refused.get(write):
                write.done.set_exception(error_of)
            else:
                write.done.set_result(None)

    async def _try(self, group: Sequence[_Write]) -> dict[_Write, Exception]:
        """Commits those that may be, and returns why the others may not."""
        refused: dict[_Write, Exception] = {}
        async with self._database.begin() as tx:
            connection = await tx.connection()
            guarded = await sql(connection, self._guard, [write.about for write in group])
            forbidden = {UUID(str(id_)) for id_, is_forbidden in guarded if is_forbidden}
            held = await self._held(connection, group, "")
            for write in group:
                if (write.lease.lane_id, write.lease.epoch) not in held:
                    refused[write] = LaneLost(f"lane {write.lease.kind}: another process has it")
                elif write.may_be_forbidden and write.about in forbidden:
                    refused[write] = Forbidden()
            written = [write for write in group if write not in refused]
            await tx.merge([write.tx for write in written])
            await tx.flush()
            if await self._held(connection, written, "ORDER BY lane_id FOR UPDATE OF lane") != {
                (write.lease.lane_id, write.lease.epoch) for write in written
            }:
                raise _Lost
        return refused

    async def _held(self, connection: AsyncConnection, group: Sequence[_Write], lock: str) -> set[tuple[int, int]]:
        rows = await sql(
            connection,
            "SELECT lane_id, epoch FROM lane JOIN unnest($1::bigint[], $2::bigint[]) AS h(lane_id, epoch) "
            f"USING (lane_id, epoch) {lock}",
            [write.lease.lane_id for write in group],
            [write.lease.epoch for write in group],
        )
        return {(lane_id, epoch) for lane_id, epoch in rows}
