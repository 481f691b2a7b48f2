"""The relay: publishes the messages of the outbox to their bus, in position order, and marks the confirmed ones.

It may repeat a message (after a crash between confirm and mark, or when a paused relay wakes up). It never reorders the
first occurrences of a key. Each process relays the key-hash buckets whose leases it holds.
"""

from __future__ import annotations

import asyncio
import time
from collections import defaultdict
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol
from uuid import UUID

import msgspec
from sqlalchemy.ext.asyncio import AsyncConnection

from infra.clock import wait_at_most
from infra.errors import describe
from infra.failpoint import failpoint
from infra.observe import telemetry
from infra.observe.logs import get_logger
from infra.observe.metrics import Metrics
from infra.postgres.database import Database
from infra.postgres.db import is_transient, sql
from infra.postgres.dead_letters import DeadLetter, store_dead_letters
from infra.postgres.leases import LEASE_SECONDS, Leases
from infra.postgres.outbox_rows import BUCKETS

WINDOW = 500
# A commit in this process wakes the relay. The poll finds rows of other processes, and those left after a crash.
# A relay that holds all buckets is the only one of its service: it polls seldom.
POLL_SECONDS = 0.25
POLL_SECONDS_ALONE = 2.0
# The next window begins at the earliest so long after the last one, unless that one was full: each window costs a few
# statements and a request to the bus, however many messages it has. The first message after a pause does not wait, nor
# does work for another service, which a person may wait for.
GATHER_SECONDS = {"kafka": 0.025, "rabbit": 0.0}
HELD_BACK_SECONDS = (1, 2, 5, 15, 60)


class Pending(NamedTuple):
    """An outbox row as the publisher needs it."""

    position: int
    message_id: UUID
    destination: str
    routing_key: str
    key: str
    headers: dict[str, str]
    body: bytes


class HeldBack(NamedTuple):
    """The destination refuses messages now. All of its rows wait, with RabbitMQ only those of the same routing key."""

    error: str


class Unpublishable(NamedTuple):
    """No attempt can succeed. The row becomes a dead letter."""

    error: str


Outcome = HeldBack | Unpublishable | None
"""None: the bus has confirmed the message."""


class Publisher(Protocol):
    """Publishes rows to a bus and returns an outcome for each. Raises if the bus is away."""

    bus: str

    async def publish(self, rows: Sequence[Pending]) -> list[Outcome]: ...


class Relay:
    """Relays one bus's part of the outbox until stopped."""

    def __init__(
        self,
        database: Database,
        publisher: Publisher,
        metrics: Metrics,
        *,
        lease_seconds: float = LEASE_SECONDS,
    ) -> None:
        engine = database.engine
        self._engine = engine
        self._service = database.service
        self._sealing = database.sealing
        self._publisher = publisher
        self._metrics = metrics
        metrics.dead_letters.labels("outbox")
        self.leases = Leases(engine, f"outbox-{publisher.bus}", BUCKETS, seconds=lease_seconds)
        # The leases are renewed between two polls.
        self._poll_seconds_alone = min(POLL_SECONDS_ALONE, lease_seconds / 3)
        self._wake = asyncio.Event()
        self._stopping = False
        self._log = get_logger("infra.bus.outbox")

    def wake(self, bus: str) -> None:
        """Tells the relay that the outbox has new messages for `bus`."""
        if bus == self._publisher.bus:
            self._wake.set()

    async def stop(self) -> None:
        """Finishes the window that is being published. Then `run` returns."""
        self._stopping = True
        self._wake.set()

    async def run(self) -> None:
        failures = 0
        while not self._stopping:
            self._wake.clear()
            began = time.monotonic()
            try:
                full = await self.step() == WINDOW
                failures = 0
            except Exception as error:
                # After any error: the rows stay in the outbox and are tried again. No caller waits for the error.
                failures += 1
                self._metrics.outbox_failures.labels(self._publisher.bus).inc()
                self._log.warning(
                    "could not relay messages from the outbox; will retry",
                    bus=self._publisher.bus,
                    error=describe(error),
                    transient=is_transient(error),
                    exc_info=not is_transient(error),
                )
                full = False
            if not full and not self._stopping:
                alone = len(self.leases.held) == BUCKETS and not failures
                pause = self._poll_seconds_alone if alone else min(POLL_SECONDS * 2**failures, 5.0)
                if await wait_at_most(pause, self._wake):
                    # A commit wakes the relay, but must not make it spin.
                    gathered = began + GATHER_SECONDS[self._publisher.bus]
                    await asyncio.sleep(POLL_SECONDS if failures else gathered - time.monotonic())
        if self.leases.held:
            await self.leases.release()

    async def step(self) -> int:
        """Relays one window of the buckets that this relay holds now. Returns the number of rows."""
        await self.leases.refresh()
        if not self.leases.held:
            return 0
        async with self._engine.statements() as connection:
            rows = await sql(
                connection,
                # Locks nothing: the leases decide which process relays a bucket.
                """
                SELECT position, message_id, destination, routing_key, key, headers, body
                FROM outbox o
                WHERE bus = $1 AND published_at IS NULL AND bucket = ANY($2::smallint[])
                    AND NOT EXISTS (
                        SELECT FROM outbox_held_back h
                        WHERE h.bus = o.bus AND h.destination = o.destination
                            AND h.key IN ('', o.key, o.routing_key) AND h.retry_at > clock_timestamp()
                    )
                ORDER BY position
                LIMIT $3
                """,
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
        confirmed: list[Pending] = []
        dead: list[DeadLetter] = []
        held_back: dict[tuple[str, str], str] = {}
        for row, outcome in zip(pending, outcomes, strict=True):
            match outcome:
                case None:
                    done.append(row.position)
                    confirmed.append(row)
                case Unpublishable(error):
                    done.append(row.position)
                    dead.append(_dead_letter(row, error))
                case HeldBack(error):
                    held_back[row.destination, row.routing_key if bus == "rabbit" else ""] = error
        async with self._engine.transaction() if dead or held_back else self._engine.statements() as connection:
            if done and not await self._mark_published(connection, done, confirmed):
                return
            if dead:
                await store_dead_letters(connection, self._service, "outbox", dead, self._sealing)
            for (destination, key), error in sorted(held_back.items()):
                await self._hold_back(connection, destination, key, error)
        self._metrics.outbox_published.labels(bus).inc(len(done) - len(dead))
        self._metrics.dead_letters.labels("outbox").inc(len(dead))
        for letter in dead:
            self._log.error(
                "message of the outbox stored as a dead letter; see ./claw dlq list",
                destination=letter.destination,
                tenant=letter.tenant_id,
                message_id=letter.message_id,
                error=letter.error,
            )

    async def _mark_published(
        self, connection: AsyncConnection, positions: list[int], confirmed: Sequence[Pending]
    ) -> bool:
        """`confirmed`: the rows that the bus has taken, so that their destinations are not held back any longer."""
        held = self.leases.held
        [(marked,)] = await sql(
            connection,
            # Locks the leases, in the order of their names, so that a `resend` comes before or after this mark and not
            # in between; then the rows. Only under the epoch under which the rows were read: a relay that was paused
            # must not mark rows for its successor. The mark does not wait for the disk: if the database crashes before
            # it is written, the messages are sent again.
            """
            WITH own AS MATERIALIZED (
                SELECT l.name, set_config('synchronous_commit', 'off', true)
                FROM lease l
                JOIN unnest((SELECT $2::text[]), $3::bigint[]) AS h(name, epoch) USING (name, epoch)
                WHERE l.owner = $4
                ORDER BY l.name
                FOR SHARE OF l
            ), tried_again AS (
                DELETE FROM outbox_held_back h
                WHERE h.bus = $6 AND h.destination = ANY((SELECT $7::text[])::text[])
                    AND h.key = ANY((SELECT $8::text[])::text[]) AND h.retry_at < clock_timestamp()
            ), marked AS (
                UPDATE outbox o SET published_at = clock_timestamp()
                FROM unnest((SELECT $1::bigint[])) AS p(position)
                WHERE o.position = p.position AND EXISTS (SELECT FROM own WHERE own.name = $5 || ':' || o.bucket)
                RETURNING 1
            )
            SELECT count(*) FROM marked
            """,
            positions,
            [f"outbox-{self._publisher.bus}:{bucket}" for bucket in held],
            list(held.values()),
            self.leases.owner,
            f"outbox-{self._publisher.bus}",
            self._publisher.bus,
            list({row.destination for row in confirmed}),
            list({row.routing_key for row in confirmed}),
        )
        if marked != len(positions):
            self.leases.due = 0.0
            self._log.warning(
                "the relay lost leases while it published; their next owner sends these messages again",
                bus=self._publisher.bus,
                published=len(positions),
                marked=marked,
            )
        return bool(marked)

    async def _hold_back(self, connection: AsyncConnection, destination: str, key: str, error: str) -> None:
        self._metrics.outbox_failures.labels(self._publisher.bus).inc()
        [(attempts,)] = await sql(
            connection,
            """
            INSERT INTO outbox_held_back AS h
            VALUES ($1, $2, $3, 1, clock_timestamp() + make_interval(secs => $4), $5)
            ON CONFLICT (bus, destination, key) DO UPDATE
            SET attempts = h.attempts + 1, error = excluded.error,
                retry_at = clock_timestamp() + make_interval(secs => ($6::int[])[least(h.attempts + 1, 5)])
            RETURNING attempts
            """,
            self._publisher.bus,
            destination,
            key,
            float(HELD_BACK_SECONDS[0]),
            error,
            list(HELD_BACK_SECONDS),
        )
        self._log.warning(
            "messages held back: the destination refuses them now; will retry",
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
    """(bus, destination) → the number of messages that wait, and the age of the oldest in seconds."""
    rows = await sql(
        connection,
        """
        SELECT bus, destination, count(*), extract(epoch FROM clock_timestamp() - min(created_at))::float8
        FROM outbox
        WHERE published_at IS NULL
        GROUP BY bus, destination
        """,
    )
    return {(bus, destination): (count, age) for bus, destination, count, age in rows}


async def resend(connection: AsyncConnection, destination: str, *, since: Any = None) -> int:
    """Marks the messages published to `destination` (if `since` is given: since then) as pending. Returns their number.

    Consumers drop those that they have handled, because ids do not change. Only messages that are still kept can be
    sent again. A relay that has published messages and not marked them yet can no longer mark them: those messages may
    be lost with the bus that was wiped.
    """
    await sql(
        connection,
        # Locks the leases in the order of their names, as the relay's mark does.
        """
        UPDATE lease SET epoch = epoch + 1
        WHERE name IN (SELECT name FROM lease WHERE starts_with(name, 'outbox-') ORDER BY name FOR UPDATE)
        """,
    )
    rows = await sql(
        connection,
        """
        -- Counted here: there may be millions.
        WITH marked AS (
            UPDATE outbox SET published_at = NULL
            WHERE destination = $1 AND published_at IS NOT NULL AND ($2::timestamptz IS NULL OR created_at >= $2)
            RETURNING 1
        )
        SELECT count(*) FROM marked
        """,
        destination,
        since,
    )
    return int(rows[0][0])


def by_destination(rows: Sequence[Pending]) -> dict[str, list[int]]:
    """The indexes of `rows` by destination, in their order."""
    groups: dict[str, list[int]] = defaultdict(list)
    for index, row in enumerate(rows):
        groups[row.destination].append(index)
    return groups
