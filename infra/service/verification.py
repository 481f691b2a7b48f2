"""Verifies the read models that a service writes itself, and repairs them, while the service runs.

One batch of scopes is compared in one snapshot. The position is committed with each batch, so that a verification that
was stopped or killed goes on there. A repair locks the table for one batch: it waits for the transactions that have
written to the table, and each later one waits for the repair and then sees the repaired rows.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from datetime import datetime
from typing import Any

import msgspec
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from infra.errors import Conflict
from infra.failpoint import failpoint
from infra.postgres.db import is_transient, sql
from infra.postgres.read_models import Comparison, ReadModel, RowDifference, compare, repair

SHOWN = 100
"""So many differences are kept; all are counted."""
# A transaction that holds the table for longer makes the repair try again: all writers wait behind the repair.
LOCK_TIMEOUT = "3s"
LOCK_ATTEMPTS = 10

Progress = Callable[[int, int], None]
"""Called with the number of compared scopes and the number of all scopes."""


class VerificationResult(msgspec.Struct):
    """The result of a verification so far."""

    model: str
    rows: int = 0
    """Of the live table."""
    rebuilt_rows: int = 0
    live_hash: str = "0"
    rebuilt_hash: str = "0"
    different: int = 0
    repaired: int = 0
    differences: list[RowDifference] = []
    scopes: int = 0
    cursor: str = ""
    finished: bool = False

    @property
    def left(self) -> int:
        """Rows that differ and were not repaired."""
        return self.different - self.repaired

    def add(self, scopes: Sequence[str], found: Comparison, *, left: int) -> None:
        self.rows += found.live_rows
        self.rebuilt_rows += found.rebuilt_rows
        self.live_hash = str(int(self.live_hash) + found.live_hash)
        self.rebuilt_hash = str(int(self.rebuilt_hash) + found.rebuilt_hash)
        self.different += len(found.differences)
        self.repaired += len(found.differences) - left
        self.differences = [*self.differences, *found.differences][:SHOWN]
        self.scopes += len(scopes)


class LastVerification(msgspec.Struct, frozen=True):
    """The facts about a read model that are known without comparing it."""

    verified_at: datetime | None = None
    compared: int | None = None
    different: int | None = None
    under_way: int | None = None
    """Scopes that a verification under way, or a paused one, has compared; None: there is none."""


async def verify(
    engine: AsyncEngine,
    service: str,
    model: ReadModel,
    *,
    switch: bool = False,
    restart: bool = False,
    progress: Progress = lambda done, total: None,
    stopping: asyncio.Event | None = None,
) -> VerificationResult:
    """Compares the read model with its source. `engine` finds the service's tables by its search path.

    switch: repairs the rows that differ. restart: from the beginning, also if a verification was paused. If `stopping`
    is set, it pauses and returns an unfinished result. Raises Conflict if another verification of the service runs, or
    if the table is always locked.
    """
    async with one_at_a_time(engine, service):
        async with engine.begin() as connection:
            state = None if restart else await paused(connection, model.name, switch=switch)
            state = state or VerificationResult(model.name)
            [(total,)] = await sql(connection, model.total)
        while not state.finished and not (stopping and stopping.is_set()):
            state = await _next(engine, model, state, switch=switch)
            progress(state.scopes, max(total, state.scopes))
    return state


async def last(connection: AsyncConnection) -> dict[str, LastVerification]:
    """The service's read models that were verified before, by name."""
    rows = await sql(connection, "SELECT name, verified_at, compared, different, progress FROM read_model")
    return {
        name: LastVerification(
            at, compared, different, msgspec.json.decode(paused, type=VerificationResult).scopes if paused else None
        )
        for name, at, compared, different, paused in rows
    }


async def store(connection: AsyncConnection, name: str, compared: int, different: int) -> None:
    """Stores the result of a finished verification."""
    await sql(
        connection,
        """
        INSERT INTO read_model (name, verified_at, compared, different) VALUES ($1, clock_timestamp(), $2, $3)
        ON CONFLICT (name) DO UPDATE
        SET verified_at = excluded.verified_at, compared = excluded.compared, different = excluded.different,
            progress = NULL
        """,
        name,
        compared,
        different,
    )


async def _next(
    engine: AsyncEngine, model: ReadModel, before: VerificationResult, *, switch: bool
) -> VerificationResult:
    """Compares one batch, and commits the new position with it."""
    async with engine.begin() as connection:
        await sql(connection, "SET TRANSACTION ISOLATION LEVEL REPEATABLE READ")
        await _no_limits(connection)
        rows = await sql(connection, model.scopes, before.cursor, model.batch)
        is_last = not rows
        # Rows without a source come last.
        scopes = [scope for (scope,) in rows or await sql(connection, model.strays, model.batch)]
        found = await compare(connection, model, scopes)
        after = msgspec.structs.replace(before, cursor=before.cursor if is_last else scopes[-1], finished=is_last)
        if not (switch and found.differences):
            after.add(scopes, found, left=len(found.differences))
            await save(connection, after)
            failpoint("before_verified_batch")
    if switch and found.differences:
        for attempt in range(1, LOCK_ATTEMPTS + 1):
            try:
                return await _repair(engine, model, scopes, after)
            except DBAPIError as error:
                if not is_transient(error) or error.connection_invalidated:
                    raise
                if attempt == LOCK_ATTEMPTS:
                    raise Conflict(f"table {model.table} is in use by long transactions; try later") from error
    failpoint("after_verified_batch")
    return after


async def _repair(
    engine: AsyncEngine, model: ReadModel, scopes: Sequence[str], after: VerificationResult
) -> VerificationResult:
    after = msgspec.structs.replace(after)
    async with engine.begin() as connection:
        await sql(connection, f"SET LOCAL lock_timeout = '{LOCK_TIMEOUT}'")
        # The first lock of the transaction: those who hold the table and wait for others are not waited for with a
        # lock in hand. This mode blocks FOR UPDATE too: the repair cannot wait for a row whose holder waits here.
        await sql(connection, f'LOCK TABLE "{model.table}" IN EXCLUSIVE MODE')
        await _no_limits(connection)
        # Compared again: a row that differs may have changed since the snapshot.
        found = await compare(connection, model, scopes)
        await repair(connection, model, scopes)
        left = await compare(connection, model, scopes)
        after.add(scopes, found, left=len(left.differences))
        await save(connection, after)
        failpoint("before_repair_commit")
    failpoint("after_repair_commit")
    return after


async def save(connection: AsyncConnection, state: VerificationResult) -> None:
    """Stores the position of a verification, or its result if it is finished."""
    if state.finished:
        await store(connection, state.model, state.rows, state.left)
        return
    await sql(
        connection,
        """
        INSERT INTO read_model (name, progress) VALUES ($1, $2)
        ON CONFLICT (name) DO UPDATE SET progress = excluded.progress
        """,
        state.model,
        msgspec.json.encode(state).decode(),
    )


async def paused(connection: AsyncConnection, name: str, *, switch: bool) -> VerificationResult | None:
    """The verification of this read model that was interrupted. None: there is none to go on with, because it has
    passed rows that a `switch` has to repair."""
    rows = await sql(connection, "SELECT progress FROM read_model WHERE name = $1", name)
    state = msgspec.json.decode(rows[0][0], type=VerificationResult) if rows and rows[0][0] else None
    return None if state and switch and state.left else state


async def _no_limits(connection: AsyncConnection) -> None:
    """A large tenant's sums may take longer than a statement of a request may."""
    for limit in ("statement_timeout", "transaction_timeout"):
        await sql(connection, f"SET LOCAL {limit} = 0")


@asynccontextmanager
async def one_at_a_time(engine: AsyncEngine, service: str) -> AsyncIterator[None]:
    """Allows one verification of the service at a time, in all its processes."""
    async with engine.connect() as connection:
        lock: Any = f"verification {service}"
        [(mine,)] = await sql(connection, "SELECT pg_try_advisory_lock(hashtextextended($1, 0))", lock)
        await connection.commit()  # the lock belongs to the session, so no transaction needs to stay open
        if not mine:
            raise Conflict(f"another verification of {service} is running")
        try:
            yield
        finally:
            await sql(connection, "SELECT pg_advisory_unlock(hashtextextended($1, 0))", lock)
            await connection.commit()
