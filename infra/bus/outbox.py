"""The relay: takes messages from the outbox to their bus, in position order, and marks what the bus confirmed.

It may repeat a message (a crash between confirm and mark, a paused relay that wakes); it never reorders the first
occurrences of a key. Each process relays the key-hash buckets whose leases it holds.
"""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol
from uuid import UUID

import msgspec
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from infra.errors import describe
from infra.failpoint import failpoint
from infra.observe import telemetry
from infra.observe.logs import get_logger
from infra.observe.metrics import Metrics
from infra.postgres.db import is_transient, sql
from infra.postgres.dead_letters import DeadLetter, store_dead_letters
from infra.postgres.leases import LEASE_SECONDS, Leases
from infra.postgres.tx import BUCKETS

WINDOW = 500
# What wakes the relay is a commit in this process; the poll finds what other processes and crashes left behind.
POLL_SECONDS = 0.25
SET_ASIDE_SECONDS = (1, 2, 5, 15, 60)


class Pending(NamedTuple):
    """An outbox row as the publisher needs it."""

    position: int
    message_id: UUID
    destination: str
    routing_key: str
    key: str
    headers: dict[str, str]
    body: bytes


class SetAside(NamedTuple):
    """This row and all of its destination (and, on Kafka, key) wait: the destination refuses for now."""

    error: str


class Unpublishable(NamedTuple):
    """No attempt will ever succeed: it becomes a dead letter."""

    error: str


Outcome = SetAside | Unpublishable | None


class Publisher(Protocol):
    """Takes rows to a bus; returns an outcome for each, None meaning confirmed. Raises when the bus is away."""

    bus: str

    async def publish(self, rows: Sequence[Pending]) -> list[Outcome]: ...


class Relay:
    """Relays one bus's part of the outbox until stopped."""

    def __init__(
        self,
        engine: AsyncEngine,
        service: str,
        publisher: Publisher,
        metrics: Metrics,
        *,
        lease_seconds: float = LEASE_SECONDS,
    ) -> None:
        self._engine = engine
        # For what is one statement: it needs no BEGIN and no COMMIT.
        self._single = engine.execution_options(isolation_level="AUTOCOMMIT")
        self._service = service
        self._publisher = publisher
        self._metrics = metrics
        self.leases = Leases(engine, f"outbox-{publisher.bus}", BUCKETS, seconds=lease_seconds)
        self._wake = asyncio.Event()
        self._stopping = False
        self._log = get_logger("infra.bus.outbox")

    def wake(self, bus: str) -> None:
        """There are messages for that bus."""
        if bus == self._publisher.bus:
            self._wake.set()

    async def stop(self) -> None:
        """Lets the window under way finish; `run` then returns."""
        self._stopping = True
        self._wake.set()

    async def run(self) -> None:
        failures = 0
        while not self._stopping:
            self._wake.clear()
            try:
                full = await self.step() == WINDOW
                failures = 0
            except Exception as error:
                # Whatever it was, the rows stay and are tried again: there is nobody to hand the error to.
                failures += 1
                self._metrics.outbox_failures.labels(self._publisher.bus).inc()
                self._log.warning(
                    "outbox relay failed, its messages stay and are tried again",
                    bus=self._publisher.bus,
                    error=describe(error),
                    passing=is_transient(error),
                    exc_info=not is_transient(error),
                )
                full = False
            if not full and not self._stopping:
                pause = min(POLL_SECONDS * 2**failures, 5.0)
                try:
                    await asyncio.wait_for(self._wake.wait(), pause)
                except TimeoutError:
                    continue
                if failures:
                    await asyncio.sleep(POLL_SECONDS)  # a commit wakes it, but must not make it spin on a dead bus
        if self.leases.held:
            await self.leases.release()

    async def step(self) -> int:
        """Relays one window of the buckets that this relay holds now. Returns how many rows it took."""
        await self.leases.refresh()
        if not self.leases.held:
            return 0
        async with self._single.connect() as connection:
            rows = await sql(
                connection,
                "SELECT position, message_id, destination, routing_key, key, headers, body FROM outbox o "
                "WHERE bus = $1 AND published_at IS NULL AND bucket = ANY($2::smallint[]) AND NOT EXISTS "
                "(SELECT FROM outbox_set_aside s WHERE s.bus = o.bus AND s.destination = o.destination "
                " AND s.key IN ('', o.key, o.routing_key) AND s.retry_at > clock_timestamp()) "
                "ORDER BY position LIMIT $3",
                self._publisher.bus,
                list(self.leases.held),
                WINDOW,
            )
        if not rows:
            return 0
        pending = [Pending(p, m, d, r, k, msgspec.json.decode(h), b) for p, m, d, r, k, h, b in rows]
        with telemetry.publish_batch(self._publisher.bus, [row.headers for row in pending]):
            outcomes = await self._publisher.publish(pending)
        failpoint("after_publish_before_mark")
        await self._mark(pending, outcomes)
        return len(rows)

    async def _mark(self, pending: Sequence[Pending], outcomes: Sequence[Outcome]) -> None:
        bus = self._publisher.bus
        done: list[int] = []
        taken: list[Pending] = []
        dead: list[DeadLetter] = []
        aside: dict[tuple[str, str], str] = {}
        for row, outcome in zip(pending, outcomes, strict=True):
            match outcome:
                case None:
                    done.append(row.position)
                    taken.append(row)
                case Unpublishable(error):
                    done.append(row.position)
                    dead.append(_dead_letter(row, error))
                case SetAside(error):
                    aside[row.destination, row.routing_key if bus == "rabbit" else ""] = error
        async with self._engine.begin() if dead or aside else self._single.connect() as connection:
            if done and not await self._mark_published(connection, done, taken):
                return
            if dead:
                await store_dead_letters(connection, self._service, "outbox", dead)
            for (destination, key), error in aside.items():
                await self._set_aside(connection, destination, key, error)
        self._metrics.outbox_published.labels(bus).inc(len(done) - len(dead))

    async def _mark_published(
        self, connection: AsyncConnection, positions: list[int], taken: Sequence[Pending]
    ) -> bool:
        """`taken`: by the bus, so that what was set aside beside them need not wait any longer."""
        held = self.leases.held
        marked = await sql(
            connection,
            # Only under the epoch that read them: a relay that slept must not speak for its successor. The leases
            # stay locked, so that a `resend` comes before this mark or after it, not in between. The mark does not
            # wait for the disk: a database that crashes before it is written has the messages sent again.
            "WITH own AS MATERIALIZED (SELECT l.name, set_config('synchronous_commit', 'off', true) FROM lease l "
            "JOIN unnest($2::text[], $3::bigint[]) AS h(name, epoch) USING (name, epoch) WHERE l.owner = $4 "
            "ORDER BY l.name FOR SHARE OF l), "
            "tried_again AS (DELETE FROM outbox_set_aside s WHERE s.bus = $6 AND s.destination = ANY($7::text[]) "
            "AND s.retry_at < clock_timestamp() AND s.key = ANY($8::text[])) "
            "UPDATE outbox o SET published_at = clock_timestamp() FROM unnest($1::bigint[]) AS p(position) "
            "WHERE o.position = p.position AND EXISTS (SELECT FROM own WHERE own.name = $5 || ':' || o.bucket) "
            "RETURNING o.position",
            positions,
            [f"outbox-{self._publisher.bus}:{bucket}" for bucket in held],
            list(held.values()),
            self.leases.owner,
            f"outbox-{self._publisher.bus}",
            self._publisher.bus,
            list({row.destination for row in taken}),
            list({row.routing_key for row in taken}),
        )
        if len(marked) != len(positions):
            self.leases.due = 0.0
            self._log.warning(
                "outbox relay lost leases while it published; the next holder repeats those messages",
                bus=self._publisher.bus,
                published=len(positions),
                marked=len(marked),
            )
        return bool(marked)

    async def _set_aside(self, connection: AsyncConnection, destination: str, key: str, error: str) -> None:
        self._metrics.outbox_failures.labels(self._publisher.bus).inc()
        [(attempts,)] = await sql(
            connection,
            "INSERT INTO outbox_set_aside AS s "
            "VALUES ($1, $2, $3, 1, clock_timestamp() + make_interval(secs => $4), $5) "
            "ON CONFLICT (bus, destination, key) DO UPDATE SET attempts = s.attempts + 1, error = excluded.error, "
            "retry_at = clock_timestamp() + make_interval(secs => ($6::int[])[least(s.attempts + 1, 5)]) "
            "RETURNING attempts",
            self._publisher.bus,
            destination,
            key,
            float(SET_ASIDE_SECONDS[0]),
            error,
            list(SET_ASIDE_SECONDS),
        )
        self._log.warning(
            "messages set aside, the destination refuses them for now",
            bus=self._publisher.bus,
            destination=destination,
            key=key,
            attempts=attempts,
            error=error,
        )


def _dead_letter(row: Pending, error: str) -> DeadLetter:
    return DeadLetter(
        destination=row.destination,
        place=row.routing_key,
        message_id=str(row.message_id),
        key=row.key,
        tenant_id=row.headers.get("tenant_id"),
        attempts=1,
        error=error,
        headers=msgspec.json.encode(row.headers).decode(),
        payload=row.body,
    )


async def pending_by_destination(connection: AsyncConnection) -> dict[tuple[str, str], tuple[int, float]]:
    """(bus, destination) → how many messages wait and the age of the oldest in seconds."""
    rows = await sql(
        connection,
        "SELECT bus, destination, count(*), extract(epoch FROM clock_timestamp() - min(created_at))::float8 "
        "FROM outbox WHERE published_at IS NULL GROUP BY bus, destination",
    )
    return {(bus, destination): (count, age) for bus, destination, count, age in rows}


async def resend(connection: AsyncConnection, destination: str, *, since: Any = None) -> int:
    """Marks what was published to `destination` (since a time, if given) as pending again. Returns how many.

    Consumers drop what they have handled: ids stay. Only what is still kept can be sent again. A relay that has
    published and not marked yet is refused: what it sent may have gone with the bus that was wiped.
    """
    await sql(connection, "UPDATE lease SET epoch = epoch + 1 WHERE starts_with(name, 'outbox-')")
    rows = await sql(
        connection,
        "UPDATE outbox SET published_at = NULL WHERE destination = $1 AND published_at IS NOT NULL "
        "AND ($2::timestamptz IS NULL OR created_at >= $2) RETURNING 1",
        destination,
        since,
    )
    return len(rows)


def by_destination(rows: Sequence[Pending]) -> dict[str, list[int]]:
    """Indexes of `rows` by destination, order kept."""
    groups: dict[str, list[int]] = defaultdict(list)
    for index, row in enumerate(rows):
        groups[row.destination].append(index)
    return groups
