"""``consume``: records of a topic become rows, exactly once. Ours is the kernel's reader with inbox and traces.

Each contender reads the same four partitions with records of about 513 B. It stores each record as a row of ``effect``
and its offset in the same transaction. One anchor also stores the id of each record, as the kernel's inbox does: this
is the kernel's durable work by hand, and so the most that the kernel could reach.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass
from functools import partial
from time import perf_counter

import msgspec
import pydantic
from aiokafka import AIOKafkaConsumer, AIOKafkaProducer, ConsumerRecord, TopicPartition
from asyncpg.pgproto.pgproto import UUID
from faststream.kafka import KafkaBroker, KafkaMessage
from prometheus_client import CollectorRegistry

from infra.bus.transactional import BATCH, TransactionalReader
from infra.clock import utcnow, uuid7
from infra.observe import telemetry
from infra.observe.metrics import Metrics
from infra.postgres.database import Database
from infra.postgres.db import create_engine
from infra.postgres.tx import Tx
from protos.envelope import Envelope
from protos.messages.sample import NoteTaken
from tooling.bench.fixture import PARTITIONS, SERVICE, Fixture, connections
from tooling.bench.protocol import SLICE_SECONDS, Anchor, Slice, check
from tooling.testing.sample.catalog import SAMPLE_EVENTS

TOPICS = [SAMPLE_EVENTS.name]
# More records than the fastest contender reads in a slice. Each slice begins with the first record.
RECORDS = 600_000
NOTEBOOKS = 2_000
# A slice begins after this time: records that were fetched while a contender started do not count.
WARM_SECONDS = 0.5

_INSERT = "INSERT INTO effect SELECT * FROM unnest($1::text[], $2::bigint[], $3::text[])"
_MARK = "INSERT INTO inbox (message_id, consumer) SELECT id, 'hand' FROM unnest($1::uuid[]) AS n(id)"
_MOVE = "UPDATE consumer_offset SET next_offset = $2 WHERE partition = $1 AND next_offset = $3"

_INSERT_ONE = "INSERT INTO effect VALUES ($1, $2, $3)"
_START = "INSERT INTO consumer_offset VALUES ('hand', '', $1, gen_random_uuid(), 0)"

Contender = Callable[[], AbstractAsyncContextManager[Callable[[], int]]]


async def _nothing() -> None:
    return


@SAMPLE_EVENTS.batch(group=SERVICE)
async def store_notes(notes: list[NoteTaken], tx: Tx) -> None:
    await tx.sql(
        _INSERT, [note.notebook for note in notes], [note.number for note in notes], [note.text for note in notes]
    )


class Note(pydantic.BaseModel):
    """The message type of FastStream's handler."""

    notebook: str
    number: int
    text: str


@dataclass
class Consume:
    """All contenders. `prepare` must be called first."""

    fixture: Fixture

    def anchors(self) -> list[Anchor]:
        return [
            Anchor("by hand, in batches", 0.7, partial(self._slice, self._by_hand)),
            Anchor("by hand, with an inbox", 0.8, partial(self._slice, partial(self._by_hand, inbox=True))),
            Anchor("FastStream, one message each", 10, partial(self._slice, self._faststream)),
        ]

    async def traced(self) -> Slice:
        """Our side with every message in a recorded trace. The time of a slice includes the export of its spans."""
        return await self._kernel(self.fixture.otlp)

    async def untraced(self) -> Slice:
        return await self._kernel(None)

    async def prepare(self) -> None:
        await self.fixture.admin.execute(
            f"SET ROLE {SERVICE}_owner; CREATE TABLE effect (notebook text NOT NULL, number bigint NOT NULL, "
            "text text NOT NULL); RESET ROLE"
        )
        topic = self.fixture.prefix + SAMPLE_EVENTS.name
        async with AIOKafkaProducer(
            bootstrap_servers=self.fixture.bootstrap, linger_ms=5, max_batch_size=128 * 1024, compression_type="lz4"
        ) as producer:
            sent = []
            for number in range(RECORDS):
                notebook = f"notebook-{number % NOTEBOOKS:04}"
                note = NoteTaken(notebook=notebook, number=number, text=secrets.token_hex(230))
                trace_id, span_id = secrets.token_hex(16), secrets.token_hex(8)
                envelope = Envelope(
                    id=uuid7(),
                    source=SERVICE,
                    type=NoteTaken.wire_name(),
                    time=utcnow(),
                    subject=notebook,
                    tenant_id="acme",
                    traceparent=f"00-{trace_id}-{span_id}-01",
                )
                headers = [(name, value.encode()) for name, value in envelope.headers().items()]
                body = msgspec.json.encode(note)
                sent.append(await producer.send(topic, body, key=notebook.encode(), headers=headers))
            await asyncio.gather(*sent)

    async def _kernel(self, otlp: str | None) -> Slice:
        traces = telemetry.setup(SERVICE, "0", otlp)
        try:
            return await self._slice(self._reader, partial(asyncio.to_thread, traces.flush))
        finally:
            await asyncio.to_thread(traces.shutdown)

    async def _slice(self, contender: Contender, flush: Callable[[], Awaitable[None]] = _nothing) -> Slice:
        admin = self.fixture.admin
        await admin.execute("TRUNCATE effect, inbox, consumer_offset")
        async with contender() as count:
            async with asyncio.timeout(60):
                while not count():  # noqa: ASYNC110  # the three kinds of contenders have no signal in common
                    await asyncio.sleep(0.01)
            await asyncio.sleep(WARM_SECONDS)
            await flush()
            began, first = perf_counter(), count()
            await asyncio.sleep(SLICE_SECONDS)
            await flush()
            done, seconds = count() - first, perf_counter() - began
        rows, different, moved = await admin.fetchrow(
            """
            SELECT count(*), count(DISTINCT number), (SELECT sum(next_offset)::bigint FROM consumer_offset)
            FROM effect
            """
        )
        check("consume", {"rows": rows, "different rows": different, "offsets": moved, "acknowledged": count()})
        if rows > RECORDS * 0.95:
            raise ValueError(f"consume: a slice read all of its {RECORDS} records; raise RECORDS")
        return Slice(done, seconds)

    @asynccontextmanager
    async def _reader(self) -> AsyncIterator[Callable[[], int]]:
        engine = create_engine(self.fixture.url)
        metrics = Metrics(CollectorRegistry())
        # A new consumer group: joining it does not wait for old members.
        reader = TransactionalReader(
            Database(engine, SERVICE),
            f"{SERVICE}-{secrets.token_hex(4)}",
            [store_notes],
            bootstrap=self.fixture.bootstrap,
            metrics=metrics,
            prefix=self.fixture.prefix,
        )
        labels = {"consumer": reader.group, "outcome": "handled"}
        task = asyncio.create_task(reader.run())
        yield lambda: int(metrics.registry.get_sample_value("claw_messages_total", labels) or 0)
        await reader.stop()
        await task
        await engine.dispose()

    @asynccontextmanager
    async def _by_hand(self, *, inbox: bool = False) -> AsyncIterator[Callable[[], int]]:
        pool = await connections(self.fixture.url, PARTITIONS)
        consumer = AIOKafkaConsumer(bootstrap_servers=self.fixture.bootstrap, fetch_max_wait_ms=50)
        await consumer.start()
        places = [TopicPartition(self.fixture.prefix + SAMPLE_EVENTS.name, n) for n in range(PARTITIONS)]
        consumer.assign(places)
        decoder = msgspec.json.Decoder(NoteTaken)
        handled = 0
        stopping = False

        async def read(place: TopicPartition) -> None:
            nonlocal handled
            await pool.execute(_START, place.partition)
            consumer.seek(place, 0)
            next_offset = 0
            while not stopping:
                records = (await consumer.getmany(place, timeout_ms=200, max_records=BATCH)).get(place, [])
                if not records:
                    continue
                notes = [decoder.decode(record.value) for record in records]
                async with pool.acquire() as connection, connection.transaction():
                    last = records[-1].offset + 1
                    if await connection.execute(_MOVE, place.partition, last, next_offset) != "UPDATE 1":
                        raise RuntimeError("another reader moved the offset")
                    if inbox:
                        ids = [UUID(dict(record.headers)["ce_id"].decode()) for record in records]
                        await connection.execute(_MARK, ids)
                    await connection.execute(
                        _INSERT,
                        [note.notebook for note in notes],
                        [note.number for note in notes],
                        [note.text for note in notes],
                    )
                next_offset = last
                handled += len(notes)

        async with asyncio.TaskGroup() as tasks:
            for place in places:
                tasks.create_task(read(place))
            yield lambda: handled
            stopping = True
        await consumer.stop()
        await pool.close()

    @asynccontextmanager
    async def _faststream(self) -> AsyncIterator[Callable[[], int]]:
        pool = await connections(self.fixture.url, PARTITIONS)
        for partition in range(PARTITIONS):
            await pool.execute(_START, partition)
        broker = KafkaBroker(self.fixture.bootstrap, logger=None)
        handled = 0

        @broker.subscriber(
            self.fixture.prefix + SAMPLE_EVENTS.name,
            group_id=f"{self.fixture.prefix}{secrets.token_hex(4)}",
            auto_offset_reset="earliest",
        )
        async def store(note: Note, message: KafkaMessage) -> None:
            nonlocal handled
            record: ConsumerRecord = message.raw_message
            async with pool.acquire() as connection, connection.transaction():
                await connection.execute(_MOVE, record.partition, record.offset + 1, record.offset)
                await connection.execute(_INSERT_ONE, note.notebook, note.number, note.text)
            handled += 1

        async with broker:
            await broker.start()
            yield lambda: handled
        await pool.close()
