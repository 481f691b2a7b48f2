"""The reader for effects outside of PostgreSQL: every record at least once, and none holds up another."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from uuid import uuid4

import msgspec
import pytest
from aiokafka import AIOKafkaConsumer, AIOKafkaProducer
from aiokafka.admin import AIOKafkaAdminClient
from structlog.testing import capture_logs

from infra.bus.at_least_once import AtLeastOnceReader
from infra.bus.dispatch import Decoded
from infra.clock import utcnow, uuid7
from infra.errors import InvalidMessage, Transient
from infra.postgres.database import Database
from infra.postgres.dead_letters import read_payload
from infra.service.redrive import Redriver, request_redrive
from protos.envelope import Envelope
from protos.messages.sample import NoteTaken
from protos.topology import Catalog
from tests.infra.bus.conftest import Buses
from tooling.testing.sample.catalog import SAMPLE, SAMPLE_EVENTS
from tooling.testing.stack import Stack
from tooling.testing.until import until

GROUP = "outside"


class Store:
    """Takes notes by their message's id, as a search index does; refuses and fails as it is told to."""

    def __init__(self) -> None:
        self.notes: dict[str, str] = {}
        self.calls: list[list[str]] = []
        self.away = False
        self.refused: set[str] = set()
        self.broken: set[str] = set()

    async def take(self, records: list[Decoded]) -> None:
        texts = [msgspec.to_builtins(record.message)["text"] for record in records]
        self.calls.append(texts)
        if self.away:
            raise Transient("the store is away")
        if bad := self.refused & set(texts):
            raise InvalidMessage("text", f"{bad} is refused")
        if self.broken & set(texts):
            raise ValueError("a fault of the handler")
        self.notes |= {str(record.id): text for record, text in zip(records, texts, strict=True)}

    def has(self, *texts: str) -> bool:
        return set(texts) <= set(self.notes.values())


@pytest.fixture
async def producer(buses: Buses) -> AsyncIterator[AIOKafkaProducer]:
    async with AIOKafkaProducer(bootstrap_servers=buses.kafka, acks="all") as producer:
        yield producer


@pytest.fixture(autouse=True)
async def no_dead_letters(ledger_database: Database) -> None:
    async with ledger_database.begin() as tx:
        await tx.sql("DELETE FROM dead_letter")


@asynccontextmanager
async def reading(buses: Buses, database: Database, store: Store) -> AsyncIterator[AtLeastOnceReader]:
    reader = AtLeastOnceReader(
        database,
        GROUP,
        [SAMPLE_EVENTS.at_least_once(group=GROUP)(store.take)],
        bootstrap=buses.kafka,
        metrics=buses.metrics,
        prefix=buses.prefix,
        session_ms=6000,
    )
    task = asyncio.create_task(reader.run())
    yield reader
    await reader.stop()
    await task


async def send(producer: AIOKafkaProducer, buses: Buses, *texts: str, body: bytes | None = None) -> None:
    for text in texts:
        message = NoteTaken(notebook="n", number=1, text=text)
        envelope = Envelope(id=uuid7(), source="test", type=NoteTaken.wire_name(), time=utcnow(), tenant_id="t")
        headers = [(name, value.encode()) for name, value in envelope.headers().items()]
        value = msgspec.json.encode(message) if body is None else body
        await producer.send_and_wait(buses.prefix + SAMPLE_EVENTS.name, value, key=b"n", headers=headers)


async def has(store: Store, *texts: str) -> None:
    async def all_of_them() -> bool:
        return store.has(*texts)

    await until(all_of_them)


async def dead(database: Database) -> list[tuple[str, str, int]]:
    """Text, state and attempts of the dead letters."""
    async with database.begin() as tx:
        rows = await tx.sql("SELECT id, state, attempts FROM dead_letter WHERE consumer = $1 ORDER BY seq", GROUP)
        return [
            (await read_payload(await tx.connection(), id_, database.sealing), state, attempts)
            for id_, state, attempts in rows
        ]


async def test_what_came_before_is_read_and_after_a_restart_only_what_is_new(
    buses: Buses, producer: AIOKafkaProducer, ledger_database: Database
) -> None:
    await send(producer, buses, "a1", "a2")
    first, second = Store(), Store()
    async with reading(buses, ledger_database, first):
        await has(first, "a1", "a2")
    await send(producer, buses, "a3")
    async with reading(buses, ledger_database, second):
        await has(second, "a3")
    assert set(second.notes.values()) == {"a3"}


async def test_while_the_store_is_away_the_offset_stays_and_nothing_is_a_dead_letter(
    buses: Buses, producer: AIOKafkaProducer, ledger_database: Database
) -> None:
    store, later = Store(), Store()
    store.away = True
    async with reading(buses, ledger_database, store) as reader:
        await send(producer, buses, "b1", "b2")

        async def tried_twice() -> bool:
            return sum("b1" in call for call in store.calls) >= 2

        await until(tried_twice)
        # A restart would not bring the store back.
        assert reader.stuck_for() < 60
    assert await dead(ledger_database) == []
    async with reading(buses, ledger_database, later):
        await has(later, "b1", "b2")


async def test_one_that_is_refused_or_unreadable_is_set_aside_alone_and_redriven_later(
    buses: Buses, producer: AIOKafkaProducer, ledger_database: Database
) -> None:
    store = Store()
    store.refused, store.broken = {"c3"}, {"c6"}
    await send(producer, buses, *(f"c{n}" for n in range(10)))
    await send(producer, buses, "-", body=b"{no json")
    await send(producer, buses, "c10")
    with capture_logs() as lines:
        async with reading(buses, ledger_database, store):
            await has(store, *(f"c{n}" for n in range(11) if n not in (3, 6)))

            async def three() -> list[tuple[str, str, int]] | None:
                letters = await dead(ledger_database)
                return letters if len(letters) == 3 else None

            letters = {payload: (state, attempts) for payload, state, attempts in await until(three)}
    assert {line["tenant"] for line in lines if "dead letter" in line["event"]} == {"t"}
    assert letters.pop("{no json") == ("failed", 1)
    by_text = {msgspec.json.decode(payload)["text"]: found for payload, found in letters.items()}
    # A refused message would be refused again; a fault might pass.
    assert by_text == {"c3": ("failed", 1), "c6": ("failed", 3)}
    assert not store.has("c3")
    store.refused = set()
    subscription = SAMPLE_EVENTS.at_least_once(group=GROUP)(store.take)
    redriver = Redriver(ledger_database, [subscription], buses.metrics)
    async with ledger_database.begin() as tx:
        [(id_,)] = await tx.sql("SELECT id FROM dead_letter WHERE error LIKE '%c3%'")
        await request_redrive(tx, [id_], actor="test")
    assert await redriver.step()
    assert store.has("c3")
    assert sorted(state for _, state, _ in await dead(ledger_database)) == ["failed", "failed", "redriven"]


async def test_two_processes_share_the_partitions_and_miss_nothing(
    buses: Buses, producer: AIOKafkaProducer, ledger_database: Database
) -> None:
    store = Store()
    async with reading(buses, ledger_database, store):
        await send(producer, buses, *(f"d{n}" for n in range(20)))
        async with reading(buses, ledger_database, store):
            await send(producer, buses, *(f"d{n}" for n in range(20, 40)))
        await send(producer, buses, *(f"d{n}" for n in range(40, 60)))
        await has(store, *(f"d{n}" for n in range(60)))


async def made_anew(buses: Buses, stack: Stack) -> None:
    admin = AIOKafkaAdminClient(bootstrap_servers=buses.kafka)
    await admin.start()
    name = buses.prefix + SAMPLE_EVENTS.name
    await admin.delete_topics([name])

    async def gone() -> bool:
        return name not in await admin.list_topics()

    await until(gone)
    await buses.provision(stack, Catalog(topics=SAMPLE.topics, queues=()))
    await admin.close()


async def test_a_topic_that_was_made_anew_is_read_from_its_beginning(
    buses: Buses, ledger_database: Database, stack: Stack
) -> None:
    async def sent(*texts: str) -> None:
        # Another one: an idempotent producer would wait for the old log.
        async with AIOKafkaProducer(bootstrap_servers=buses.kafka, acks="all") as producer:
            await send(producer, buses, *texts)

    store = Store()
    await sent(*(f"e{n}" for n in range(5)))
    async with reading(buses, ledger_database, store):
        await has(store, "e4")
        await made_anew(buses, stack)
        await sent("f1", "f2")
        await has(store, "f1", "f2")
        await made_anew(buses, stack)
        # More than the old log had: the old position is an offset of the new one.
        await sent(*(f"h{n}" for n in range(5)))
        await has(store, *(f"h{n}" for n in range(5)))
    await made_anew(buses, stack)
    await sent("g1", "g2")
    # A process that still held the old position has stored it.
    await store_position(buses, metadata=str(uuid4()))
    async with reading(buses, ledger_database, store):
        await has(store, "g1", "g2")


async def test_a_position_without_the_id_of_its_topic_is_kept(
    buses: Buses, producer: AIOKafkaProducer, ledger_database: Database
) -> None:
    """Former versions of the reader have stored it so."""
    await send(producer, buses, "i1", "i2")
    await store_position(buses, metadata="")
    store = Store()
    async with reading(buses, ledger_database, store):
        await has(store, "i2")
    assert store.calls == [["i2"]]


async def store_position(buses: Buses, metadata: str) -> None:
    """Stores the position before the last record of each partition for the group."""
    name = buses.prefix + SAMPLE_EVENTS.name
    async with AIOKafkaConsumer(
        name, bootstrap_servers=buses.kafka, group_id=buses.prefix + GROUP, enable_auto_commit=False
    ) as consumer:

        async def assigned() -> bool:
            return len(consumer.assignment()) == SAMPLE_EVENTS.partitions

        await until(assigned)
        ends = await consumer.end_offsets(list(consumer.assignment()))
        await consumer.commit({tp: (max(end - 1, 0), metadata) for tp, end in ends.items()})
