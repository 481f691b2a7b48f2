"""What the engines hold of one notebook: events in the store, records in Kafka, effects in the ledger."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import datetime
from typing import Any

import asyncpg
from aiokafka import AIOKafkaConsumer, TopicPartition

from infra.testing.sample.catalog import SAMPLE_EVENTS
from infra.testing.sample.run import SampleServices


class Look:
    """Reads from the engines what has happened to one notebook."""

    def __init__(self, connection: asyncpg.Connection, consumer: AIOKafkaConsumer, topic: str) -> None:
        self._connection = connection
        self._consumer = consumer
        self._partitions = [TopicPartition(topic, n) for n in range(SAMPLE_EVENTS.partitions)]
        self._begin: dict[TopicPartition, int] = {}

    async def start(self) -> None:
        """What is in the topic already is not of this story."""
        self._consumer.assign(self._partitions)
        self._begin = await self._consumer.end_offsets(self._partitions)

    async def events(self, book: str) -> list[tuple[int, datetime]]:
        rows = await self._connection.fetch(
            "SELECT version, recorded_at FROM sample_desk.event WHERE stream_id = $1 ORDER BY version",
            f"notebook:{book}",
        )
        return [(row[0], row[1]) for row in rows]

    async def effects(self, book: str) -> list[tuple[int, int]]:
        rows = await self._connection.fetch(
            "SELECT number, nth FROM sample_ledger.effect WHERE notebook = $1 ORDER BY nth", book
        )
        return [(row[0], row[1]) for row in rows]

    async def unsent(self) -> int:
        count: int = await self._connection.fetchval(
            "SELECT count(*) FROM sample_desk.outbox WHERE published_at IS NULL AND destination = $1",
            SAMPLE_EVENTS.name,
        )
        return count

    async def records(self, book: str) -> list[Any]:
        """The Kafka records of this key, in order."""
        found = []
        end = await self._consumer.end_offsets(self._partitions)
        for partition in self._partitions:
            self._consumer.seek(partition, self._begin[partition])
        for partition in self._partitions:
            while await self._consumer.position(partition) < end[partition]:
                batch = (await self._consumer.getmany(partition, timeout_ms=200)).get(partition, [])
                found += [record for record in batch if record.key == book.encode()]
        return found


@asynccontextmanager
async def looking(services: SampleServices) -> AsyncIterator[Look]:
    """From now on: what is in the topic already is not seen."""
    connection = await asyncpg.connect(services.engines.postgres)
    consumer = AIOKafkaConsumer(bootstrap_servers=services.engines.kafka, enable_auto_commit=False)
    try:
        await consumer.start()
        look = Look(connection, consumer, services.prefix + SAMPLE_EVENTS.name)
        await look.start()
        yield look
    finally:
        await consumer.stop()
        await connection.close()
