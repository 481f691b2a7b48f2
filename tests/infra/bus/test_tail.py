"""Tests of the tail: every process gets all new messages, and is told when it may have missed some."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import msgspec
import pytest
from aiokafka import AIOKafkaProducer
from aiokafka.admin import AIOKafkaAdminClient
from aiokafka.admin.new_partitions import NewPartitions

from infra.bus.tail import Tail
from infra.clock import utcnow, uuid7
from protos.envelope import Envelope
from protos.messages.sample import NoteTaken
from protos.topology import Catalog, Subscription
from tests.infra.bus.conftest import Buses
from tooling.testing.sample.catalog import SAMPLE, SAMPLE_EVENTS
from tooling.testing.stack import Stack
from tooling.testing.until import until


@dataclass
class Listener:
    """The messages that one process gets."""

    texts: list[str] = field(default_factory=list)
    begun: int = 0

    async def hear(self, note: NoteTaken, headers: Mapping[str, str]) -> None:
        assert headers["ce_type"] == NoteTaken.wire_name()
        self.texts.append(note.text)
        if note.text == "unbearable":
            raise ValueError("this handler does not want it")

    async def begins(self) -> None:
        self.begun += 1

    def subscription(self) -> Subscription:
        return SAMPLE_EVENTS.tail(group="listener", begins=self.begins)(self.hear)


@asynccontextmanager
async def listening(buses: Buses) -> AsyncIterator[Listener]:
    listener = Listener()
    tail = Tail(listener.subscription(), bootstrap=buses.kafka, prefix=buses.prefix)
    task = asyncio.create_task(tail.run())
    async with asyncio.timeout(30):
        while not listener.begun:
            await asyncio.sleep(0.02)
    yield listener
    await tail.stop()
    await task


@pytest.fixture
async def producer(buses: Buses) -> AsyncIterator[AIOKafkaProducer]:
    producer = AIOKafkaProducer(bootstrap_servers=buses.kafka, acks="all", metadata_max_age_ms=1000)
    await producer.start()
    yield producer
    await producer.stop()


async def send(producer: AIOKafkaProducer, buses: Buses, text: str, *, partition: int = 0, type_: str = "") -> None:
    message = NoteTaken(notebook="n", number=1, text=text)
    envelope = Envelope(id=uuid7(), source="test", type=type_ or NoteTaken.wire_name(), time=utcnow())
    headers = [(name, value.encode()) for name, value in envelope.headers().items()]
    body = msgspec.json.encode(message)
    await producer.send_and_wait(buses.prefix + SAMPLE_EVENTS.name, body, partition=partition, headers=headers)


async def heard(listener: Listener, *texts: str) -> None:
    async def all_of_them() -> bool:
        return set(texts) <= set(listener.texts)

    await until(all_of_them)


async def test_every_process_hears_what_is_new_on_all_partitions_once(buses: Buses, producer: AIOKafkaProducer) -> None:
    await send(producer, buses, "before")
    async with listening(buses) as first, listening(buses) as second:
        for number in range(SAMPLE_EVENTS.partitions):
            await send(producer, buses, f"on {number}", partition=number)
        await send(producer, buses, "unknown", type_="sample.v9.Unheard")
        await send(producer, buses, "unbearable")
        await send(producer, buses, "last")
        for listener in (first, second):
            await heard(listener, "last", *(f"on {number}" for number in range(SAMPLE_EVENTS.partitions)))
            assert sorted(listener.texts) == sorted(["last", "on 0", "on 1", "on 2", "on 3", "unbearable"])
            assert listener.begun == 1


async def test_a_topic_that_grows_or_is_made_anew_is_heard_on_and_the_break_is_told(
    buses: Buses, producer: AIOKafkaProducer, stack: Stack
) -> None:
    name = buses.prefix + SAMPLE_EVENTS.name
    admin = AIOKafkaAdminClient(bootstrap_servers=buses.kafka)
    await admin.start()
    async with listening(buses) as listener:

        async def begun_again() -> bool:
            return listener.begun > before

        before = listener.begun
        await admin.create_partitions({name: NewPartitions(SAMPLE_EVENTS.partitions + 1)})
        await until(begun_again)
        await send(producer, buses, "on the new one", partition=SAMPLE_EVENTS.partitions)
        await heard(listener, "on the new one")

        before = listener.begun
        await admin.delete_topics([name])
        await until(begun_again)
        before = listener.begun
        await buses.provision(stack, Catalog(topics=SAMPLE.topics, queues=()))
        await until(begun_again)
        await send(producer, buses, "in the new log")
        await heard(listener, "in the new log")
    await admin.close()
