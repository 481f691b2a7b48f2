"""Read models are compared with their source and repaired, while the service writes both."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Any

import pytest
from prometheus_client import CollectorRegistry
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from infra.clock import utcnow, uuid7
from infra.errors import Conflict
from infra.observe.metrics import Metrics
from infra.postgres import read_models
from infra.postgres.database import Database
from infra.postgres.db import create_engine, sql
from infra.postgres.read_models import ReadModel, RowDifference
from infra.service import verification
from infra.service.maintenance import Maintenance, last_time
from infra.service.verification import VerificationResult, verify
from tests.infra.conftest import SampleDatabase
from tests.infra.service.books import BOOKS, TABLE, write
from tooling.stack.checkout import CHECKOUT
from tooling.testing.until import until

# A busy machine may take longer to reach the lock than a transaction may be idle.
UNHURRIED = "SET LOCAL idle_in_transaction_session_timeout = 0"
NAMES = [f"book {letter}" for letter in "abcdefg"]


@dataclass
class Desk:
    admin: AsyncEngine
    database: Database

    async def write(self, name: str, *texts: str) -> None:
        for text in texts:
            async with self.database.begin() as tx:
                await write(tx, name, text)

    async def sql(self, statement: str, *arguments: Any) -> Sequence[tuple[Any, ...]]:
        async with self.admin.begin() as connection:
            return await sql(connection, statement, *arguments)

    async def verify(self, model: ReadModel = BOOKS, **options: Any) -> VerificationResult:
        return await verify(self.admin, "sample_desk", model, **options)

    async def books(self) -> dict[str, tuple[int, int]]:
        rows = await self.sql("SELECT name, notes, letters FROM book")
        return {name: (notes, letters) for name, notes, letters in rows}

    async def waits_for(self, mode: str) -> bool:
        """True if a transaction waits for a lock on the table in this mode."""
        return bool(
            await self.sql(
                "SELECT 1 FROM pg_locks WHERE relation = 'sample_desk.book'::regclass AND NOT granted AND mode = $1",
                mode,
            )
        )


@pytest.fixture
async def desk_of_books(sample: SampleDatabase, desk: Database) -> AsyncIterator[Desk]:
    """Seven notebooks with two notes each."""
    admin = create_engine(sample.admin_url, schema="sample_desk")
    found = Desk(admin, desk)
    async with admin.begin() as connection:
        await sql(connection, "SET LOCAL ROLE sample_desk_owner")
        await sql(connection, TABLE)
    for table in ("event", "stream", "book", "read_model"):
        await found.sql(f"DELETE FROM {table}")
    for name in NAMES:
        await found.write(name, "ab", "cde")
    yield found
    await admin.dispose()


async def test_an_intact_read_model_is_equal(desk_of_books: Desk) -> None:
    told: list[tuple[int, int]] = []
    found = await desk_of_books.verify(progress=lambda done, total: told.append((done, total)))
    assert (found.rows, found.rebuilt_rows, found.different, found.finished) == (7, 7, 0, True)
    assert found.live_hash == found.rebuilt_hash != "0"
    assert told == [(2, 7), (4, 7), (6, 7), (7, 7), (7, 7)]


async def corrupt(desk: Desk) -> list[RowDifference]:
    await desk.sql("UPDATE book SET letters = 6, notes = 3 WHERE name = 'book b'")
    await desk.sql("UPDATE book SET letters = 6 WHERE name = 'book c'")
    await desk.sql("DELETE FROM book WHERE name = 'book e'")
    await desk.sql("INSERT INTO book VALUES ('stray', 1, 1)")
    return [
        RowDifference("book b", "notes, letters"),
        RowDifference("book c", "letters"),
        RowDifference("book e", "missing"),
        RowDifference("stray", "extra"),
    ]


async def test_rows_that_differ_are_found_and_stay_until_they_are_repaired(desk_of_books: Desk) -> None:
    intact = await desk_of_books.books()
    expected = await corrupt(desk_of_books)
    corrupted = await desk_of_books.books()

    found = await desk_of_books.verify()
    assert (found.different, found.repaired, found.differences) == (4, 0, expected)
    assert found.live_hash != found.rebuilt_hash
    assert await desk_of_books.books() == corrupted

    repaired = await desk_of_books.verify(switch=True)
    assert (repaired.different, repaired.repaired, repaired.left) == (4, 4, 0)
    assert await desk_of_books.books() == intact
    assert (await desk_of_books.verify()).different == 0


async def test_a_table_with_columns_of_another_origin_gets_and_loses_no_rows(desk_of_books: Desk) -> None:
    await corrupt(desk_of_books)
    found = await desk_of_books.verify(replace(BOOKS, whole=False), switch=True)
    assert (found.different, found.repaired, found.left) == (4, 2, 2)
    books = await desk_of_books.books()
    assert (books["book b"], books["book c"]) == ((2, 5), (2, 5))
    assert "book e" not in books
    assert "stray" in books


async def test_nothing_is_lost_or_doubled_while_the_service_writes(desk_of_books: Desk) -> None:
    done = asyncio.Event()

    async def keep_writing(name: str) -> int:
        rounds = 0
        while not done.is_set():
            rounds += 1
            await desk_of_books.write(name, "xyz")
        return rounds

    writers = [asyncio.create_task(keep_writing(name)) for name in NAMES[:3]]
    try:
        for _ in range(5):
            await desk_of_books.sql("UPDATE book SET letters = letters - 1 WHERE name = 'book b'")
            assert (await desk_of_books.verify()).differences == [RowDifference("book b", "letters")]
            assert (await desk_of_books.verify(switch=True)).left == 0
    finally:
        done.set()
        rounds = await asyncio.gather(*writers)
    assert min(rounds) > 0
    books = await desk_of_books.books()
    assert [books[name] for name in NAMES[:3]] == [(2 + n, 5 + 3 * n) for n in rounds]
    assert (await desk_of_books.verify()).different == 0


async def test_a_repair_waits_for_a_transaction_that_has_written_and_keeps_its_event(desk_of_books: Desk) -> None:
    await desk_of_books.sql("UPDATE book SET letters = 6 WHERE name = 'book b'")
    async with desk_of_books.database.begin() as tx:
        await tx.sql(UNHURRIED)
        await write(tx, "book b", "late")
        await tx.flush()
        repairing = asyncio.create_task(desk_of_books.verify(switch=True))
        await until(lambda: desk_of_books.waits_for("ExclusiveLock"))
    await repairing
    assert (await desk_of_books.books())["book b"] == (3, 9)


async def test_a_repair_waits_for_a_transaction_that_has_locked_a_row(desk_of_books: Desk) -> None:
    """In a weaker mode both would wait for each other: the writer for the table, the repair for the row."""
    await desk_of_books.sql("UPDATE book SET letters = 6 WHERE name = 'book b'")
    async with desk_of_books.database.begin() as tx:
        await tx.sql(UNHURRIED)
        await tx.sql("SELECT FROM book WHERE name = 'book b' FOR UPDATE")
        repairing = asyncio.create_task(desk_of_books.verify(switch=True))
        await until(lambda: desk_of_books.waits_for("ExclusiveLock"))
        await write(tx, "book b", "late")
    await repairing
    assert (await desk_of_books.books())["book b"] == (3, 9)


async def test_an_event_that_comes_between_rebuild_and_commit_waits_and_is_kept(
    desk_of_books: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    await desk_of_books.sql("UPDATE book SET letters = 6 WHERE name = 'book b'")
    writing: list[asyncio.Task[None]] = []

    async def meanwhile(connection: AsyncConnection, model: ReadModel, scopes: Sequence[str]) -> None:
        await read_models.repair(connection, model, scopes)
        writing.append(asyncio.create_task(desk_of_books.write("book b", "late")))
        await until(lambda: desk_of_books.waits_for("RowExclusiveLock"))

    monkeypatch.setattr(verification, "repair", meanwhile)
    await desk_of_books.verify(switch=True)
    await asyncio.gather(*writing)
    assert len(writing) == 1
    assert (await desk_of_books.books())["book b"] == (3, 9)


async def test_a_table_that_is_always_in_use_is_reported(desk_of_books: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verification, "LOCK_TIMEOUT", "10ms")
    monkeypatch.setattr(verification, "LOCK_ATTEMPTS", 2)
    await desk_of_books.sql("UPDATE book SET letters = 6 WHERE name = 'book b'")
    async with desk_of_books.database.begin() as tx:
        await write(tx, "book g", "held")
        with pytest.raises(Conflict, match="table book is in use by long transactions"):
            await desk_of_books.verify(switch=True)


@pytest.mark.parametrize(
    ("point", "nth"),
    [
        # Only the fourth batch needs no repair.
        ("before_verified_batch", "1"),
        ("after_verified_batch", "1"),
        ("before_repair_commit", "2"),
        ("after_repair_commit", "2"),
    ],
)
async def test_a_killed_verification_goes_on_and_counts_everything_once(
    desk_of_books: Desk, sample: SampleDatabase, point: str, nth: str
) -> None:
    expected = await corrupt(desk_of_books)
    command = [sys.executable, "-m", "tests.infra.service.books", sample.admin_url]
    environment = {**os.environ, "CLAW_FAILPOINT": point, "CLAW_FAILPOINT_PASS": nth}
    killed = await asyncio.to_thread(subprocess.run, command, cwd=CHECKOUT, env=environment)
    assert killed.returncode == -9
    assert (await desk_of_books.books())["book g"] == (2, 5)

    begun: list[int] = []
    found = await desk_of_books.verify(switch=True, progress=lambda done, total: begun.append(done))
    assert begun[0] > 2
    # The extra row was counted once.
    assert (found.rows, found.different, found.repaired, found.differences) == (7, 4, 4, expected)
    assert (await desk_of_books.verify()).different == 0


async def test_a_paused_verification_goes_on_or_begins_again(desk_of_books: Desk) -> None:
    stopping = asyncio.Event()

    def pause(done: int, total: int) -> None:
        if done >= 4:
            stopping.set()

    assert not (await desk_of_books.verify(progress=pause, stopping=stopping)).finished
    async with desk_of_books.admin.connect() as connection:
        assert (await verification.last(connection))["books"].under_way == 4
    # The rows before the pause are not compared again.
    await desk_of_books.sql("UPDATE book SET letters = 6 WHERE name = 'book a'")
    resumed = await desk_of_books.verify()
    assert (resumed.rows, resumed.different) == (7, 0)

    stopping.clear()
    await desk_of_books.verify(progress=pause, stopping=stopping)
    assert (await desk_of_books.verify(restart=True)).differences == [RowDifference("book a", "letters")]
    async with desk_of_books.admin.connect() as connection:
        known = (await verification.last(connection))["books"]
    assert (known.compared, known.different, known.under_way) == (7, 1, None)

    # A repair does not go on behind rows that it would have to repair.
    stopping.clear()
    await desk_of_books.verify(progress=pause, stopping=stopping)
    assert (await desk_of_books.verify(switch=True)).repaired == 1


async def test_a_second_verification_of_a_service_is_refused(desk_of_books: Desk) -> None:
    async with verification.one_at_a_time(desk_of_books.admin, "sample_desk"):
        with pytest.raises(Conflict, match="another verification of sample_desk is running"):
            await desk_of_books.verify()
    assert (await desk_of_books.verify()).finished


async def test_events_of_an_older_form_are_read(desk_of_books: Desk) -> None:
    await desk_of_books.sql("INSERT INTO stream VALUES ('notebook:old', 1)")
    await desk_of_books.sql(
        """
        INSERT INTO event (stream_id, version, event_id, type, schema_version, data, headers)
        VALUES ('notebook:old', 1, $1, 'NoteWritten', 1, $2, '{}')
        """,
        uuid7(),
        b'{"number": 1, "note": "four"}',
    )
    assert (await desk_of_books.verify()).differences == [RowDifference("old", "missing")]
    await desk_of_books.verify(switch=True)
    assert (await desk_of_books.books())["old"] == (1, 4)


async def test_maintenance_verifies_once_a_day_and_its_result_is_a_metric(desk_of_books: Desk) -> None:
    await desk_of_books.sql("UPDATE book SET letters = 6 WHERE name = 'book b'")
    metrics = Metrics(CollectorRegistry())
    maintenance = Maintenance(desk_of_books.database, metrics, [BOOKS], verify_at=utcnow().hour)
    running = asyncio.create_task(maintenance.run())

    async def verified() -> Any:
        return await desk_of_books.sql("SELECT verified_at FROM read_model WHERE different = 1")

    [(at,)] = await until(verified)
    await maintenance.stop()
    await running
    # The next process shows the result, and does not verify again on this day.
    again = Maintenance(desk_of_books.database, metrics, [BOOKS], verify_at=utcnow().hour)
    await again._verify(at.hour)
    async with desk_of_books.database.begin() as tx:
        await again._observe(tx)
    assert await verified() == [(at,)]
    value = metrics.registry.get_sample_value
    assert value("claw_read_model_different_rows", {"model": "sample_desk.books"}) == 1
    assert value("claw_read_model_verified_timestamp_seconds", {"model": "sample_desk.books"}) == at.timestamp()


@pytest.mark.parametrize(
    ("now", "began"),
    [
        ("2026-03-01T03:00", "2026-03-01T03:00"),
        ("2026-03-01T02:59", "2026-02-28T03:00"),
        ("2026-03-01T23:00", "2026-03-01T03:00"),
    ],
)
def test_the_hour_last_began(now: str, began: str) -> None:
    read = [datetime.fromisoformat(text).replace(tzinfo=UTC) for text in (now, began)]
    assert last_time(3, read[0]) == read[1]
