"""A projection is rebuilt from Kafka beside the live one, compared with it and switched, while messages arrive."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from typing import Any
from uuid import uuid4

import asyncpg
import pytest
from sqlalchemy.exc import DBAPIError, ProgrammingError

from infra.bus.outbox import resend
from infra.clock import utcnow
from infra.errors import Conflict
from infra.postgres.database import Database
from infra.postgres.db import create_engine, sql
from infra.postgres.tx import Tx
from infra.service.redrive import discard, request_redrive
from infra.service.replay import Replay, ReplayResult
from protos.catalog import AUDIT_LOGS
from protos.messages.audit import ActAudited
from protos.messages.sample import NoteTaken
from tests.infra.conftest import SampleDatabase
from tests.infra.service.conftest import History
from tooling.stack.checkout import CHECKOUT
from tooling.testing.sample.catalog import SAMPLE_EVENTS, SAMPLE_WORK
from tooling.testing.sample.desk.domain import NoteWritten
from tooling.testing.sample.desk.publishing import NOTEBOOK
from tooling.testing.until import until

SHAPE = {
    "grants": "SELECT grantee, privilege_type FROM information_schema.role_table_grants "
    "WHERE table_schema = 'sample_ledger' AND table_name = 'total' ORDER BY 1, 2",
    "policies": "SELECT policyname, permissive, roles, cmd, qual, with_check FROM pg_policies "
    "WHERE schemaname = 'sample_ledger' AND tablename = 'total' ORDER BY 1",
    "security": "SELECT relrowsecurity, relforcerowsecurity FROM pg_class WHERE oid = 'sample_ledger.total'::regclass",
    "columns": "SELECT column_name, data_type, is_nullable FROM information_schema.columns "
    "WHERE table_schema = 'sample_ledger' AND table_name = 'total' ORDER BY ordinal_position",
    "indexes": "SELECT indexdef FROM pg_indexes WHERE schemaname = 'sample_ledger' AND tablename = 'total' ORDER BY 1",
}


def equal(rebuilt: ReplayResult) -> dict[str, bool]:
    return {table.table: table.equal for table in rebuilt.tables}


def book(name: str) -> str:
    return f"{name} {uuid4().hex[:8]}"


async def test_the_rebuilt_tables_equal_the_live_ones_and_replace_them(
    history: History, sample: SampleDatabase
) -> None:
    for statement in (
        "ALTER TABLE total ENABLE ROW LEVEL SECURITY",
        "CREATE POLICY worker ON total TO sample_ledger_worker USING (true) WITH CHECK (true)",
        "CREATE POLICY tenant ON total FOR SELECT TO sample_ledger_request USING (notebook = current_tenant())",
        "CREATE POLICY nobody ON total AS RESTRICTIVE FOR DELETE TO PUBLIC USING (false)",
    ):
        await history.sql(statement)
    one, other = book("one"), book("other")
    await history.write(one, "a", "bc", "d")
    await history.write(other, "efg")
    await history.caught_up()
    before = {name: await history.sql(statement) for name, statement in SHAPE.items()}
    [(live,)] = await history.sql("SELECT 'sample_ledger.total'::regclass::oid")

    rebuilt = await history.from_kafka()

    assert equal(rebuilt) == {"total": True, "effect": True}
    assert rebuilt.switched
    [(rows,)] = await history.sql("SELECT count(*) FROM total")
    total = rebuilt.tables[0]
    assert (total.live_rows, total.rebuilt_rows) == (rows, rows)
    [(now,)] = await history.sql("SELECT 'sample_ledger.total'::regclass::oid")
    [(retired,)] = await history.sql("SELECT 'sample_ledger_retired.total'::regclass::oid")
    assert (now != live, retired) == (True, live)
    assert {name: await history.sql(statement) for name, statement in SHAPE.items()} == before
    # The request role is bound to its tenant on the new table as it was on the old one.
    engine = create_engine(sample.url("ledger", "request"), pool_size=1)
    request = Database(engine, "sample_ledger", tenanted=True)
    async with request.begin(tenant_id=one) as tx:
        assert await tx.sql("SELECT notebook, notes, letters FROM total") == [(one, 3, 4)]
    with pytest.raises(DBAPIError, match="no tenant is set"):
        async with engine.connect() as connection:
            await sql(connection, "SELECT * FROM total")
    await engine.dispose()
    # The live consumer continues in the new tables at the end of the old ones.
    await history.write(one, "e")
    await history.caught_up()
    assert await history.effects(one) == [(1, 1), (2, 2), (3, 3), (4, 4)]
    assert await history.sql("SELECT 1 FROM sample_ledger_retired.effect WHERE notebook = $1 AND nth = 4", one) == []


async def test_the_live_consumer_neither_doubles_nor_skips_while_a_replay_runs(history: History) -> None:
    books = [book("busy") for _ in range(3)]
    done = asyncio.Event()

    async def keep_writing() -> int:
        rounds = 0
        while not done.is_set():
            rounds += 1
            for name in books:
                await history.write(name, f"note {rounds}")
        return rounds

    writing = asyncio.create_task(keep_writing())
    try:
        for _ in range(3):
            rebuilt = await history.from_kafka()
            assert equal(rebuilt) == {"total": True, "effect": True}
            assert rebuilt.switched
    finally:
        done.set()
        rounds = await writing
    await history.caught_up()
    for name in books:
        assert await history.effects(name) == [(n, n) for n in range(1, rounds + 1)]


async def test_a_changed_table_is_different_and_stays_unless_the_switch_is_forced(history: History) -> None:
    name = book("tampered")
    await history.write(name, "four")
    await history.caught_up()
    await history.sql("UPDATE total SET letters = 40 WHERE notebook = $1", name)
    letters = "SELECT letters FROM total WHERE notebook = $1"

    rebuilt = await history.from_kafka()
    assert equal(rebuilt) == {"total": False, "effect": True}
    assert not rebuilt.switched
    assert await history.sql(letters, name) == [(40,)]
    # The rebuilt table stays for inspection.
    assert await history.sql(letters.replace("total", "sample_ledger_rebuild.total"), name) == [(4,)]

    assert (await history.from_kafka(switch_unequal=True)).switched
    assert await history.sql(letters, name) == [(4,)]


async def test_repeats_in_the_log_change_nothing(history: History) -> None:
    name = book("repeated")
    await history.write(name, "a", "b")
    await history.caught_up()
    [(read,)] = await history.sql("SELECT sum(next_offset) FROM consumer_offset")
    async with history.desk.begin() as tx:
        again = await resend(await tx.connection(), SAMPLE_EVENTS.name)

    async def read_again() -> bool:
        [(now,)] = await history.sql("SELECT sum(next_offset) FROM consumer_offset")
        return bool(now >= read + again)

    await until(read_again)
    await history.write(name, "c")
    await history.caught_up()
    [(handled,)] = await history.sql("SELECT count(*) FROM inbox WHERE consumer = 'sample_ledger'")
    rebuilt = await history.from_kafka()
    assert equal(rebuilt) == {"total": True, "effect": True}
    assert rebuilt.records > handled
    assert await history.effects(name) == [(1, 1), (2, 2), (3, 3)]


async def test_parked_and_discarded_records_are_not_applied(history: History) -> None:
    name, bad = book("parked"), uuid4().hex
    history.ledger.refused.add(bad)
    await history.write(name, "good", bad, "behind")
    await history.letter(name, "waiting")
    assert equal(await history.from_kafka()) == {"total": True, "effect": True}
    assert await history.effects(name) == [(1, 1)]

    async with Database(history.admin, "sample_ledger").begin() as tx:
        await discard(tx, (await history.letter(name, "failed")).id, actor="test")
    await until(lambda: _counted(history, name, 3))
    rebuilt = await history.from_kafka()
    assert equal(rebuilt) == {"total": True, "effect": True}
    assert rebuilt.switched
    assert await history.effects(name) == [(1, 1), (3, 2)]


async def _counted(history: History, name: str, number: int) -> bool:
    return any(n == number for n, _ in await history.effects(name))


async def test_records_redriven_during_the_replay_are_applied_in_order(history: History) -> None:
    name, bad = book("redriven"), uuid4().hex
    history.ledger.refused.add(bad)
    await history.write(name, bad, "behind")
    await history.letter(name, "waiting")

    class RedrivenBeforeTheEnd(Replay):
        async def _hold(self, *arguments: Any) -> Any:
            history.ledger.refused.discard(bad)
            async with Database(history.admin, "sample_ledger").begin() as tx:
                await request_redrive(tx, [(await history.letter(name, "failed")).id], actor="test")
            await until(lambda: _counted(history, name, 2))
            return await super()._hold(*arguments)

    rebuilt = await history.from_kafka(history.new(RedrivenBeforeTheEnd))
    assert equal(rebuilt) == {"total": True, "effect": True}
    assert await history.effects(name) == [(1, 1), (2, 2)]


async def test_nothing_is_redriven_between_comparison_and_switch(history: History) -> None:
    held: list[str] = []

    class Watched(Replay):
        async def _finish(self, *arguments: Any) -> ReplayResult:
            for table in ("parked_key", "dead_letter"):
                # As SELECT … FOR UPDATE of the redriver and the operator does.
                with pytest.raises(DBAPIError) as refused:
                    await history.sql(f"LOCK TABLE {table} IN ROW SHARE MODE NOWAIT")
                assert isinstance(refused.value.orig, BaseException)
                assert isinstance(refused.value.orig.__cause__, asyncpg.LockNotAvailableError)
                held.append(table)
            return await super()._finish(*arguments)

    await history.from_kafka(history.new(Watched))
    assert held == ["parked_key", "dead_letter"]


@pytest.mark.parametrize("point", ["before_replayed_batch", "after_replayed_batch", "before_switch"])
async def test_a_killed_replay_goes_on_and_applies_each_record_once(history: History, point: str) -> None:
    names = [book(f"killed {n}") for n in range(8)]
    refused, behind = uuid4().hex, book("behind")
    history.ledger.refused.add(refused)
    await history.write(behind, refused, "waits")
    await history.letter(behind, "waiting")
    for name in names:
        await history.write(name, "a", "bc", "def")
    await history.caught_up()
    url = history.admin.url.render_as_string(hide_password=False)
    command = [sys.executable, "-m", "tests.infra.service.replayed", url, history.buses.kafka, history.buses.prefix]
    passes = "1" if point == "before_switch" else "2"
    environment = {**os.environ, "CLAW_FAILPOINT": point, "CLAW_FAILPOINT_PASS": passes}
    killed = await asyncio.to_thread(subprocess.run, command, cwd=CHECKOUT, env=environment)
    assert killed.returncode == -9

    # Meanwhile the record that the killed replay has skipped is redriven.
    history.ledger.refused.discard(refused)
    async with Database(history.admin, "sample_ledger").begin() as tx:
        await request_redrive(tx, [(await history.letter(behind, "failed")).id], actor="test")
    await until(lambda: _counted(history, behind, 2))
    told: list[int] = []
    replay = Replay(history.admin, "sample_ledger", history.subscription, lambda done, total: told.append(done))
    applied = await history.from_kafka(replay)
    assert equal(applied) == {"total": True, "effect": True}
    assert applied.switched
    assert await history.effects(behind) == [(1, 1), (2, 2)]
    # It did not begin with the first record.
    assert told[0] > 0
    assert (await history.sql("SELECT to_regclass('sample_ledger_rebuild.progress')")) == [(None,)]


async def test_the_keys_of_rows_that_differ_are_told(history: History) -> None:
    name = book("told")
    await history.write(name, "four")
    await history.caught_up()
    await history.sql("UPDATE total SET letters = 40 WHERE notebook = $1", name)
    [total, effect] = (await history.from_kafka()).tables
    assert (total.differences, effect.differences) == ([name], [])
    await history.sql("UPDATE total SET letters = 4 WHERE notebook = $1", name)


async def test_a_second_replay_of_a_service_is_refused(history: History) -> None:
    class Interrupted(Replay):
        async def _hold(self, *arguments: Any) -> Any:
            with pytest.raises(Conflict, match="another replay of sample_ledger is running"):
                await history.from_kafka()
            return await super()._hold(*arguments)

    assert equal(await history.from_kafka(history.new(Interrupted))) == {"total": True, "effect": True}


async def test_progress_is_reported(history: History) -> None:
    await history.write(book("progress"), "a", "b")
    await history.caught_up()
    told: list[tuple[int, int]] = []
    replay = Replay(
        history.admin, "sample_ledger", history.subscription, lambda done, total: told.append((done, total))
    )
    rebuilt = await history.from_kafka(replay)
    assert told == sorted(told)
    assert told[-1][0] == rebuilt.records > 0
    assert told[-1][1] >= rebuilt.records


async def test_a_handler_can_change_nothing_but_the_shadow_tables(history: History) -> None:
    await history.write(book("closed in"), "a")
    await history.caught_up()

    async def writes_elsewhere(notes: list[NoteTaken], tx: Tx) -> None:
        await tx.sql("INSERT INTO stream VALUES ('forged', 1)")

    subscription = SAMPLE_EVENTS.batch(group="sample_ledger", projection=("total", "effect"))(writes_elsewhere)
    with pytest.raises(ProgrammingError, match='"stream" does not exist'):
        await history.from_kafka(history.new(subscription=subscription))
    assert await history.sql("SELECT 1 FROM stream") == []


async def test_a_handler_publishes_calls_and_appends_nothing(history: History) -> None:
    await history.write(book("mute"), "a")
    await history.caught_up()
    calls: list[str] = []

    async def noisy(notes: list[NoteTaken], tx: Tx) -> None:
        act = ActAudited(
            tenant_id=None, at=utcnow(), actor="x", action="x", object_kind="x", object_id="x", outcome="done"
        )
        tx.publish(AUDIT_LOGS, act, key="x")
        tx.send(SAMPLE_WORK, SAMPLE_WORK.message(notebook="x", text="x"))

        async def call() -> None:
            calls.append("called")

        tx.after_commit(call)
        await history.ledger.count(notes, tx)

    async def appends(notes: list[NoteTaken], tx: Tx) -> None:
        tx.append(NOTEBOOK.stream("x"), NoteWritten(1, "x"))

    outbox = "SELECT message_id FROM outbox ORDER BY position"
    before = await history.sql(outbox)
    decorate = SAMPLE_EVENTS.batch(group="sample_ledger", projection=("total", "effect"))
    assert equal(await history.from_kafka(history.new(subscription=decorate(noisy)))) == {"total": True, "effect": True}
    with pytest.raises(Conflict, match="handler appends events"):
        await history.from_kafka(history.new(subscription=decorate(appends)))
    assert await history.sql(outbox) == before
    assert calls == []


async def test_a_subscription_that_is_not_a_projection_is_refused(history: History) -> None:
    with pytest.raises(Conflict, match="is not a projection"):
        history.new(subscription=SAMPLE_EVENTS.batch(group="sample_ledger")(history.ledger.count))
    with pytest.raises(Conflict, match="is not a projection"):
        history.new(subscription=SAMPLE_WORK.worker(prefetch=1)(history.ledger.count))


async def test_a_table_with_attachments_is_refused(history: History) -> None:
    await history.sql("CREATE VIEW long_books AS SELECT notebook FROM total WHERE notes > 10")
    try:
        with pytest.raises(Conflict, match=r"total cannot be switched.*view long_books"):
            await history.from_kafka()
    finally:
        await history.sql("DROP VIEW long_books")


async def test_a_missing_topic_is_reported(history: History) -> None:
    with pytest.raises(Conflict, match=r"elsewhere\.sample\.events does not exist"):
        await history.new().from_kafka(history.buses.kafka, prefix="elsewhere.")
