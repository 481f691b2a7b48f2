"""A projection is rebuilt from the owner's event store, even if Kafka has lost its first records."""

from __future__ import annotations

from datetime import timedelta
from uuid import UUID, uuid4

import pytest
from aiokafka import TopicPartition
from aiokafka.admin import AIOKafkaAdminClient
from aiokafka.admin.records_to_delete import RecordsToDelete

from infra.clock import utcnow, uuid7
from infra.errors import Conflict
from infra.postgres.database import Database
from infra.postgres.event_store import NewEvent, append
from infra.service.redrive import discard
from tests.infra.service.conftest import History
from tests.infra.service.test_replay import book, equal
from tooling.testing.sample.catalog import SAMPLE_EVENTS
from tooling.testing.sample.desk.domain import NoteWritten
from tooling.testing.sample.desk.publishing import NOTEBOOK
from tooling.testing.until import until


async def test_it_equals_the_live_tables_though_the_topic_lost_its_beginning(history: History) -> None:
    name = book("long ago")
    await history.write(name, "a", "b", "c")
    await history.caught_up()
    admin = AIOKafkaAdminClient(bootstrap_servers=history.buses.kafka)
    await admin.start()
    try:
        offsets = await history.sql("SELECT partition, next_offset FROM consumer_offset WHERE next_offset > 0")
        topic = history.buses.prefix + SAMPLE_EVENTS.name
        await admin.delete_records({TopicPartition(topic, n): RecordsToDelete(offset) for n, offset in offsets})
    finally:
        await admin.close()
    with pytest.raises(Conflict, match="no longer holds its first records"):
        await history.from_kafka()

    rebuilt = await history.from_events()
    assert equal(rebuilt) == {"total": True, "effect": True}
    assert rebuilt.switched
    await history.write(name, "d")
    await history.caught_up()
    assert await history.effects(name) == [(1, 1), (2, 2), (3, 3), (4, 4)]


async def test_dead_letters_of_the_live_consumer_are_not_applied(history: History) -> None:
    name, bad = book("set aside"), uuid4().hex
    history.ledger.refused.add(bad)
    await history.write(name, bad, "behind")
    await history.letter(name, "waiting")
    assert equal(await history.from_events()) == {"total": True, "effect": True}
    assert await history.effects(name) == []

    async with Database(history.admin, "sample_ledger").begin() as tx:
        await discard(tx, (await history.letter(name, "failed")).id, actor="test")
    await until(lambda: history.effects(name))
    assert equal(await history.from_events()) == {"total": True, "effect": True}
    assert await history.effects(name) == [(2, 1)]


async def test_facts_that_the_live_consumer_has_not_seen_are_left_to_it(history: History) -> None:
    name = book("unseen")
    # In the store but never sent, as while the relay or the consumer is behind.
    async with history.desk.begin() as tx:
        unseen = NewEvent(NOTEBOOK.stream(name), uuid7(), NoteWritten(1, "unseen"), None)
        await append(await tx.connection(), [unseen])
    try:
        assert equal(await history.from_events()) == {"total": True, "effect": True}
        assert await history.effects(name) == []
    finally:
        await history.sql("DELETE FROM sample_desk.event WHERE stream_id = $1", f"notebook:{name}")


async def test_a_fact_older_than_the_inbox_keeps_ids_counts_as_handled(history: History) -> None:
    name = book("ancient")
    then = utcnow() - timedelta(days=200)
    id_ = UUID(int=int(then.timestamp() * 1000) << 80 | uuid7().int & (1 << 80) - 1)
    async with history.desk.begin() as tx:
        tx.append(NOTEBOOK.stream(name), NoteWritten(1, "ancient"), event_id=id_)
    await until(lambda: history.effects(name))
    # Maintenance does this with a month that ended 120 days ago.
    floor = "sample_ledger.uuid7_floor(now() - interval '199 days')"
    try:
        forgotten = await history.sql(f"DELETE FROM inbox WHERE message_id < {floor} RETURNING message_id")
        assert len(forgotten) == 1
        assert equal(await history.from_events()) == {"total": True, "effect": True}
        assert await history.effects(name) == [(1, 1)]
    finally:
        await history.sql("INSERT INTO inbox VALUES ($1, 'sample_ledger')", forgotten[0][0])
