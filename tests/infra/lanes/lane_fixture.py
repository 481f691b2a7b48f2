"""Lanes of a kind of their own for each test, and runners in the test's process that stand for several processes."""

from __future__ import annotations

import asyncio
import logging
import uuid
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import msgspec
import structlog
from prometheus_client import CollectorRegistry

from infra.lanes.effects import Effects
from infra.lanes.lane import Lane, Work
from infra.lanes.runner import LaneRunner
from infra.observe import logs
from infra.observe.metrics import Metrics
from infra.outgoing import shares
from infra.postgres.database import Database
from infra.postgres.db import create_engine
from infra.postgres.tx import Tx
from tests.infra.conftest import SampleDatabase
from tooling.testing.until import until

TENANT = "tenant-1"


class Parcel(msgspec.Struct, frozen=True):
    """The item of the tests' lanes."""

    number: int


def new_lane(**options: Any) -> Lane[Parcel]:
    """A kind of lane that no other test has; three quick retries."""
    retries = tuple(timedelta(milliseconds=20) for _ in range(3))
    return Lane(f"parcels-{uuid.uuid4().hex}", Parcel, **{"retries": retries, **options})


@dataclass
class Notes:
    """The items that a handler was given, in order. It fails with the errors that a test gives."""

    got: list[tuple[str, int]] = field(default_factory=list)
    errors: list[Exception] = field(default_factory=list)
    begun: asyncio.Event = field(default_factory=asyncio.Event)
    go_on: asyncio.Event = field(default_factory=asyncio.Event)

    async def note(self, parcel: Parcel, effects: Effects, tx: Tx) -> None:
        """Notes the parcel, then fails while there are errors to fail with."""
        self.got.append((tx.tenant_id or "", parcel.number))
        if self.errors:
            raise self.errors.pop(0)

    async def hold(self, parcel: Parcel, effects: Effects, tx: Tx) -> None:
        """Notes the parcel and waits until it may go on."""
        # Its outgoing requests are the tenant's.
        self.got.append((shares.tenant.get(), parcel.number))
        self.begun.set()
        await self.go_on.wait()

    @property
    def numbers(self) -> list[int]:
        return [number for _, number in self.got]

    async def has(self, count: int) -> None:
        async def enough() -> bool:
            return len(self.got) >= count

        await until(enough)


@dataclass
class World:
    """The desk's schema, seen by any number of processes."""

    sample: SampleDatabase
    metrics: Metrics = field(default_factory=lambda: Metrics(CollectorRegistry()))

    @asynccontextmanager
    async def process(self, *works: Work, lease_seconds: float = 3.0) -> AsyncIterator[Database]:
        """A process that runs lanes: its database, whose commits wake its runner."""
        engine = create_engine(self.sample.url("desk", "worker"))
        control = create_engine(self.sample.url("desk", "worker"), pool_size=1, name="lanes")
        database = Database(engine, "sample_desk")
        runner = LaneRunner(database, works, control, self.metrics, lease_seconds=lease_seconds)
        database.on_items(runner.wake)
        database.claim_for(runner)
        running = asyncio.create_task(runner.run())
        try:
            yield database
        finally:
            await runner.stop()
            await running
            await control.dispose()
            await engine.dispose()


@contextmanager
def log_lines() -> Iterator[None]:
    """Logs as a service does. Structlog's own way of showing an exception takes seconds, in which leases run out."""
    handlers, level = logging.root.handlers, logging.root.level
    logs.setup("sample_desk")
    yield
    logging.root.handlers, logging.root.level = handlers, level
    structlog.reset_defaults()


async def put(
    database: Database, kind: Lane[Parcel], lane: str, *numbers: int, tenant_id: str = TENANT, **options: Any
) -> list[uuid.UUID]:
    """Enqueues parcels in one transaction; their ids."""
    async with database.begin(tenant_id=tenant_id) as tx:
        return [tx.enqueue(kind, lane=lane, item=Parcel(number), **options) for number in numbers]


async def items(database: Database, kind: Lane[Parcel], *columns: str) -> Sequence[tuple[Any, ...]]:
    """The rows of the kind, by lane and sequence."""
    async with database.begin() as tx:
        return await tx.sql(
            f"SELECT {', '.join(columns)} FROM lane_item i JOIN lane l USING (lane_id) WHERE i.kind = $1 "
            "ORDER BY lane, seq",
            kind.name,
        )


async def all_over(database: Database, kind: Lane[Parcel]) -> None:
    """Waits until no item of the kind waits any more."""

    async def nothing_waits() -> bool:
        return ("waiting",) not in await items(database, kind, "state")

    await until(nothing_waits)


async def steal(database: Database, kind: Lane[Parcel], *, seconds: float = 60.0) -> None:
    """Claims all lanes of the kind, as another process does after their leases have expired."""
    async with database.begin() as tx:
        await tx.sql(
            "UPDATE lane SET owner = gen_random_uuid(), epoch = epoch + 1, "
            "ready_at = clock_timestamp() + make_interval(secs => $2) WHERE kind = $1",
            kind.name,
            seconds,
        )
