"""Appending: compare-and-set, gapless, idempotent by event id; upcasting on read."""

from __future__ import annotations

import asyncio

import msgspec
import pytest

from infra.clock import uuid7
from infra.errors import Conflict
from infra.postgres import event_store
from infra.postgres.database import Database
from infra.postgres.db import sql
from infra.postgres.event_store import NewEvent
from infra.postgres.tx import Tx
from infra.postgres.upcasting import EventTypes
from tests.infra.lanes.lane_fixture import TENANT, Parcel, items, new_lane, put
from tooling.testing.sample.desk.domain import Notebook, NoteWritten, WriteNote
from tooling.testing.sample.desk.publishing import NOTEBOOK
from tooling.testing.until import until


async def versions(desk: Database, notebook: str) -> list[int]:
    async with desk.begin() as tx:
        rows = await tx.sql("SELECT version FROM event WHERE stream_id = $1 ORDER BY version", f"notebook:{notebook}")
    return [version for (version,) in rows]


async def append(desk: Database, *events: NewEvent) -> list[NewEvent]:
    async with desk.begin() as tx:
        [(stored,)] = await event_store.append(await tx.connection(), events)
    return [event for event in events if event.event_id not in stored]


async def test_concurrent_decisions_leave_no_gap_and_no_repeat(desk: Database) -> None:
    async def write(n: int) -> None:
        async def work(tx: Tx) -> None:
            await tx.decide(NOTEBOOK.stream("busy"), WriteNote(f"note {n}"))

        await desk.run(work)

    # More at once than a transaction that meets another is run again: they take turns instead.
    await asyncio.gather(*(write(n) for n in range(40)))
    assert await versions(desk, "busy") == list(range(1, 41))
    async with desk.begin() as tx:
        assert await tx.load(NOTEBOOK.stream("busy")) == Notebook(notes=40)


async def test_an_append_at_a_version_that_moved_on_is_a_conflict_and_changes_nothing(desk: Database) -> None:
    stream = NOTEBOOK.stream("moved")
    await append(desk, NewEvent(stream, uuid7(), NoteWritten(1, "first"), 0))
    with pytest.raises(Conflict, match="at version 1, expected 0"):
        await append(desk, NewEvent(stream, uuid7(), NoteWritten(1, "other first"), 0))
    assert await versions(desk, "moved") == [1]


async def test_the_same_event_again_appends_nothing(desk: Database) -> None:
    event = NewEvent(NOTEBOOK.stream("again"), uuid7(), NoteWritten(1, "once"), 0)
    assert await append(desk, event) == [event]
    assert await append(desk, event) == []
    assert await versions(desk, "again") == [1]


async def test_an_event_that_is_stored_already_publishes_nothing_again(desk: Database) -> None:
    id_ = uuid7()
    for _ in range(2):
        async with desk.begin() as tx:
            tx.append(NOTEBOOK.stream("published once"), NoteWritten(1, "x"), event_id=id_)
    async with desk.begin() as tx:
        assert await tx.sql("SELECT count(*) FROM outbox WHERE key = 'published once'") == [(1,)]


async def test_a_part_of_what_is_appended_being_stored_is_a_conflict(desk: Database) -> None:
    stream = NOTEBOOK.stream("part")
    first = NewEvent(stream, uuid7(), NoteWritten(1, "a"), None)
    await append(desk, first)
    with pytest.raises(Conflict):
        await append(desk, first, NewEvent(stream, uuid7(), NoteWritten(2, "b"), None))
    assert await versions(desk, "part") == [1]


async def test_the_outbox_follows_the_streams_order(desk: Database) -> None:
    async def write(n: int) -> None:
        async with desk.begin() as tx:
            tx.append(NOTEBOOK.stream("ordered"), NoteWritten(n, "x"))

    await asyncio.gather(*(write(n) for n in range(8)))
    async with desk.begin() as tx:
        stored = await tx.sql("SELECT data FROM event WHERE stream_id = 'notebook:ordered' ORDER BY version")
        sent = await tx.sql("SELECT body FROM outbox WHERE key = 'ordered' ORDER BY position")
    numbers = [msgspec.json.decode(data)["number"] for (data,) in stored]
    assert [msgspec.json.decode(body)["number"] for (body,) in sent] == numbers


async def test_streams_are_locked_before_lanes(desk: Database) -> None:
    kind, stream = new_lane(), NOTEBOOK.stream("locked")
    await put(desk, kind, "a", 1)

    async def write(tx: Tx) -> None:
        tx.append(stream, NoteWritten(2, "x"))
        tx.enqueue(kind, lane="a", item=Parcel(2))

    async with desk.begin() as first:
        first.append(stream, NoteWritten(1, "x"))
        await first.flush()
        second = asyncio.create_task(desk.run(write, tenant_id=TENANT))

        async def waits() -> bool:
            async with desk.begin() as tx:
                return bool(await tx.sql("SELECT FROM pg_locks WHERE NOT granted AND locktype = 'transactionid'"))

        await until(waits)
        async with desk.begin() as tx:
            assert await tx.sql("SELECT 1 FROM lane WHERE kind = $1 FOR UPDATE NOWAIT", kind.name) == [(1,)]
    await second
    assert [seq for (seq,) in await items(desk, kind, "seq")] == [1, 2]


async def test_a_failing_transaction_leaves_no_event_and_no_message(desk: Database) -> None:
    with pytest.raises(RuntimeError, match="after all"):
        async with desk.begin() as tx:
            await tx.decide(NOTEBOOK.stream("undone"), WriteNote("x"))
            await tx.flush()
            raise RuntimeError("after all")
    assert await versions(desk, "undone") == []
    async with desk.begin() as tx:
        assert await tx.sql("SELECT count(*) FROM outbox WHERE key = 'undone'") == [(0,)]


async def test_a_transaction_takes_no_connection_before_its_first_use(desk: Database) -> None:
    async with desk.begin() as tx:
        assert desk.engine.taken == 0
        await tx.sql("SELECT 1")
        assert desk.engine.taken == 1


async def test_an_old_event_is_read_in_its_current_form(desk: Database) -> None:
    async with desk.begin() as tx:
        await tx.sql("INSERT INTO stream VALUES ('notebook:old', 1)")
        await tx.sql(
            "INSERT INTO event (stream_id, version, event_id, type, schema_version, data, headers) "
            "VALUES ('notebook:old', 1, $1, 'NoteWritten', 1, $2, '{}')",
            uuid7(),
            b'{"number":7,"note":"from the first version"}',
        )
    async with desk.engine.connect() as connection:
        stored = [e async for e in event_store.read_all(connection, NOTEBOOK) if e.stream_id == "old"]
        assert await sql(connection, "SELECT 1") == [(1,)]
    assert [event.event for event in stored] == [NoteWritten(7, "from the first version")]


def test_a_missing_upcaster_is_found_when_the_kind_is_declared() -> None:
    with pytest.raises(ValueError, match="no upcaster from version 1 to 2"):
        EventTypes(NoteWritten)


def test_an_event_of_a_newer_version_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match="NoteWritten: version 3 is newer than the 2 known here"):
        NOTEBOOK.events.decode("NoteWritten", 3, b"{}")
    with pytest.raises(ValueError, match="event type Unheard: unknown"):
        NOTEBOOK.events.decode("Unheard", 1, b"{}")
