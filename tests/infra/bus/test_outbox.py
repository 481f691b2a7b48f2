"""Tests of the relay on real brokers: order per key, refused messages, sending again, and leases that change owner."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace
from datetime import timedelta
from types import SimpleNamespace
from typing import Any, NamedTuple
from uuid import UUID

import aio_pika
import msgspec
import pytest
from aiokafka import AIOKafkaConsumer, TopicPartition
from aiokafka.errors import KafkaError
from aiokafka.partitioner import DefaultPartitioner
from structlog.testing import capture_logs

from infra.bus.kafka import MAX_HEADER_BYTES, MAX_RECORD_BYTES, KafkaPublisher
from infra.bus.outbox import HeldBack, Outcome, Pending, Relay, resend
from infra.clock import utcnow, uuid7
from infra.postgres import tx
from infra.postgres.database import Database
from infra.postgres.dead_letters import list_dead_letters
from protos.catalog import AUDIT_LOGS
from protos.messages.sample import NoteTaken, TakeNote
from protos.topology import Catalog, Topic
from tests.infra.bus.conftest import Buses
from tooling.testing.sample.catalog import SAMPLE_EVENTS, SAMPLE_WORK
from tooling.testing.sample.desk.domain import WriteNote
from tooling.testing.sample.desk.publishing import NOTEBOOK
from tooling.testing.stack import Stack
from tooling.testing.until import until

LATER = replace(SAMPLE_EVENTS, name="sample.later", partitions=1)
UNROUTED = replace(SAMPLE_WORK, name="sample.unrouted", routing_key="sample.unrouted")


class Sent(NamedTuple):
    id: UUID
    note: NoteTaken


async def log_of(buses: Buses, topic: Topic, key: str | None = None) -> list[Sent]:
    """The messages that are in the topic now, in order within each partition."""
    name = buses.prefix + topic.name
    consumer = AIOKafkaConsumer(bootstrap_servers=buses.kafka, auto_offset_reset="earliest", enable_auto_commit=False)
    await consumer.start()
    try:
        partitions = [TopicPartition(name, p) for p in range(topic.partitions)]
        consumer.assign(partitions)
        ends = await consumer.end_offsets(partitions)
        sent: list[Sent] = []
        for tp in partitions:
            consumer.assign([tp])
            consumer.seek(tp, 0)
            while await consumer.position(tp) < ends[tp]:
                for record in (await consumer.getmany(tp, timeout_ms=1000)).get(tp, []):
                    id_ = UUID(dict(record.headers)["ce_id"].decode())
                    sent.append(Sent(id_, msgspec.json.decode(record.value, type=NoteTaken)))
    finally:
        await consumer.stop()
    return [message for message in sent if key in (None, message.note.notebook)]


async def publish(desk: Database, topic: Topic, key: str, number: int, text: str = "x") -> UUID:
    async with desk.begin(tenant_id="t1") as tx:
        return tx.publish(topic, NoteTaken(notebook=key, number=number, text=text), key=key)


def is_published(desk: Database, *ids: UUID) -> Callable[[], Awaitable[bool]]:
    async def all_marked() -> bool:
        async with desk.begin() as tx:
            rows = await tx.sql(
                "SELECT 1 FROM outbox WHERE message_id = ANY($1::uuid[]) AND published_at IS NULL", list(ids)
            )
        return not rows

    return all_marked


async def set_aside(desk: Database, destination: str) -> list[str]:
    async with desk.begin() as tx:
        rows = await tx.sql("SELECT error FROM outbox_held_back WHERE destination = $1", destination)
    return [error for (error,) in rows]


async def ask_again_now(desk: Database) -> None:
    async with desk.begin() as tx:
        await tx.sql("UPDATE outbox_held_back SET retry_at = clock_timestamp() - interval '1 hour'")


async def test_two_relays_keep_the_order_of_every_key(buses: Buses, desk: Database) -> None:
    keys = [f"ordered {n}" for n in range(40)]
    notes = [key for key in keys for _ in range(10)]
    random.Random(1).shuffle(notes)

    async def write(some: Sequence[str]) -> None:
        for key in some:
            await desk.run(lambda tx, key=key: tx.decide(NOTEBOOK.stream(key), WriteNote("x")))  # type: ignore[misc]

    writing = asyncio.gather(*(write(notes[n::4]) for n in range(4)))
    async with buses.relay(desk):
        async with buses.relay(desk) as second:
            await until(lambda: _true(second.leases.held))
            await writing
        await until(lambda: _has(buses, "ordered", len(notes)))
    sent = await log_of(buses, SAMPLE_EVENTS)
    for key in keys:
        first_occurrences = list(dict.fromkeys(m.note.number for m in sent if m.note.notebook == key))
        assert first_occurrences == list(range(1, 11))


async def _true(value: object) -> bool:
    return bool(value)


async def _has(buses: Buses, prefix: str, count: int) -> bool:
    sent = await log_of(buses, SAMPLE_EVENTS)
    return len({message.id for message in sent if message.note.notebook.startswith(prefix)}) >= count


async def test_a_row_that_is_too_large_is_a_dead_letter_and_its_key_goes_on(
    buses: Buses, desk: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    # As a row from a version with another limit.
    monkeypatch.setattr(tx, "MAX_MESSAGE_BYTES", 2 * MAX_RECORD_BYTES)
    ids = [
        await publish(desk, SAMPLE_EVENTS, "large", 1),
        await publish(desk, SAMPLE_EVENTS, "large", 2, "x" * (MAX_RECORD_BYTES + 1)),
        # Of these only two fit into one batch.
        *[await publish(desk, SAMPLE_EVENTS, "large", n, "x" * 60_000) for n in range(3, 8)],
        await publish(desk, SAMPLE_EVENTS, "k" * (MAX_HEADER_BYTES + 1), 1),
    ]
    counted = buses.metrics.dead_letters.labels("outbox")
    before = counted._value.get()
    with capture_logs() as lines:
        async with buses.relay(desk):
            await until(is_published(desk, *ids))
    assert counted._value.get() == before + 2
    told = {line["message_id"]: line["tenant"] for line in lines if "dead letter" in line["event"]}
    assert told == dict.fromkeys((str(ids[1]), str(ids[-1])), "t1")
    assert [message.note.number for message in await log_of(buses, SAMPLE_EVENTS, "large")] == [1, 3, 4, 5, 6, 7]
    async with desk.engine.connect() as connection:
        letters = {x.message_id: x for x in await list_dead_letters(connection, "sample_desk")}
    letter, of_key = letters[str(ids[1])], letters[str(ids[-1])]
    assert (letter.source, letter.key, letter.state) == ("outbox:sample.events", "large", "failed")
    assert f"must have at most {MAX_RECORD_BYTES} bytes" in letter.error
    assert f"key and headers: must have at most {MAX_HEADER_BYTES} bytes" in of_key.error


class Producer:
    """A producer with two partitions. `refusing`: this one refuses its first batch. Two records fit into a batch."""

    def __init__(self, refusing: int) -> None:
        self.refusing = refusing
        self.sent: list[tuple[int, list[bytes]]] = []

    async def partitions_for(self, topic: str) -> set[int]:
        return {0, 1}

    def create_batch(self) -> Any:
        records: list[bytes] = []

        def append(*, value: bytes, **_: Any) -> bool | None:
            if len(records) == 2:
                return None
            records.append(value)
            return True

        return SimpleNamespace(append=append, close=lambda: None, records=records)

    async def send_batch(self, batch: Any, topic: str, *, partition: int) -> asyncio.Future[None]:
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        if partition == self.refusing:
            self.refusing = -1
            future.set_exception(KafkaError())
        else:
            self.sent.append((partition, batch.records))
            future.set_result(None)
        return future


async def test_all_records_of_a_partition_behind_a_refused_batch_count_as_not_sent() -> None:
    of_all_clients = DefaultPartitioner()
    keys = ["a", "b", "c", "d", "e"] * 3
    partitions = [of_all_clients(key.encode(), [0, 1], [0, 1]) for key in keys]
    assert min(partitions.count(0), partitions.count(1)) > 2  # more than one batch each
    publisher = KafkaPublisher("nowhere")
    producer = Producer(refusing=1)
    publisher._producer = producer
    rows = [Pending(n, uuid7(), "t", "", key, {"ce_id": "x"}, str(n).encode()) for n, key in enumerate(keys)]
    outcomes = await publisher.publish(rows)
    assert [isinstance(outcome, HeldBack) for outcome in outcomes] == [partition == 1 for partition in partitions]
    sent = [int(value) for partition, records in producer.sent if partition == 0 for value in records]
    assert sent == [n for n, partition in enumerate(partitions) if partition == 0]


async def test_a_topic_that_is_not_there_holds_up_only_itself(buses: Buses, desk: Database, stack: Stack) -> None:
    waiting = [await publish(desk, LATER, "k", n) for n in (1, 2)]
    others = [await publish(desk, SAMPLE_EVENTS, "beside", n) for n in (1, 2)]
    async with buses.relay(desk):
        await until(is_published(desk, *others))
        [error] = await until(lambda: set_aside(desk, LATER.name))
        assert "sample.later" in error
        assert "provisioned" in error
        assert not await is_published(desk, waiting[0])()
        waiting.append(await publish(desk, LATER, "k", 3))
        await buses.provision(stack, Catalog(topics=(LATER,), queues=()))
        await ask_again_now(desk)
        await until(is_published(desk, *waiting))
    assert [message.id for message in await log_of(buses, LATER)] == waiting
    assert await set_aside(desk, LATER.name) == []


async def test_a_message_that_no_queue_takes_holds_up_only_its_routing_key(
    buses: Buses, desk: Database, stack: Stack
) -> None:
    async with desk.begin() as tx:
        unrouted = tx.send(UNROUTED, TakeNote(notebook="n", text="x"))
        routed = tx.send(SAMPLE_WORK, TakeNote(notebook="n", text="x"))
    publisher = buses.rabbit()
    async with buses.relay(desk, publisher):
        await until(is_published(desk, routed))
        [error] = await until(lambda: set_aside(desk, "sample"))
        assert error == "exchange sample: no queue is bound to routing key 'sample.unrouted'; run claw up"
        assert not await is_published(desk, unrouted)()
        await buses.provision(stack, Catalog(topics=(SAMPLE_EVENTS, AUDIT_LOGS), queues=(SAMPLE_WORK, UNROUTED)))
        await ask_again_now(desk)
        await until(is_published(desk, unrouted))
    await publisher.stop()
    assert await set_aside(desk, "sample") == []
    async with await aio_pika.connect(buses.rabbitmq) as connection:
        queue = await (await connection.channel()).get_queue(UNROUTED.name)
        message = await queue.get(timeout=30, no_ack=True)
    assert message is not None
    assert message.message_id == str(unrouted)


async def test_what_is_sent_again_has_the_same_ids_and_order(buses: Buses, desk: Database) -> None:
    since = utcnow() - timedelta(milliseconds=1)
    ids = [await publish(desk, SAMPLE_EVENTS, "again", n) for n in (1, 2, 3)]
    async with buses.relay(desk):
        await until(is_published(desk, *ids))
        async with desk.begin() as tx:
            assert await resend(await tx.connection(), SAMPLE_EVENTS.name, since=since) == 3
        await until(is_published(desk, *ids))
    sent = [message.id for message in await log_of(buses, SAMPLE_EVENTS, "again")]
    # More than twice if the relay was sending at that time: its mark is refused, and it sends them once more.
    assert len(sent) >= 2 * len(ids)
    assert sent == ids * (len(sent) // len(ids))


async def test_a_clean_stop_gives_the_leases_back(buses: Buses, desk: Database) -> None:
    async with buses.relay(desk) as relay:
        await until(lambda: _true(relay.leases.held))
    async with desk.begin() as tx:
        assert not await tx.sql(
            "SELECT name FROM lease WHERE expires_at > clock_timestamp() AND owner = $1", relay.leases.owner
        )
        assert not await tx.sql("SELECT kind FROM lease_member WHERE owner = $1", relay.leases.owner)


class Robbed(KafkaPublisher):
    """Loses all leases of its process, once, while the messages are on their way."""

    def __init__(self, buses: Buses, desk: Database) -> None:
        super().__init__(buses.kafka, prefix=buses.prefix)
        self._desk: Database | None = desk

    async def publish(self, rows: Sequence[Pending]) -> list[Outcome]:
        outcomes = await super().publish(rows)
        if self._desk is not None:
            async with self._desk.begin() as tx:
                await tx.sql("UPDATE lease SET owner = gen_random_uuid(), epoch = epoch + 1, expires_at = '-infinity'")
            self._desk = None
        return outcomes


async def test_a_relay_that_lost_its_leases_while_it_published_marks_nothing(buses: Buses, desk: Database) -> None:
    ids = [await publish(desk, SAMPLE_EVENTS, "robbed", n) for n in (1, 2)]
    publisher = Robbed(buses, desk)
    relay = Relay(desk, publisher, buses.metrics)
    try:
        assert await relay.step() == 2
        for id_ in ids:
            assert not await is_published(desk, id_)()
        relay.leases.due = 0.0
        assert await relay.step() == 2
        assert await is_published(desk, *ids)()
    finally:
        await relay.leases.release()
        await publisher.stop()
    assert [message.id for message in await log_of(buses, SAMPLE_EVENTS, "robbed")] == ids * 2


@pytest.fixture(autouse=True)
async def nothing_left_over(desk: Database) -> None:
    """Deletes the pending messages and the leases of the other tests."""
    async with desk.begin() as tx:
        for table in ("outbox", "outbox_held_back", "lease", "lease_member"):
            await tx.sql(f"DELETE FROM {table}")
