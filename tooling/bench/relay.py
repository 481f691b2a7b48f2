"""``relay``: committed outbox rows become Kafka records. Ours is the kernel's relay with leases and traces.

Both contenders publish the same rows from the same kind of table to the same kind of topic, with the same producer
settings, 500 at a time. The latency is that of a running service: from the moment at which a message was due to be
committed until a consumer has it.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from functools import partial
from time import perf_counter

import asyncpg
import msgspec
from aiokafka import AIOKafkaConsumer, AIOKafkaProducer
from prometheus_client import CollectorRegistry

from infra.bus.kafka import KafkaPublisher
from infra.bus.outbox import WINDOW, Relay
from infra.observe import telemetry
from infra.observe.metrics import Metrics
from infra.postgres.database import Database
from infra.postgres.db import create_engine
from protos.messages.sample import NoteTaken
from tooling.bench.fixture import SERVICE, Fixture
from tooling.bench.protocol import SLICE_SECONDS, Anchor, Latency, Slice, check, latency
from tooling.testing.sample.catalog import SAMPLE_EVENTS

TOPICS = [SAMPLE_EVENTS.name]
# More rows than the fastest contender publishes in a slice.
ROWS = 80_000
LATENCY_GOAL_MS = 100.0
LATENCY_SECONDS = 15
PUBLISHERS = 8

# Rows as `Tx.publish` writes them: a body of about 513 B, the kernel's headers, the bucket of the key.
_FILL = """
INSERT INTO outbox (bus, bucket, message_id, destination, routing_key, key, headers, body, keep_until)
SELECT 'kafka', crc32(k::bytea) % 16, i, $1, '', k,
    format('{"ce_id":"%s","ce_source":"bench","ce_type":"sample.v1.NoteTaken","ce_specversion":"1.0",'
        '"ce_time":"2026-01-01T00:00:00.000Z","content-type":"application/json","ce_subject":"%s",'
        '"tenant_id":"acme","traceparent":"00-%s-%s-01"}', i, k, md5(n::text), left(md5(k), 16)),
    convert_to(format('{"notebook":"%s","number":%s,"text":"%s"}', k, n, repeat(md5(n::text), 14)), 'UTF8'),
    clock_timestamp() + interval '7 days'
FROM (SELECT n, uuidv7() AS i, 'notebook-' || n % 2000 AS k FROM generate_series(1, $2::int) AS n) AS rows
"""


@dataclass
class RelayBench:
    """Both contenders."""

    fixture: Fixture

    def anchors(self) -> list[Anchor]:
        return [Anchor("by hand, 500 at a time", 0.8, partial(self._slice, self._by_hand))]

    async def ours(self) -> Slice:
        """The time of a slice includes the export of its spans."""
        return await self._slice(self._kernel)

    async def _slice(self, contender: Callable[[], Awaitable[Slice]]) -> Slice:
        admin = self.fixture.admin
        await admin.execute("TRUNCATE outbox, lease, lease_member")
        await admin.execute(_FILL, SAMPLE_EVENTS.name, ROWS)
        await admin.execute("VACUUM (ANALYZE) outbox")
        before = await self.fixture.end_offsets(SAMPLE_EVENTS.name)
        slice_ = await contender()
        published = await self.fixture.end_offsets(SAMPLE_EVENTS.name) - before
        marked = await admin.fetchval("SELECT count(*) FROM outbox WHERE published_at IS NOT NULL")
        # The first window opens connections; it is published before the slice begins.
        check("relay", {"records": published, "marked": marked, "acknowledged": slice_.done + WINDOW})
        if marked == ROWS:
            raise ValueError(f"relay: a slice published all of its {ROWS} rows; raise ROWS")
        return slice_

    async def _kernel(self) -> Slice:
        traces = telemetry.setup(SERVICE, "0", self.fixture.otlp)
        engine = create_engine(self.fixture.url)
        publisher = KafkaPublisher(self.fixture.bootstrap, prefix=self.fixture.prefix)
        relay = Relay(Database(engine, SERVICE), publisher, Metrics(CollectorRegistry()))
        try:
            await relay.step()
            return await _timed(relay.step, partial(asyncio.to_thread, traces.flush))
        finally:
            await publisher.stop()
            await engine.dispose()
            await asyncio.to_thread(traces.shutdown)

    async def _by_hand(self) -> Slice:
        topic = self.fixture.prefix + SAMPLE_EVENTS.name
        connection = await asyncpg.connect(self.fixture.url)

        async def step() -> int:
            rows = await connection.fetch(
                """
                SELECT position, key, headers, body FROM outbox WHERE bus = 'kafka' AND published_at IS NULL
                ORDER BY position LIMIT $1
                """,
                WINDOW,
            )
            sent = [
                await producer.send(
                    topic,
                    row["body"],
                    key=row["key"].encode(),
                    headers=[(name, value.encode()) for name, value in msgspec.json.decode(row["headers"]).items()],
                )
                for row in rows
            ]
            await asyncio.gather(*sent)
            await connection.execute(
                "UPDATE outbox SET published_at = clock_timestamp() WHERE position = ANY($1::bigint[])",
                [row["position"] for row in rows],
            )
            return len(rows)

        async with AIOKafkaProducer(
            bootstrap_servers=self.fixture.bootstrap,
            enable_idempotence=True,
            acks="all",
            linger_ms=2,
            max_batch_size=128 * 1024,
            compression_type="lz4",
        ) as producer:
            await step()
            slice_ = await _timed(step)
        await connection.close()
        return slice_

    async def latency(self) -> Latency:
        """Open loop at half of the rate at which the publishers can commit, one message per transaction."""
        await self.fixture.admin.execute("TRUNCATE outbox, lease, lease_member")
        traces = telemetry.setup(SERVICE, "0", self.fixture.otlp)
        engine = create_engine(self.fixture.url)
        database = Database(engine, SERVICE)
        publisher = KafkaPublisher(self.fixture.bootstrap, prefix=self.fixture.prefix)
        relay = Relay(database, publisher, Metrics(CollectorRegistry()))
        database.on_messages(relay.wake)
        consumer = AIOKafkaConsumer(
            self.fixture.prefix + SAMPLE_EVENTS.name,
            bootstrap_servers=self.fixture.bootstrap,
            auto_offset_reset="latest",
            fetch_max_wait_ms=50,
        )
        await consumer.start()
        await consumer.seek_to_end()
        relaying = asyncio.create_task(relay.run())
        visible: dict[int, float] = {}
        # Messages with negative numbers only measure the capacity.
        reading = asyncio.create_task(_note_arrivals(consumer, visible))
        try:
            rate = await _capacity(partial(_publish, database)) / 2
            async with asyncio.timeout(60):
                while await self.fixture.admin.fetchval("SELECT count(*) FROM outbox WHERE published_at IS NULL"):  # noqa: ASYNC110
                    await asyncio.sleep(0.05)
            count = int(rate * LATENCY_SECONDS)
            intended: dict[int, float] = {}
            began = perf_counter() + 0.1
            async with asyncio.TaskGroup() as tasks:
                for number in range(count):
                    intended[number] = began + number / rate
                    await asyncio.sleep(max(0.0, intended[number] - perf_counter()))
                    tasks.create_task(_publish(database, number))
            async with asyncio.timeout(60):
                while len(visible) < count:  # noqa: ASYNC110  # the reading task has no signal
                    await asyncio.sleep(0.01)
        finally:
            reading.cancel()
            await relay.stop()
            await relaying
            await publisher.stop()
            await consumer.stop()
            await engine.dispose()
            await asyncio.to_thread(traces.shutdown)
        waits = [visible[number] - intended[number] for number in range(count)]
        return latency("relay", "commit to visible", LATENCY_GOAL_MS, rate, waits)


async def _nothing() -> None:
    return


async def _timed(step: Callable[[], Awaitable[int]], flush: Callable[[], Awaitable[None]] = _nothing) -> Slice:
    await flush()
    began, done = perf_counter(), 0
    while perf_counter() - began < SLICE_SECONDS:
        done += await step()
    await flush()
    return Slice(done, perf_counter() - began)


async def _publish(database: Database, number: int) -> None:
    async with database.begin(tenant_id="acme") as tx:
        note = NoteTaken(notebook=f"notebook-{number % 2000}", number=number, text="x" * 460)
        tx.publish(SAMPLE_EVENTS, note, key=note.notebook)


async def _capacity(publish: Callable[[int], Awaitable[None]]) -> float:
    """Messages per second that PUBLISHERS tasks commit, one per transaction, while they do nothing else."""
    until, done = time.monotonic() + SLICE_SECONDS, 0

    async def one() -> None:
        nonlocal done
        while time.monotonic() < until:
            await publish(-1)
            done += 1

    async with asyncio.TaskGroup() as tasks:
        for _ in range(PUBLISHERS):
            tasks.create_task(one())
    return done / SLICE_SECONDS


async def _note_arrivals(consumer: AIOKafkaConsumer, visible: dict[int, float]) -> None:
    async for record in consumer:
        number = msgspec.json.decode(record.value, type=NoteTaken).number
        if number >= 0:
            visible.setdefault(number, perf_counter())
