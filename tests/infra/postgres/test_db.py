"""Tests of database sessions whose process does nothing more."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, suppress

import asyncpg
import pytest
from prometheus_client import CollectorRegistry
from sqlalchemy.exc import DBAPIError, IntegrityError, TimeoutError
from sqlalchemy.ext.asyncio import AsyncConnection

from infra.clock import uuid7
from infra.observe import metrics
from infra.observe.metrics import Metrics
from infra.outgoing import shares
from infra.postgres import db
from infra.postgres.database import Database
from protos.messages.sample import TakeNote
from tests.infra.conftest import SampleDatabase
from tooling.testing.sample.catalog import SAMPLE_WORK


@pytest.fixture
async def engine(sample: SampleDatabase) -> AsyncIterator[db.Pool]:
    """With one connection, so that one that is not given back is missed."""
    engine = db.create_engine(sample.url("desk", "worker"), pool_size=1)
    yield engine
    await engine.dispose()


async def _pid(engine: db.Pool) -> int:
    async with engine.statements() as connection:
        [(pid,)] = await db.sql(connection, "SELECT pg_backend_pid()")
    return int(pid)


@pytest.mark.parametrize("before", [0, 1])
async def test_a_refused_statement_says_why_and_not_with_what(engine: db.Pool, before: int) -> None:
    """Whether it is the first one of its transaction or a later one."""
    with pytest.raises(IntegrityError) as refused:
        async with engine.transaction() as connection:
            for _ in range(before):
                await db.sql(connection, "SELECT 1")
            await db.sql(connection, "INSERT INTO stream SELECT 'secret', 1 FROM generate_series(1, $1::int)", 2)
    assert "unique" in str(refused.value)
    assert "secret" not in str(refused.value).replace("SELECT 'secret'", "")
    assert not db.is_transient(refused.value)
    async with engine.transaction() as connection:
        assert await db.sql(connection, "SELECT stream_id FROM stream WHERE stream_id = 'secret'") == []


async def test_what_a_transaction_did_before_it_failed_is_undone(engine: db.Pool) -> None:
    with pytest.raises(DBAPIError):
        async with engine.transaction() as connection:
            await db.sql(connection, "SELECT 1")
            await db.sql(connection, "INSERT INTO stream VALUES ('undone', 1)")
            await db.sql(connection, "SELECT 1 / 0")
    async with engine.transaction() as connection:
        assert await db.sql(connection, "SELECT stream_id FROM stream WHERE stream_id = 'undone'") == []


@pytest.mark.parametrize("before", [0, 1])
async def test_a_lost_connection_is_passing_and_replaced(engine: db.Pool, before: int) -> None:
    pid = await _pid(engine)
    with pytest.raises(DBAPIError) as lost:
        async with engine.transaction() as connection:
            for _ in range(before):
                await db.sql(connection, "SELECT 1")
            await db.sql(connection, "SELECT pg_terminate_backend(pg_backend_pid())")
    # The statement's own error, and not the error of the rollback on the lost connection.
    assert lost.value.statement == "SELECT pg_terminate_backend(pg_backend_pid())"
    assert lost.value.connection_invalidated
    assert db.is_transient(lost.value)
    assert await _pid(engine) != pid


@pytest.mark.parametrize("use", [db.Pool.statements, db.Pool.connect])
async def test_a_connection_that_the_server_has_closed_is_replaced_at_its_next_use(
    engine: db.Pool, sample: SampleDatabase, use: Callable[[db.Pool], AbstractAsyncContextManager[AsyncConnection]]
) -> None:
    """As after a restart of PostgreSQL, for each connection of the pool."""
    async with use(engine) as connection:
        driver = (await connection.get_raw_connection()).driver_connection
    assert driver
    pid = driver.get_server_pid()
    other = db.create_engine(sample.url("desk", "worker"), pool_size=1)
    async with other.begin() as connection:
        await db.sql(connection, "SELECT pg_terminate_backend($1::int)", pid)
    await other.dispose()
    async with asyncio.timeout(30):
        while not driver.is_closed():
            await asyncio.sleep(0.01)
    async with use(engine) as connection:
        assert await db.sql(connection, "SELECT pg_backend_pid()") != [(pid,)]


async def test_a_pool_keeps_connections_until_it_is_disposed_of(engine: db.Pool, sample: SampleDatabase) -> None:
    pid = await _pid(engine)
    assert await _pid(engine) == pid
    # Work that holds a connection for minutes has others.
    async with engine.statements(), engine.connect() as beside:
        assert await db.sql(beside, "SELECT pg_backend_pid()") != [(pid,)]
        assert engine.taken == 1
    await engine.dispose()
    other = db.create_engine(sample.url("desk", "worker"), pool_size=1)
    async with asyncio.timeout(30), other.statements() as connection:
        while await db.sql(connection, "SELECT FROM pg_stat_activity WHERE pid = $1", pid):
            await asyncio.sleep(0.01)
    await other.dispose()


async def test_a_pool_without_a_free_connection_is_a_transient_error(
    sample: SampleDatabase, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(db, "POOL_TIMEOUT_SECONDS", 0.05)
    engine = db.create_engine(sample.url("desk", "worker"), pool_size=1)
    registry = Metrics(CollectorRegistry()).registry

    def waited() -> float:
        return registry.get_sample_value("claw_db_pool_wait_seconds_total") or 0.0

    before = waited()
    async with engine.statements():
        assert waited() == before
        with pytest.raises(TimeoutError) as full:
            async with engine.statements():
                raise AssertionError("a second connection of one")
    # Also of a transaction that got none.
    assert waited() >= before + 0.04
    async with engine.statements():
        assert engine.used_ratio == 1
    await engine.dispose()
    assert db.is_of_database(full.value)


async def test_slow_statements_of_one_tenant_leave_connections_to_others(sample: SampleDatabase) -> None:
    engine = db.create_engine(sample.url("desk", "request"), pool_size=4)
    database = Database(engine, "sample_desk", tenanted=True)
    go_on = asyncio.Event()

    async def slow() -> None:
        shares.work_for("hoarder")
        async with database.begin(tenant_id="hoarder") as tx:
            await tx.sql("SELECT 1")
            await go_on.wait()

    async def quick(tenant: str) -> None:
        shares.work_for(tenant)
        async with database.begin(tenant_id=tenant) as tx:
            await tx.sql("SELECT 1")

    async with asyncio.TaskGroup() as tasks:
        for _ in range(6):
            tasks.create_task(slow())
        async with asyncio.timeout(5):
            while engine.taken < 2:
                await asyncio.sleep(0)
            # Another tenant, and the platform itself, which may have all that are free.
            await asyncio.create_task(quick("other"))
            async with engine.statements(), engine.statements():
                assert engine.taken == 4
        go_on.set()
    assert engine.taken == 0
    await engine.dispose()


async def test_a_connection_that_is_cancelled_in_the_middle_is_not_used_again(engine: db.Pool) -> None:
    pid = await _pid(engine)
    under_way = asyncio.Event()

    async def work() -> None:
        async with engine.transaction() as connection:
            await db.sql(connection, "SELECT 1")
            under_way.set()
            await db.sql(connection, "SELECT pg_sleep(60)")

    task = asyncio.create_task(work())
    await under_way.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert await _pid(engine) != pid


async def test_a_transaction_that_lasts_too_long_is_ended_by_the_server(
    sample: SampleDatabase, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(db, "TRANSACTION_TIMEOUT_MS", 300)
    engine = db.create_engine(sample.url("desk", "worker"), pool_size=1)
    with pytest.raises(DBAPIError) as ended:
        async with engine.transaction() as connection:
            await db.sql(connection, "SELECT pg_sleep(60)")
    await engine.dispose()
    # Its connection is gone, and with it its locks; a statement that takes too long leaves both.
    assert ended.value.connection_invalidated
    assert db.is_transient(ended.value)


async def test_a_server_that_has_vanished_without_a_word_is_noticed(engine: db.Pool) -> None:
    """The operating system does it. `./claw prove` found readers that waited for an answer forever."""
    async with engine.connect() as connection:
        raw = await connection.get_raw_connection()
        assert raw.driver_connection
        endpoint = raw.driver_connection._transport.get_extra_info("socket")
        assert endpoint.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
        idle, pause, times, unconfirmed = (
            endpoint.getsockopt(socket.IPPROTO_TCP, option)
            for option in (socket.TCP_KEEPIDLE, socket.TCP_KEEPINTVL, socket.TCP_KEEPCNT, socket.TCP_USER_TIMEOUT)
        )
    assert idle + pause * times == unconfirmed // 1000 == db.SILENCE_SECONDS


async def test_a_transaction_does_not_go_on_without_the_connection_that_it_has_lost(engine: db.Pool) -> None:
    with pytest.raises(asyncpg.InterfaceError, match="was lost"):
        async with engine.transaction() as connection:
            with suppress(DBAPIError):
                await db.sql(connection, "SELECT pg_terminate_backend(pg_backend_pid())")
            await db.sql(connection, "INSERT INTO lease_member VALUES ('lost', gen_random_uuid(), now())")
    async with engine.statements() as connection:
        assert await db.sql(connection, "SELECT FROM lease_member WHERE kind = 'lost'") == []


@pytest.fixture
def single(engine: db.Pool) -> Database:
    return Database(engine, "sample_desk")


async def test_a_transaction_that_swallows_an_error_is_not_taken_for_committed(single: Database) -> None:
    with pytest.raises(asyncpg.InFailedSQLTransactionError, match="nothing was committed"):
        async with single.begin() as tx:
            await tx.sql("INSERT INTO lease_member VALUES ('swallowed', gen_random_uuid(), now())")
            with suppress(DBAPIError):
                await tx.sql("SELECT 1 / 0")
    assert await single.autocommit("SELECT FROM lease_member WHERE kind = 'swallowed'") == []


async def test_a_transaction_that_fails_gives_its_connection_back_without_it(single: Database) -> None:
    for error in (RuntimeError("broken"), asyncio.CancelledError()):
        with pytest.raises(type(error)):
            async with single.begin() as tx:
                await tx.sql("INSERT INTO lease_member VALUES ('failed', gen_random_uuid(), now())")
                raise error
        # The pool has one connection.
        assert await single.autocommit("SELECT FROM lease_member WHERE kind = 'failed'") == []


async def test_a_statement_whose_table_a_migration_has_changed_is_transient(
    single: Database, sample: SampleDatabase
) -> None:
    admin = db.create_engine(sample.admin_url, pool_size=1, schema="sample_desk")
    async with admin.statements() as connection:
        await db.sql(connection, "CREATE TABLE widened (n bigint)")
        await db.sql(connection, "GRANT ALL ON widened TO PUBLIC")
        for _ in range(2):
            async with single.begin() as tx:
                await tx.sql("SELECT n FROM widened")
        await db.sql(connection, "ALTER TABLE widened ALTER COLUMN n TYPE numeric")
    with pytest.raises(DBAPIError) as changed:
        async with single.begin() as tx:
            await tx.sql("SELECT n FROM widened")
    assert db.is_transient(changed.value)
    async with single.begin() as tx:
        assert await tx.sql("SELECT n FROM widened") == []
    await admin.dispose()


async def test_a_block_that_is_undone_leaves_no_rows_and_no_messages(desk: Database) -> None:
    kept, dropped = uuid7(), uuid7()
    async with desk.begin() as tx:
        tx.send(SAMPLE_WORK, TakeNote(notebook="n", text="kept"), message_id=kept)
        for _ in range(2):
            async with tx.undone():
                await tx.sql("INSERT INTO lease_member VALUES ('undone', gen_random_uuid(), now())")
                tx.send(SAMPLE_WORK, TakeNote(notebook="n", text="dropped"), message_id=dropped)
                assert await tx.sql("SELECT count(*) FROM lease_member WHERE kind = 'undone'") == [(1,)]
        await tx.sql("INSERT INTO lease_member VALUES ('after', gen_random_uuid(), now())")
    assert await desk.autocommit("SELECT kind FROM lease_member WHERE kind IN ('undone', 'after')") == [("after",)]
    found = await desk.autocommit("SELECT message_id FROM outbox WHERE message_id = ANY($1)", [kept, dropped])
    assert found == [(kept,)]


async def test_a_connection_that_is_lost_in_a_transaction_fails_it_and_is_replaced(
    single: Database, sample: SampleDatabase
) -> None:
    other = db.create_engine(sample.url("desk", "worker"), pool_size=1)
    with pytest.raises(Exception) as failed:  # noqa: PT011 - which one depends on the moment
        async with single.begin() as tx:
            [(pid,)] = await tx.sql("SELECT pg_backend_pid()")
            await Database(other, "sample_desk").autocommit("SELECT pg_terminate_backend($1)", pid)
    assert db.is_transient(failed.value)
    assert await single.autocommit("SELECT 1") == [(1,)]
    await other.dispose()


async def test_statements_are_counted_for_the_alert_about_slow_ones(
    engine: db.Pool, monkeypatch: pytest.MonkeyPatch
) -> None:
    registry = Metrics(CollectorRegistry()).registry

    def counts() -> tuple[float, float]:
        every, slow = (registry.get_sample_value(f"claw_db_{name}_total") for name in ("statements", "slow_statements"))
        assert every is not None
        assert slow is not None
        return every, slow

    async with engine.statements() as connection:
        every, slow = counts()
        await db.sql(connection, "SELECT 1")
        assert counts() == (every + 1, slow)
        monkeypatch.setattr(metrics, "SLOW_STATEMENT_SECONDS", -1.0)
        # Also one that fails: a statement that is cancelled after its time-out is the slowest of all.
        with pytest.raises(DBAPIError):
            await db.sql(connection, "SELECT 1 / 0")
        assert counts() == (every + 2, slow + 1)
    async with engine.transaction():
        pass
    assert counts() == (every + 4, slow + 3)
