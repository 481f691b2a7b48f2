"""Tests of the transactional reader: effects once, in order, with their offset; a failed message parks its key."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any
from uuid import UUID

import msgspec
import pytest
from aiokafka import AIOKafkaConsumer, AIOKafkaProducer, TopicPartition
from aiokafka.errors import KafkaConnectionError, KafkaTimeoutError

from infra.bus import transactional
from infra.bus.at_least_once import AtLeastOnceReader
from infra.bus.dispatch import Decoded
from infra.bus.kafka import topic_ids
from infra.clock import utcnow, uuid7
from infra.errors import Conflict, InvalidMessage
from infra.postgres.database import Database
from infra.postgres.dead_letters import list_dead_letters
from infra.postgres.tx import Tx
from infra.service.redrive import discard, request_redrive
from protos.envelope import Envelope
from protos.messages.sample import NoteTaken
from protos.topology import Catalog
from tests.infra.bus.conftest import Buses
from tooling.testing.sample.catalog import SAMPLE, SAMPLE_EVENTS
from tooling.testing.stack import Stack
from tooling.testing.until import until

Header = tuple[str, bytes]


class Ledger:
    """A handler that writes effects, and refuses the messages that a test names."""

    def __init__(self) -> None:
        self.refused: dict[str, Exception] = {}
        self.calls: list[list[str]] = []

    async def count(self, notes: list[NoteTaken], tx: Tx) -> None:
        self.calls.append([note.text for note in notes])
        for note in notes:
            if note.text in self.refused:
                raise self.refused[note.text]
        await tx.sql(
            "INSERT INTO effect SELECT n, i, nextval('event_position') "
            "FROM unnest($1::text[], $2::bigint[]) AS x(n, i)",
            [note.notebook for note in notes],
            [note.number for note in notes],
        )


@pytest.fixture
async def producer(buses: Buses) -> AsyncIterator[AIOKafkaProducer]:
    producer = AIOKafkaProducer(bootstrap_servers=buses.kafka, acks="all", enable_idempotence=True)
    await producer.start()
    yield producer
    await producer.stop()


def note(book: str, number: int, text: str = "x") -> NoteTaken:
    return NoteTaken(notebook=book, number=number, text=text)


async def send(
    producer: AIOKafkaProducer,
    buses: Buses,
    message: NoteTaken,
    *,
    id_: UUID | None = None,
    change: dict[str, bytes | None] | None = None,
    body: bytes | None = b"",
) -> UUID:
    id_ = id_ or uuid7()
    envelope = Envelope(id=id_, source="test", type=NoteTaken.wire_name(), time=utcnow(), subject=message.notebook)
    headers: dict[str, bytes | None] = {name: value.encode() for name, value in envelope.headers().items()}
    headers.update(change or {})
    value = msgspec.json.encode(message) if body == b"" else body
    sent: list[Any] = [(name, header) for name, header in headers.items() if header is not None]
    await producer.send_and_wait(buses.prefix + SAMPLE_EVENTS.name, value, key=message.notebook.encode(), headers=sent)
    return id_


async def effects(database: Database, book: str) -> list[int]:
    async with database.begin() as tx:
        return [n for (n,) in await tx.sql("SELECT number FROM effect WHERE notebook = $1 ORDER BY nth", book)]


async def letters(database: Database, book: str) -> list[tuple[str, str]]:
    async with database.engine.connect() as connection:
        found = await list_dead_letters(connection, "sample_ledger")
    return [(letter.state, letter.error) for letter in found if letter.key == book]


@pytest.fixture
def ledger() -> Ledger:
    return Ledger()


@pytest.fixture
async def reading(buses: Buses, ledger_database: Database, ledger: Ledger) -> AsyncIterator[Database]:
    subscription = SAMPLE_EVENTS.batch(group="sample_ledger")(ledger.count)
    async with buses.reader(ledger_database, subscription), buses.redriver(ledger_database, subscription):
        yield ledger_database


async def test_a_repeat_has_no_second_effect(reading: Database, producer: AIOKafkaProducer, buses: Buses) -> None:
    id_ = await send(producer, buses, note("repeat", 1))
    await send(producer, buses, note("repeat", 1), id_=id_)
    await send(producer, buses, note("repeat", 2))
    await until(lambda: _reaches(reading, "repeat", 2))
    await send(producer, buses, note("repeat", 1), id_=id_)  # also long after
    await send(producer, buses, note("repeat", 3))
    await until(lambda: _reaches(reading, "repeat", 3))
    assert await effects(reading, "repeat") == [1, 2, 3]


async def test_a_client_that_gets_no_answer_is_replaced(
    buses: Buses,
    ledger_database: Database,
    ledger: Ledger,
    producer: AIOKafkaProducer,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clients: list[AIOKafkaConsumer] = []
    asked = AIOKafkaConsumer.beginning_offsets

    async def answered(client: AIOKafkaConsumer, partitions: list[TopicPartition]) -> Any:
        if client not in clients:
            clients.append(client)
        if client is clients[0]:
            raise KafkaTimeoutError
        return await asked(client, partitions)

    monkeypatch.setattr(AIOKafkaConsumer, "beginning_offsets", answered)
    async with buses.reader(ledger_database, SAMPLE_EVENTS.batch(group="sample_ledger")(ledger.count)):
        await send(producer, buses, note("lost", 1))
        await until(lambda: _reaches(ledger_database, "lost", 1))
    assert len(clients) == 2


async def _reaches(database: Database, book: str, number: int) -> bool:
    return number in await effects(database, book)


async def test_a_failing_record_parks_its_key_and_nothing_else(
    reading: Database, producer: AIOKafkaProducer, buses: Buses, ledger: Ledger
) -> None:
    ledger.refused["bad"] = ValueError("will not do")
    await send(producer, buses, note("parked", 1))
    await send(producer, buses, note("parked", 2, "bad"))
    await send(producer, buses, note("parked", 3))
    await send(producer, buses, note("free", 1))
    await until(lambda: _reaches(reading, "free", 1))
    await until(lambda: _count_is(reading, "parked", 2))
    assert await effects(reading, "parked") == [1]
    states = await letters(reading, "parked")
    assert [state for state, _ in states] == ["failed", "waiting"]
    assert "ValueError: will not do" in states[0][1]

    # Redriven while it still fails, it stays the head; mended, it goes through and the rest follows in order.
    await redrive_head(reading, "parked")
    await until(lambda: _head_attempts(reading, "parked", above=3))
    assert [state for state, _ in await letters(reading, "parked")] == ["failed", "waiting"]
    ledger.refused.clear()
    await redrive_head(reading, "parked")
    await until(lambda: _reaches(reading, "parked", 3))
    await send(producer, buses, note("parked", 4))
    await until(lambda: _reaches(reading, "parked", 4))
    assert await effects(reading, "parked") == [1, 2, 3, 4]


async def _count_is(database: Database, book: str, count: int) -> bool:
    return len(await letters(database, book)) == count


async def _head_attempts(database: Database, book: str, *, above: int) -> bool:
    async with database.begin() as tx:
        rows = await tx.sql(
            "SELECT attempts FROM dead_letter WHERE key = $1 AND state = 'failed' AND attempts > $2", book, above
        )
    return bool(rows)


async def redrive_head(database: Database, book: str) -> None:
    async with database.begin() as tx:
        [(id_,)] = await tx.sql("SELECT id FROM dead_letter WHERE key = $1 AND state = 'failed'", book)
        await request_redrive(tx, [id_], actor="test")


async def test_a_discarded_head_lets_the_rest_follow_and_its_repeat_is_dropped(
    reading: Database, producer: AIOKafkaProducer, buses: Buses, ledger: Ledger
) -> None:
    ledger.refused["hopeless"] = InvalidMessage("text", "is hopeless")
    id_ = await send(producer, buses, note("discard", 1, "hopeless"))
    await send(producer, buses, note("discard", 2))
    await until(lambda: _count_is(reading, "discard", 2))
    async with reading.begin() as tx:
        [(letter,)] = await tx.sql("SELECT id FROM dead_letter WHERE message_id = $1", str(id_))
        with pytest.raises(Conflict, match="waits"):
            [(behind,)] = await tx.sql("SELECT id FROM dead_letter WHERE key = 'discard' AND state = 'waiting'")
            await request_redrive(tx, [behind], actor="test")
        await discard(tx, letter, actor="test")
    await until(lambda: _reaches(reading, "discard", 2))
    ledger.refused.clear()
    await send(producer, buses, note("discard", 1, "hopeless"), id_=id_)
    await send(producer, buses, note("discard", 3))
    await until(lambda: _reaches(reading, "discard", 3))
    assert await effects(reading, "discard") == [2, 3]
    async with reading.begin() as tx:
        acts = await tx.sql("SELECT convert_from(body, 'UTF8') FROM outbox WHERE destination = 'audit.logs'")
    assert any("dead_letter.discard" in act and str(letter) in act for (act,) in acts)


BAD: dict[str, tuple[dict[str, bytes | None], bytes | None, str]] = {
    "no json": ({}, b"{nope", "body: "),
    "wrong field": ({}, b'{"notebook":"wrong field","number":"one","text":""}', "$.number"),
    "tombstone": ({}, None, "tombstone"),
    "unknown type": ({"ce_type": b"sample.v1.Unheard"}, b"{}", "'sample.v1.Unheard' is not known"),
    "newer version": ({"ce_type": b"sample.v2.NoteTaken"}, b"{}", "'sample.v2.NoteTaken' is not known"),
    "header not utf8": ({"tenant_id": b"\xff\xfe"}, b"{}", "header tenant_id: is not UTF-8"),
    "no id": ({"ce_id": None}, b"{}", "header ce_id: missing"),
    "id no uuid": ({"ce_id": b"17"}, b"{}", "header ce_id: '17' is not a UUID"),
    "nul bytes": ({"ce_type": b"a\x00b"}, b"\x00\x00", "not known"),
}


@pytest.mark.parametrize("book", list(BAD))
async def test_what_cannot_be_read_is_parked_with_its_reason(
    book: str, reading: Database, producer: AIOKafkaProducer, buses: Buses
) -> None:
    change, body, reason = BAD[book]
    await send(producer, buses, note(book, 1), change=change, body=body)
    await send(producer, buses, note(book, 2))
    await send(producer, buses, note(f"beside {book}", 1))
    await until(lambda: _reaches(reading, f"beside {book}", 1))
    await until(lambda: _count_is(reading, book, 2))
    states = await letters(reading, book)
    assert [state for state, _ in states] == ["failed", "waiting"]
    assert reason in states[0][1]
    assert await effects(reading, book) == []


async def test_a_key_that_the_database_cannot_hold_is_parked_like_any_other(
    reading: Database, producer: AIOKafkaProducer, buses: Buses
) -> None:
    await send(producer, buses, note("nul \x00", 1), body=b"{nope")
    await send(producer, buses, note("nul \x00", 2))
    await until(lambda: _count_is(reading, "nul \\x00", 2))
    assert [state for state, _ in await letters(reading, "nul \\x00")] == ["failed", "waiting"]


async def test_a_repeat_of_what_was_given_up_parks_nothing(
    reading: Database, producer: AIOKafkaProducer, buses: Buses
) -> None:
    id_ = await send(producer, buses, note("given up", 1), body=b"{nope")
    await until(lambda: _count_is(reading, "given up", 1))
    async with reading.begin() as tx:
        [(letter,)] = await tx.sql("SELECT id FROM dead_letter WHERE message_id = $1", str(id_))
        await discard(tx, letter, actor="test")
    await until(lambda: _is_unparked(reading, "given up"))
    await send(producer, buses, note("given up", 1), id_=id_, body=b"{nope")
    await send(producer, buses, note("given up", 2))
    await until(lambda: _reaches(reading, "given up", 2))
    async with reading.begin() as tx:
        kept = await tx.sql("SELECT state FROM dead_letter WHERE key = 'given up'")
    assert kept == [("discarded",)]


async def _is_unparked(database: Database, book: str) -> bool:
    async with database.begin() as tx:
        return not await tx.sql("SELECT key FROM parked_key WHERE key = $1", book)


async def test_a_record_without_tenant_trace_or_key_is_handled(
    reading: Database, producer: AIOKafkaProducer, buses: Buses
) -> None:
    await send(producer, buses, note("bare", 1), change={"tenant_id": None, "traceparent": None, "ce_subject": None})
    await send(producer, buses, note("bare", 2), change={"traceparent": b"not a trace"})
    await until(lambda: _reaches(reading, "bare", 2))
    assert await effects(reading, "bare") == [1, 2]


async def test_two_readers_share_the_partitions_and_no_effect_is_lost_or_doubled(
    buses: Buses, ledger_database: Database, producer: AIOKafkaProducer, ledger: Ledger
) -> None:
    subscription = SAMPLE_EVENTS.batch(group="sample_ledger")(ledger.count)
    count = 400

    async def produce() -> None:
        for n in range(count):
            await send(producer, buses, note(f"shared {n % 7}", n))

    async with buses.reader(ledger_database, subscription):
        sending = asyncio.create_task(produce())
        await until(lambda: _reaches(ledger_database, "shared 0", 0))
        async with buses.reader(ledger_database, subscription):
            await sending
        for last in range(count - 7, count):  # the keys lie in several partitions: one may be ahead of another
            await until(lambda last=last: _reaches(ledger_database, f"shared {last % 7}", last))  # type: ignore[misc]
        found = [await effects(ledger_database, f"shared {k}") for k in range(7)]
    for k, numbers in enumerate(found):
        assert numbers == list(range(k, count, 7))


async def test_a_library_that_cancels_itself_while_it_stops_does_not_end_the_reader(
    buses: Buses, ledger_database: Database, ledger: Ledger, producer: AIOKafkaProducer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As aiokafka does when its broker goes away: the reader comes back with a new consumer."""
    stop = AIOKafkaConsumer.stop
    lookups = 0

    async def cancelled(consumer: AIOKafkaConsumer) -> None:
        await stop(consumer)
        raise asyncio.CancelledError

    async def first_fails(client: Any, topics: Any) -> dict[str, UUID]:
        nonlocal lookups
        lookups += 1
        if lookups == 5:  # after the four partitions have found their position
            raise KafkaConnectionError("the broker is gone")
        return await topic_ids(client, topics)

    monkeypatch.setattr(AIOKafkaConsumer, "stop", cancelled)
    monkeypatch.setattr(transactional, "topic_ids", first_fails)
    subscription = SAMPLE_EVENTS.batch(group="sample_ledger")(ledger.count)
    async with buses.reader(ledger_database, subscription):
        await send(producer, buses, note("stopping", 1))
        await until(lambda: _reaches(ledger_database, "stopping", 1))
    assert lookups > 5


async def test_a_partition_assigned_while_the_reader_leaves_is_not_kept_for_its_next_consumer(
    buses: Buses, ledger_database: Database, ledger: Ledger
) -> None:
    """Otherwise the next consumer would not read the partition: it would find it in the hands of the last one."""
    subscription = SAMPLE_EVENTS.batch(group="sample_ledger")(ledger.count)
    partition = TopicPartition(buses.prefix + SAMPLE_EVENTS.name, 0)

    async def assign() -> None:
        await reader.on_partitions_assigned([partition])

    async with buses.reader(ledger_database, subscription) as reader:
        await until(lambda: asyncio.sleep(0, len(reader._partitions) == SAMPLE_EVENTS.partitions))
        await asyncio.gather(reader._leave(), assign())
        assert reader._partitions == {}


async def test_a_damaged_batch_stops_its_partition_and_no_other(
    stack: Stack, buses: Buses, ledger_database: Database, ledger: Ledger, producer: AIOKafkaProducer
) -> None:
    """Kafka does not notice it. Without a guard in the reader, this batch would keep it from all partitions."""
    # The other tests of the module read their topic after this one.
    buses = Buses(buses.kafka, buses.rabbitmq, f"{buses.prefix}damaged.")
    await buses.provision(stack, Catalog(topics=SAMPLE.topics, queues=()))
    books = [f"damage {n}" for n in range(16)]
    for book in books:
        await send(producer, buses, note(book, 1, "written"))
    segments = list((stack.home / "kafka" / "data").glob(f"{buses.prefix}{SAMPLE_EVENTS.name}-*/*.log"))
    [damaged] = [segment for segment in segments if b'"damage 0"' in segment.read_bytes()]
    with damaged.open("r+b") as file:
        file.seek(damaged.read_bytes().index(b"written", damaged.read_bytes().index(b'"damage 0"')))
        file.write(b"changed")
    healthy = [book for book in books if f'"{book}"'.encode() not in damaged.read_bytes()]
    assert healthy
    subscription = SAMPLE_EVENTS.batch(group="sample_ledger")(ledger.count)
    async with buses.reader(ledger_database, subscription) as reader:
        for number in (1, 2):
            for book in healthy:
                await until(lambda book=book, number=number: _reaches(ledger_database, book, number))  # type: ignore[misc]
                await send(producer, buses, note(book, number + 1))
        [stopped] = reader.damaged
    assert damaged.parent.name == f"{stopped.topic}-{stopped.partition}"
    labels = {"consumer": "sample_ledger", "topic": SAMPLE_EVENTS.name, "partition": str(stopped.partition)}
    assert buses.metrics.registry.get_sample_value("claw_consumer_partition_stopped", labels) == 1
    assert await effects(ledger_database, "damage 0") == []
    assert "changed" not in str(ledger.calls)

    # A reader whose position is at Kafka does the same.
    indexed: list[str] = []

    async def index(records: list[Decoded]) -> None:
        indexed.extend(msgspec.to_builtins(record.message)["notebook"] for record in records)

    async def all_healthy() -> bool:
        return set(healthy) <= set(indexed)

    outside = SAMPLE_EVENTS.at_least_once(group="outside")(index)
    reading = AtLeastOnceReader(
        ledger_database, "outside", [outside], bootstrap=buses.kafka, metrics=buses.metrics, prefix=buses.prefix
    )
    task = asyncio.create_task(reading.run())
    await until(all_healthy)
    await reading.stop()
    await task
    assert reading.damaged == {stopped}
    assert "damage 0" not in indexed
