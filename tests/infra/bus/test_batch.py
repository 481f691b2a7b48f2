"""Tests of a partition's batches, with records that no broker has sent."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any, NamedTuple
from uuid import UUID

import msgspec
import pytest
from prometheus_client import CollectorRegistry
from structlog.testing import capture_logs

from infra.bus.batch import Batches, Fenced
from infra.bus.dispatch import decode_records
from infra.clock import utcnow, uuid7
from infra.observe.metrics import Metrics
from infra.postgres.database import Database
from infra.postgres.db import sql
from infra.postgres.inbox import mark_handled
from infra.postgres.tx import Tx
from protos.envelope import Envelope, Message
from protos.messages.sample import NoteTaken, TakeNote
from tooling.testing.sample.catalog import SAMPLE_EVENTS
from tooling.testing.until import until

TOPIC_ID = UUID(int=1)


class Record(NamedTuple):
    """The fields of an aiokafka record that are read."""

    offset: int
    headers: tuple[tuple[str, bytes | None], ...]
    value: bytes | None
    key: bytes | None = b"book"


def record(offset: int, id_: UUID | None = None, changed: Mapping[str, bytes | None] | None = None) -> Record:
    """The record of a note with the number `offset`."""
    envelope = Envelope(id=id_ or uuid7(), source="test", type=NoteTaken.wire_name(), time=utcnow(), tenant_id="acme")
    headers: dict[str, bytes | None] = {name: value.encode() for name, value in envelope.headers().items()}
    body = msgspec.json.encode(NoteTaken(notebook="book", number=offset, text="x"))
    return Record(offset, tuple((headers | dict(changed or {})).items()), body)


class Taken:
    """A handler that keeps the numbers and the tenants of its notes, batch by batch."""

    def __init__(self) -> None:
        self.batches: list[list[int]] = []
        self.tenants: set[str] = set()

    async def take(self, notes: list[NoteTaken], tx: Tx) -> None:
        self.batches.append([note.number for note in notes])
        self.tenants |= {tx.origins[id(note)]["tenant_id"] for note in notes}


@pytest.fixture
def taken() -> Taken:
    return Taken()


@pytest.fixture
async def batches(ledger_database: Database, taken: Taken) -> Batches:
    group = f"batches-{uuid7()}"
    subscription = SAMPLE_EVENTS.batch(group=group)(taken.take)
    batches = Batches(ledger_database, group, SAMPLE_EVENTS, 0, [subscription], Metrics(CollectorRegistry()))
    await batches.find_position(TOPIC_ID, 0, 100)
    return batches


def position(batches: Batches) -> int:
    assert batches.position is not None
    return batches.position.next_offset


async def handled(database: Database, batches: Batches) -> int:
    async with database.begin() as tx:
        [(count,)] = await tx.sql("SELECT count(*) FROM inbox WHERE consumer = $1", batches._group)
    return int(count)


async def test_a_batch_is_handled_in_its_order_and_marked(
    batches: Batches, taken: Taken, ledger_database: Database
) -> None:
    await batches.process(TOPIC_ID, [record(0), record(1), record(2)])
    assert taken.batches == [[0, 1, 2]]
    assert taken.tenants == {"acme"}
    assert position(batches) == 3
    assert await handled(ledger_database, batches) == 3


async def test_messages_of_a_batch_that_were_handled_before_are_dropped(batches: Batches, taken: Taken) -> None:
    one, two = uuid7(), uuid7()
    await batches.process(TOPIC_ID, [record(0, one), record(1, two)])
    await batches.process(TOPIC_ID, [record(2, two), record(3), record(4, one)])
    await batches.process(TOPIC_ID, [record(5, one)])
    await batches.process(TOPIC_ID, [record(6), record(7)])
    assert taken.batches == [[0, 1], [3], [6, 7]]
    assert position(batches) == 8


async def test_a_message_that_a_batch_holds_twice_is_handled_once(batches: Batches, taken: Taken) -> None:
    twice = uuid7()
    await batches.process(TOPIC_ID, [record(0, twice), record(1), record(2, twice)])
    assert taken.batches == [[0, 1]]
    assert position(batches) == 3


async def test_each_tenant_has_a_line_about_its_dead_letters(batches: Batches) -> None:
    other = {"tenant_id": b"other", "ce_type": b"sample.v9.Unknown"}
    unreadable = [{"ce_type": b"sample.v9.Unknown"}, other, other]
    with capture_logs() as lines:
        await batches.process(TOPIC_ID, [record(n, changed=changed) for n, changed in enumerate(unreadable)])
    told = {line["tenant"]: line["count"] for line in lines if "dead letters" in line["event"]}
    assert told == {"acme": 1, "other": 2}


@pytest.mark.parametrize("committed", [True, False])
async def test_a_batch_waits_for_the_transaction_that_handles_one_of_its_messages(
    batches: Batches, taken: Taken, ledger_database: Database, committed: bool
) -> None:
    one, two = uuid7(), uuid7()

    async def waits() -> bool:
        async with ledger_database.engine.connect() as connection:
            return bool(
                await sql(connection, "SELECT 1 FROM pg_locks WHERE NOT granted AND locktype = 'transactionid'")
            )

    first = await ledger_database.engine.connect()
    await mark_handled(first, batches._group, [two])
    second = asyncio.create_task(batches.process(TOPIC_ID, [record(0, one), record(1, two)]))
    await until(waits)
    await (first.commit() if committed else first.rollback())
    await first.close()
    await second
    assert taken.batches == ([[0]] if committed else [[0, 1]])


async def test_a_record_that_cannot_be_read_is_told_apart_from_the_others(
    batches: Batches, taken: Taken, ledger_database: Database
) -> None:
    other = record(0, changed={"ce_subject": "Größe".encode()})
    bad: list[Any] = [
        record(1, changed={"ce_type": None}),
        record(2, changed={"ce_source": b"\xff"}),
        record(3)._replace(value=b""),
    ]
    for each in (other, *bad, record(4, changed={"ce_id": b"no"}), record(5)._replace(value=None)):
        assert decode_records([each], SAMPLE_EVENTS.messages) is None
    # Its own key for each: the key of a record that cannot be read is parked.
    records = [each._replace(key=f"{batches._group} {each.offset}".encode()) for each in (other, *bad, record(4))]
    await batches.process(TOPIC_ID, records)
    assert taken.batches == [[0, 4]]
    assert position(batches) == 5
    # Batches are also handled while keys are parked.
    await batches.process(TOPIC_ID, [record(5), record(6)._replace(key=records[1].key), record(7)])
    assert taken.batches == [[0, 4], [5, 7]]
    async with ledger_database.begin() as tx:
        rows = await tx.sql(
            "SELECT message_id, state FROM dead_letter WHERE consumer = $1 ORDER BY seq", batches._group
        )
    assert [state for _, state in rows] == ["failed", "failed", "failed", "waiting"]


async def stored(database: Database, batches: Batches) -> int:
    async with database.begin() as tx:
        [(offset,)] = await tx.sql("SELECT next_offset FROM consumer_offset WHERE consumer = $1", batches._group)
    return int(offset)


@pytest.mark.parametrize("hint", [True, False])
async def test_batches_without_an_effect_cost_no_transaction_and_move_the_position(
    ledger_database: Database, hint: bool
) -> None:
    group, heard = f"batches-{uuid7()}", []

    async def hear(note: NoteTaken, tx: Tx) -> None:
        heard.append(note.number)
        tx.woken.add("lane of the hint")

    # A handler of hints, or one of a type that does not come.
    message: type[Message] = NoteTaken if hint else TakeNote
    subscription = SAMPLE_EVENTS.each(message, group=group, hint=hint)(hear)
    batches = Batches(ledger_database, group, SAMPLE_EVENTS, 0, [subscription], Metrics(CollectorRegistry()))
    woken: list[str] = []
    ledger_database.on_items(woken.append)
    await batches.find_position(TOPIC_ID, 0, 100)
    await batches.process(TOPIC_ID, [record(0), record(1)])
    await batches.process(TOPIC_ID, [record(2)])
    assert heard == ([0, 1, 2] if hint else [])
    assert woken == (["lane of the hint"] * 2 if hint else [])
    assert (position(batches), await stored(ledger_database, batches), batches.is_ahead) == (3, 0, True)
    assert await handled(ledger_database, batches) == 0
    await batches.save()
    assert (position(batches), await stored(ledger_database, batches), batches.is_ahead) == (3, 3, False)
    # A second reader went on meanwhile: the position is not stored.
    await batches.process(TOPIC_ID, [record(3)])
    await ledger_database.autocommit("UPDATE consumer_offset SET next_offset = 50 WHERE consumer = $1", group)
    with pytest.raises(Fenced):
        await batches.save()


async def test_the_position_behind_batches_without_an_effect_is_stored_after_a_while(
    ledger_database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    group = f"batches-{uuid7()}"

    async def hear(note: NoteTaken, tx: Tx) -> None:
        return

    subscription = SAMPLE_EVENTS.each(NoteTaken, group=group, hint=True)(hear)
    batches = Batches(ledger_database, group, SAMPLE_EVENTS, 0, [subscription], Metrics(CollectorRegistry()))
    await batches.find_position(TOPIC_ID, 0, 100)
    await batches.process(TOPIC_ID, [record(0)])
    monkeypatch.setattr("infra.bus.batch.SAVE_SECONDS", 0.0)
    await batches.process(TOPIC_ID, [record(1)])
    assert (await stored(ledger_database, batches), batches.is_ahead) == (2, False)
