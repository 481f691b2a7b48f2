"""The database of a service, as one of its roles uses it: transactions, and single statements without one.

After a commit it wakes the relays and the runners of lanes that have something to do.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Sequence
from contextlib import asynccontextmanager
from typing import Any, TypeVar

from infra.errors import Conflict
from infra.failpoint import failpoint
from infra.postgres import db
from infra.postgres.dead_letters import Sealing
from infra.postgres.lane_items import Places
from infra.postgres.tx import Tx
from protos.envelope import Envelope

T = TypeVar("T")

# A transaction whose stream another transaction has changed meanwhile decides again, up to so many times.
CONFLICT_ATTEMPTS = 5


class Database:
    """One role's pool of one service, and the only place that commits.

    `tenanted`: the role is bound by row-level security, so a transaction must name its tenant. `sealing`: seals the
    payloads of the service's dead letters; None only in benches and tests.
    """

    def __init__(
        self, engine: db.Pool, service: str, *, tenanted: bool = False, sealing: Sealing | None = None
    ) -> None:
        self.engine = engine
        self.service = service
        self.sealing = sealing
        self._tenanted = tenanted
        self._listeners: list[Callable[[str], None]] = []
        self._lane_listeners: list[Callable[[str], None]] = []
        self._places: Places | None = None

    def on_messages(self, wake: Callable[[str], None]) -> None:
        """`wake` is called with the bus after each commit that left messages for it in the outbox."""
        self._listeners.append(wake)

    def on_items(self, wake: Callable[[str], None]) -> None:
        """`wake` is called with the kind of lane after each commit that left something to do there."""
        self._lane_listeners.append(wake)

    def claim_for(self, places: Places) -> None:
        """Transactions that begin after this call claim idle lanes for this runner while it has free places."""
        self._places = places

    @asynccontextmanager
    async def begin(self, *, tenant_id: str | None = None, cause: Envelope | None = None) -> AsyncIterator[Tx]:
        """One transaction: committed when the block ends, rolled back when it raises.

        Raises ValueError if the role needs a tenant and none is given.
        """
        if self._tenanted and not tenant_id:
            raise ValueError("tenant_id: the request role works for one tenant, and none was given")
        tx = Tx(
            self.engine,
            self.service,
            tenant_id=tenant_id,
            cause=cause,
            tenanted=self._tenanted,
            places=self._places,
        )
        committed = False
        try:
            yield tx
            await tx.flush()
            if tx.buses:
                failpoint("before_commit")
            await tx.close(commit=True)
            committed = True
        finally:
            if not committed:
                try:
                    await tx.close(commit=False)
                finally:
                    tx.items.ended(committed=False)
        if tx.buses:
            failpoint("after_commit")
        tx.items.ended(committed=True)
        self.wake(tx.buses, tx.woken)
        await tx.run_after_commit()

    def wake(self, buses: Iterable[str], kinds: Iterable[str] = ()) -> None:
        """A commit has left messages for these buses, and items in lanes of these kinds."""
        for bus in buses:
            for wake in self._listeners:
                wake(bus)
        for kind in kinds:
            for wake_lane in self._lane_listeners:
                wake_lane(kind)

    def collector(self, tenant_id: str) -> Tx:
        """A transaction that only collects messages; it is never written itself."""
        return Tx(self.engine, self.service, tenant_id=tenant_id or None, cause=None)

    @asynccontextmanager
    async def read_only(self, *, tenant_id: str) -> AsyncIterator[Tx]:
        """Reads by the worker role, each statement for itself: BEGIN and COMMIT would take longer than one statement
        between them. Collected events and messages are never written."""
        tx = Tx(self.engine, self.service, tenant_id=tenant_id, cause=None, reads_only=True)
        try:
            yield tx
        finally:
            await tx.close(commit=False)

    async def autocommit(self, statement: str, *arguments: Any) -> Sequence[tuple[Any, ...]]:
        """Runs one statement that is its own transaction: one round trip, without BEGIN and COMMIT."""
        async with self.engine.statements() as connection:
            return await db.sql(connection, statement, *arguments)

    async def run(
        self,
        work: Callable[[Tx], Awaitable[T]],
        *,
        tenant_id: str | None = None,
        cause: Envelope | None = None,
    ) -> T:
        """Runs `work` in a transaction, and again if another transaction appended to one of its streams first.

        Raises Conflict if that happened CONFLICT_ATTEMPTS times in a row.
        """
        for attempt in range(1, CONFLICT_ATTEMPTS + 1):
            try:
                async with self.begin(tenant_id=tenant_id, cause=cause) as tx:
                    result = await work(tx)
                return result
            except Conflict:
                if attempt == CONFLICT_ATTEMPTS:
                    raise
        raise AssertionError("unreachable")
