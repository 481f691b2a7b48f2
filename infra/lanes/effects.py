"""Effects in the outside world: their start is recorded before the call, and their end right after it.

*started* is committed, the call is made outside of any transaction, and its end is committed at once. The item's own
transaction comes later and uses the recorded end. A process that dies in between leaves *started*, and the kind of the
effect decides if the next attempt may call again.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Generic, Literal, NamedTuple, TypeVar
from uuid import NAMESPACE_OID, UUID, uuid5

import msgspec

from infra.errors import Conflict, EffectFailed, InDoubt, Transient, describe
from infra.failpoint import failpoint
from infra.lanes.claims import LaneHead, Lease
from infra.observe.metrics import Metrics
from infra.observe.redaction import redacted
from infra.postgres.database import CONFLICT_ATTEMPTS, Database
from infra.postgres.db import is_transient, storable
from infra.postgres.tx import Tx

R = TypeVar("R")

Kind = Literal["repeatable", "keyed", "once"]
"""repeatable: it may happen twice (a read, a model call). keyed: the other side takes our idempotency key, and does it
once. once: neither, so a call whose end is not known is not made again.
"""

Before = Callable[[Tx, int, bool], Awaitable[None]]
"""Takes the attempt, from 1, and True if the end of the attempt before is not known."""


@dataclass(frozen=True)
class Outcome(Generic[R]):
    """How an effect ended. `saved`: an earlier call ended so, none was made now. `result`: None unless succeeded."""

    state: Literal["succeeded", "failed", "unknown"]
    result: R | None
    error: str | None
    attempt: int
    saved: bool


class _Begun(NamedTuple):
    """An attempt that was recorded."""

    attempt: int
    in_doubt: bool
    """An attempt before may have had its effect."""


class ItemEnded(NamedTuple):
    """A handler returns this if it has ended its item by the SQL function `lane_finish` in a transaction of its own."""

    next: LaneHead | None
    """The next item of the lane, if it is to be done at once; None if the lane was given back."""


class Effects:
    """The means of an item's handler to act outside of the database.

    `attempt`: which one of the item this is, from 1. `seq` and `may_go_on` are for a handler that ends its item itself:
    the item's place in its lane, and whether the next item may follow at once.
    """

    def __init__(
        self,
        database: Database,
        lease: Lease,
        tx: Tx,
        metrics: Metrics,
        *,
        item_id: UUID,
        attempt: int,
        seq: int,
        may_go_on: bool,
    ) -> None:
        self._database = database
        self._lease = lease
        self._tx = tx
        self._metrics = metrics
        self.item_id = item_id
        self.attempt = attempt
        self.seq = seq
        self.may_go_on = may_go_on

    @asynccontextmanager
    async def begin(self) -> AsyncIterator[Tx]:
        """A transaction that commits by itself, before the item's, and only while this process has the lane.

        Raises RuntimeError once the item's own transaction is in use: it would be held open over this one.
        """
        self._check_order()
        async with self._database.begin(tenant_id=self._lease.tenant_id or None) as tx:
            yield tx
            await tx.flush()
            await self._lease.fence(tx)

    def _check_order(self) -> None:
        if self._tx.in_use:
            raise RuntimeError("effects come before the first use of the item's tx")

    def reading(self) -> AbstractAsyncContextManager[Tx]:
        """For reads before the item's transaction, each statement for itself. The lane is not checked: the effect or
        the transaction that follows does it."""
        return self._database.read_only(tenant_id=self._lease.tenant_id)

    async def run(
        self,
        key: str | UUID,
        call: Callable[[str], Awaitable[R]],
        *,
        kind: Kind,
        key_known: timedelta | None = None,
        result: type[R] | None = None,
        before: Before | None = None,
        after: Callable[[Tx, Outcome[R]], Awaitable[None]] | None = None,
    ) -> Outcome[R]:
        """Calls `call` with an idempotency key, the same at every attempt, unless the effect named `key` has ended.

        `key` is unique among the tenant's effects in this service. The result of `call` is stored as JSON and read
        again as `result`; personal content in it must be sealed. `before` commits with the start of each attempt, and
        `after` (with the outcome) with its end. `after` is called again if its commit conflicts with another one.

        If `call` raises `EffectFailed`, it was refused permanently: the outcome is ``failed``. `Transient` means that
        nothing happened: the error is raised, and the next attempt of the item calls again. After any other error, such
        as `Unanswered`, the end is not known: with kind once the outcome is ``unknown``; with the other kinds the error
        is raised, and the next attempt calls again.

        key_known: the other side remembers the key of a keyed effect for this time. None: it remembers the key for as
        long as the effect is tried. After this time the other side would act on a repeat again. So if the result of an
        earlier call is not known by then, the effect is not called again, and the outcome is ``unknown``. A call whose
        result is not known raises `InDoubt`.

        Raises RuntimeError if the item's tx is in use already, and LaneLost if another process has the lane.
        """
        name = str(key)
        begun = await self._start(name, kind, key_known, result, before, after)
        if isinstance(begun, Outcome):
            return begun
        failpoint("after_effect_started")
        self._lease.check()
        body = None
        try:
            value = await call(self.idempotency_key(name))
            body = msgspec.json.encode(value)
        except EffectFailed as error:
            outcome = Outcome[R]("failed", None, _text(error.reason), begun.attempt, saved=False)
        except Transient as error:
            if not (kind == "keyed" and (begun.in_doubt or isinstance(error, InDoubt))):
                await self._end(name, "undone", None, _text(describe(error)), None)
            raise
        except Exception as error:
            if kind != "once":
                raise
            outcome = Outcome[R]("unknown", None, _text(describe(error)), begun.attempt, saved=False)
        else:
            outcome = Outcome("succeeded", value, None, begun.attempt, saved=False)
        failpoint("after_effect_call")
        await self._end(name, outcome.state, body, outcome.error, after and (lambda tx: after(tx, outcome)))
        failpoint("after_effect_commit")
        self._metrics.effects.labels(kind, outcome.state).inc()
        return outcome

    @property
    def lease(self) -> Lease:
        """Of the lane whose item is being done, for those who write under it by themselves."""
        return self._lease

    def idempotency_key(self, name: str) -> str:
        """The key that the other side gets for the effect `name`: the same at every attempt."""
        return str(uuid5(NAMESPACE_OID, f"{self._database.service}/{self._lease.tenant_id}/{name}"))

    async def _start(
        self,
        name: str,
        kind: Kind,
        key_known: timedelta | None,
        result: type[R] | None,
        before: Before | None,
        after: Callable[[Tx, Outcome[R]], Awaitable[None]] | None,
    ) -> _Begun | Outcome[R]:
        """Commits the start of an attempt, or returns the outcome if the effect has ended already."""
        if not before and await self._start_first(name, kind):
            return _Begun(1, in_doubt=False)
        async with self.begin() as tx:
            rows = await tx.sql(
                """
                SELECT state, kind, attempt, result, error,
                    coalesce(kind = 'keyed' AND started_at < clock_timestamp() - $3::interval, false)
                FROM lane_effect
                WHERE tenant_id = $1 AND key = $2
                FOR UPDATE
                """,
                self._lease.tenant_id,
                name,
                key_known,
            )
            state, begun_as, attempt, body, error, forgotten = (
                rows[0] if rows else ("undone", kind, 0, None, None, False)
            )
            if state not in ("started", "undone"):
                value: Any = None if body is None else msgspec.json.decode(body, type=result or Any)
                return Outcome(state, value, error, attempt, saved=True)
            if state == "started" and (begun_as == "once" or forgotten):
                why = "no answer for as long as the key is known" if forgotten else "the process ended during the call"
                outcome = Outcome[R]("unknown", None, why, attempt, saved=False)
                await self._write_end(tx, name, "unknown", None, outcome.error)
                if after:
                    await after(tx, outcome)
                self._metrics.effects.labels(kind, "unknown").inc()
                return outcome
            await tx.sql(
                """
                INSERT INTO lane_effect AS e (tenant_id, key, kind, state, attempt, lane_id, epoch, started_at)
                VALUES ($1, $2, $3, 'started', 1, $4, $5, clock_timestamp()) ON CONFLICT (tenant_id, key) DO UPDATE
                SET kind = excluded.kind, state = 'started', attempt = e.attempt + 1, lane_id = excluded.lane_id,
                epoch = excluded.epoch, error = NULL,
                -- The other side may know the key since the first call whose end is not known.
                started_at = CASE
                    WHEN e.state = 'started' AND e.kind = 'keyed' THEN e.started_at ELSE excluded.started_at
                END
                """,
                self._lease.tenant_id,
                name,
                kind,
                self._lease.lane_id,
                self._lease.epoch,
            )
            if before:
                await before(tx, attempt + 1, state == "started")
        return _Begun(attempt + 1, state == "started")

    async def _start_first(self, name: str, kind: Kind) -> bool:
        """Commits the start of the first attempt by one statement. False, and nothing is changed, if there was an
        attempt before, or if another process has the lane."""
        self._check_order()
        return bool(
            await self._database.autocommit(
                # Locks the lane, then the effect.
                """
                INSERT INTO lane_effect (tenant_id, key, kind, state, attempt, lane_id, epoch, started_at)
                SELECT $1, $2, $3, 'started', 1, lane_id, epoch, clock_timestamp()
                FROM lane
                WHERE lane_id = $4 AND epoch = $5
                FOR UPDATE
                ON CONFLICT (tenant_id, key) DO NOTHING
                RETURNING 1
                """,
                self._lease.tenant_id,
                name,
                kind,
                self._lease.lane_id,
                self._lease.epoch,
            )
        )

    async def _end(
        self,
        name: str,
        state: str,
        body: bytes | None,
        error: str | None,
        after: Callable[[Tx], Awaitable[None]] | None,
    ) -> None:
        """Commits the end of the call. Retries for a while: an end that is not recorded now is not known later."""
        for attempt in range(CONFLICT_ATTEMPTS):
            try:
                if after is None:
                    await self._end_alone(name, state, body, error)
                    return
                async with self.begin() as tx:
                    await self._write_end(tx, name, state, body, error)
                    await after(tx)
                return
            except Exception as failure:
                if attempt == CONFLICT_ATTEMPTS - 1 or not (isinstance(failure, Conflict) or is_transient(failure)):
                    raise
                await asyncio.sleep(0.1 * 2**attempt)

    async def _end_alone(self, name: str, state: str, body: bytes | None, error: str | None) -> None:
        """Commits the end of the call by one statement. Raises LaneLost if another process has the lane."""
        self._check_order()
        held = await self._database.autocommit(
            # Locks the lane, then the effect.
            """
            WITH own AS MATERIALIZED (
                SELECT FROM lane WHERE lane_id = $6 AND epoch = $7 FOR UPDATE
            )
            UPDATE lane_effect SET state = $3, result = $4, error = $5, finished_at = clock_timestamp()
            WHERE tenant_id = $1 AND key = $2 AND EXISTS (SELECT FROM own)
            RETURNING 1
            """,
            self._lease.tenant_id,
            name,
            state,
            body,
            error,
            self._lease.lane_id,
            self._lease.epoch,
        )
        if not held:
            raise self._lease.lost()

    async def _write_end(self, tx: Tx, name: str, state: str, body: bytes | None, error: str | None) -> None:
        await tx.sql(
            """
            UPDATE lane_effect SET state = $3, result = $4, error = $5, finished_at = clock_timestamp()
            WHERE tenant_id = $1 AND key = $2
            """,
            self._lease.tenant_id,
            name,
            state,
            body,
            error,
        )


def _text(error: str) -> str:
    text: str = redacted(error)
    return storable(text, 4000)
