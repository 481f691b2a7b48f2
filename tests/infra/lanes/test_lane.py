"""Tests of lanes: order and exclusion within one, fairness among them, and items that fail, wait or expire."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import AsyncIterator, Iterator
from datetime import timedelta
from typing import Any

import msgspec
import pytest
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from prometheus_client import CollectorRegistry, generate_latest

from infra.clock import utcnow, uuid7
from infra.errors import Conflict, InvalidMessage, RetryLater, Transient
from infra.lanes import claims as claiming
from infra.lanes import lane as lanes
from infra.lanes import runner as lane_runner
from infra.lanes.claims import SUSPECT_RECOVERIES, Claims
from infra.lanes.effects import Effects
from infra.lanes.processor import IN_A_ROW, MAX_RECOVERIES
from infra.lanes.runner import LaneRunner
from infra.observe import logs, telemetry
from infra.observe.metrics import Metrics
from infra.postgres.database import Database
from infra.postgres.db import create_engine
from infra.postgres.tx import Tx
from infra.service.maintenance import Maintenance
from infra.service.redrive import Redriver, request_redrive
from tests.infra.conftest import SampleDatabase
from tests.infra.lanes.lane_fixture import (
    TENANT,
    Notes,
    Parcel,
    World,
    all_over,
    items,
    log_lines,
    new_lane,
    put,
    steal,
)
from tooling.testing.until import until

# A transaction of this test's database waits for a lock of another.
WAITS = "SELECT 1 FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'"


@pytest.fixture
def world(sample: SampleDatabase) -> Iterator[World]:
    with log_lines():
        yield World(sample)


@pytest.fixture
async def claims(sample: SampleDatabase) -> AsyncIterator[Claims]:
    engine = create_engine(sample.url("desk", "worker"), pool_size=1)
    claims = Claims(engine, "sample_desk", lambda kind: None, lease_seconds=60)
    yield claims
    await claims.close()
    await engine.dispose()


@pytest.fixture
def notes() -> Notes:
    return Notes()


async def test_a_lane_is_worked_off_in_order_by_one_process_at_a_time(world: World) -> None:
    kind = new_lane()
    busy: set[str] = set()
    done: dict[str, list[int]] = defaultdict(list)

    @kind.runner(concurrency=8)
    async def work(parcel: Parcel, effects: Effects, tx: Tx) -> None:
        lane = f"lane {parcel.number % 5}"
        assert lane not in busy
        busy.add(lane)
        await tx.sql("SELECT pg_sleep(0.001)")
        done[lane].append(parcel.number)
        busy.remove(lane)

    async def fill(database: Database) -> None:
        for number in range(100):
            await put(database, kind, f"lane {number % 5}", number)

    async with world.process(work) as one, world.process(work):
        await fill(one)
        await all_over(one, kind)
        assert {lane: sorted(numbers) for lane, numbers in done.items()} == done
        assert sum(map(len, done.values())) == 100
        assert {attempts for (attempts,) in await items(one, kind, "attempts")} == {1}


async def test_an_item_that_commits_later_stands_behind(desk: Database) -> None:
    kind = new_lane()
    async with desk.begin(tenant_id=TENANT) as first:
        first.enqueue(kind, lane="a", item=Parcel(1))
        await first.flush()
        second = asyncio.create_task(put(desk, kind, "a", 2))
        await until(lambda: sql(desk, WAITS))
        assert not second.done()
    await second
    rows = await items(desk, kind, "seq", "convert_from(body, 'UTF8')")
    assert rows == [(1, '{"number":1}'), (2, '{"number":2}')]


async def test_an_id_is_enqueued_once_also_when_it_is_done(world: World, notes: Notes) -> None:
    kind, id_ = new_lane(), uuid7()
    async with world.process(kind.runner(concurrency=1)(notes.note)) as database:
        for _ in range(2):
            await put(database, kind, "a", 1, item_id=id_)
        await all_over(database, kind)
        await put(database, kind, "another lane", 2, item_id=id_)
        await put(database, kind, "a", 3)
        await all_over(database, kind)
        assert notes.numbers == [1, 3]
        assert [seq for (seq,) in await items(database, kind, "seq")] == [1, 2]


async def test_an_id_that_two_transactions_enqueue_in_different_lanes_is_enqueued_once(desk: Database) -> None:
    kind, id_ = new_lane(), uuid7()
    async with desk.begin(tenant_id=TENANT) as first:
        first.enqueue(kind, lane="a", item=Parcel(1), item_id=id_)
        await first.flush()
        second = asyncio.create_task(put(desk, kind, "b", 2, item_id=id_))
        await until(lambda: sql(desk, WAITS))
    await second
    assert await items(desk, kind, "lane") == [("a",)]


async def test_lines_about_an_item_have_its_tenant_and_ids_and_none_of_the_item_before(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines: list[bytes] = []
    monkeypatch.setattr(logs, "_sinks", [lines.append])
    log, kind = logs.get_logger("test"), new_lane()

    async def handle(parcel: Parcel, effects: Effects, tx: Tx) -> None:
        log.info("begun")
        logs.work_on(run_id=f"run {parcel.number}")
        log.info("handled")
        raise InvalidMessage("parcel", "is damp")

    async with world.process(kind.runner(concurrency=1)(handle)) as database:
        await put(database, kind, "a", 1, 2, tenant_id="one")
        await all_over(database, kind)
    seen = [msgspec.json.decode(line) for line in lines]
    told = [(line["message"][:6], line["data"].get("for_tenant"), line["data"].get("run_id")) for line in seen]
    assert told == [
        (message, "one", run)
        for number in (1, 2)
        for message, run in (("begun", None), ("handle", f"run {number}"), ("item s", f"run {number}"))
    ]


async def test_the_same_lane_and_id_of_another_tenant_are_another_thing(world: World, notes: Notes) -> None:
    kind, id_ = new_lane(), uuid7()
    async with world.process(kind.runner(concurrency=1)(notes.note)) as database:
        await put(database, kind, "a", 1, item_id=id_, tenant_id="one")
        await put(database, kind, "a", 2, item_id=id_, tenant_id="other")
        await notes.has(2)
    assert sorted(notes.got) == [("one", 1), ("other", 2)]


async def test_what_is_rolled_back_was_never_enqueued(desk: Database) -> None:
    kind = new_lane()
    with pytest.raises(RuntimeError, match="no"):
        async with desk.begin(tenant_id=TENANT) as tx:
            tx.enqueue(kind, lane="a", item=Parcel(1))
            await tx.flush()
            raise RuntimeError("no")
    assert await items(desk, kind, "seq") == []


async def test_the_handler_commits_together_with_the_completion(world: World) -> None:
    kind, after = new_lane(), new_lane()
    errors = [RuntimeError("broken")]

    @kind.runner(concurrency=1)
    async def work(parcel: Parcel, effects: Effects, tx: Tx) -> None:
        tx.enqueue(after, lane="b", item=parcel)
        await tx.flush()
        if errors:
            raise errors.pop()

    async with world.process(work) as database:
        await put(database, kind, "a", 1)
        await all_over(database, kind)
        assert await items(database, after, "seq") == [(1,)]
        assert await items(database, kind, "state", "attempts", "faults", "body") == [("done", 2, 1, None)]


async def test_a_head_that_waits_holds_its_lane_and_no_other(world: World, notes: Notes) -> None:
    kind = new_lane()
    notes.errors = [RetryLater(timedelta(milliseconds=300)), Transient("away")]
    async with world.process(kind.runner(concurrency=1)(notes.note)) as database:
        await put(database, kind, "a", 1, 2)
        await notes.has(1)
        await put(database, kind, "b", 10)
        await all_over(database, kind)
    assert notes.numbers.index(10) < notes.numbers.index(2)
    assert [n for n in notes.numbers if n != 10][-2:] == [1, 2]
    assert notes.errors == []


async def test_what_passes_by_itself_is_tried_beyond_the_retries(world: World, notes: Notes) -> None:
    kind = new_lane(retries=())
    notes.errors = [RetryLater(timedelta(milliseconds=1)) for _ in range(5)]
    async with world.process(kind.runner(concurrency=1)(notes.note)) as database:
        await put(database, kind, "a", 1)
        await all_over(database, kind)
        assert await items(database, kind, "state", "attempts", "faults") == [("done", 6, 0)]


async def test_an_item_is_not_done_before_its_time_and_not_after_it(world: World, notes: Notes) -> None:
    kind = new_lane()
    late: list[int] = []

    async def too_late(parcel: Parcel, tx: Tx) -> None:
        late.append(parcel.number)

    async with world.process(kind.runner(concurrency=1, expired=too_late)(notes.note)) as database:
        soon = timedelta(milliseconds=400)
        begun = utcnow()
        await put(database, kind, "a", 1, after=soon)
        await put(database, kind, "a", 2)
        await put(database, kind, "b", 3, after=timedelta(hours=1), expires_in=timedelta())
        await all_over(database, kind)
        assert utcnow() - begun >= soon
        assert (notes.numbers, late) == ([1, 2], [3])
        assert [state for (state,) in await items(database, kind, "state")] == ["done", "done", "expired"]


async def test_an_invalid_item_is_a_dead_letter_at_once_and_the_lane_goes_on(world: World, notes: Notes) -> None:
    kind = new_lane()
    notes.errors = [InvalidMessage("number", "unlucky")]
    async with world.process(kind.runner(concurrency=1)(notes.note)) as database:
        [id_, *_] = await put(database, kind, "a", 13, 14)
        await all_over(database, kind)
        assert notes.numbers == [13, 14]
        [letter] = await letters(database, kind.name)
        assert letter == (str(id_), "a", TENANT, "failed", 1, "InvalidMessage: number: unlucky", b'{"number":13}')


async def test_one_tenants_long_work_leaves_room_for_others(world: World, notes: Notes) -> None:
    kind = new_lane()
    async with world.process(kind.runner(concurrency=4, per_tenant=3)(notes.hold)) as database:
        for n in range(5):
            await put(database, kind, f"lane {n}", n, tenant_id="greedy")
        await notes.has(3)
        await put(database, kind, "a", 100, tenant_id="modest")
        await notes.has(4)
        assert sorted(tenant for tenant, _ in notes.got) == ["greedy"] * 3 + ["modest"]
        notes.go_on.set()
        await all_over(database, kind)
        assert len(notes.got) == 6


async def test_a_service_hears_of_its_dead_items_in_the_transaction_of_the_dead_letter(
    world: World, notes: Notes
) -> None:
    kind, log = new_lane(), new_lane()

    async def bury(parcel: Parcel, error: str, tx: Tx) -> None:
        assert tx.tenant_id == TENANT
        tx.enqueue(log, lane=error, item=parcel)

    notes.errors = [InvalidMessage("number", "is wrong")]
    async with world.process(kind.runner(concurrency=1, dead=bury)(notes.note)) as database:
        await put(database, kind, "a", 1, 2)
        await all_over(database, kind)
        assert await items(database, kind, "state") == [("dead",), ("done",)]
        assert await items(database, log, "lane", "convert_from(body, 'UTF8')") == [
            ("InvalidMessage: number: is wrong", '{"number":1}')
        ]


async def test_an_item_that_its_type_does_not_fit_is_a_dead_letter(world: World, notes: Notes) -> None:
    kind = new_lane()
    async with world.process() as database:
        await put(database, kind, "a", 1, 2)
        async with database.begin() as tx:
            await tx.sql('UPDATE lane_item SET body = \'{"number":"x"}\' WHERE kind = $1 AND seq = 1', kind.name)
    async with world.process(kind.runner(concurrency=1)(notes.note)) as database:
        await all_over(database, kind)
        assert notes.numbers == [2]
        assert "$.number" in (await letters(database, kind.name))[0][5]


async def test_a_fault_is_retried_by_the_ladder_then_dead_and_comes_back_by_redrive(world: World, notes: Notes) -> None:
    kind = new_lane()
    notes.errors = [RuntimeError(f"fault {n}") for n in range(4)]
    async with world.process(kind.runner(concurrency=1)(notes.note)) as database:
        await put(database, kind, "a", 1, 2)
        await all_over(database, kind)
        assert notes.numbers == [1, 1, 1, 1, 2]
        [(id_,)] = await sql(database, "SELECT id FROM dead_letter WHERE consumer = $1", kind.name)
        async with database.begin() as tx:
            await request_redrive(tx, [id_], actor="test")
        redriver = Redriver(database, [], world.metrics)
        while await redriver.step():
            pass
        await notes.has(6)
        await all_over(database, kind)
        assert notes.numbers == [1, 1, 1, 1, 2, 1]
        assert await items(database, kind, "seq", "state", "attempts") == [(2, "done", 1), (3, "done", 1)]


async def test_a_letter_older_than_the_ledger_of_effects_is_not_redriven(world: World, notes: Notes) -> None:
    kind = new_lane()
    notes.errors = [InvalidMessage("number", "unlucky")]
    async with world.process(kind.runner(concurrency=1)(notes.note)) as database:
        await put(database, kind, "a", 1)
        await all_over(database, kind)
        [(id_,)] = await sql(
            database,
            "UPDATE dead_letter SET first_failed_at = first_failed_at - $2::interval WHERE consumer = $1 RETURNING id",
            kind.name,
            lanes.KEEP_EFFECTS,
        )
        with pytest.raises(Conflict, match="too old"):
            async with database.begin() as tx:
                await request_redrive(tx, [id_], actor="test")


async def test_a_tenant_with_thousands_of_ready_lanes_does_not_keep_another_waiting(world: World, notes: Notes) -> None:
    kind = new_lane()
    async with world.process() as database:
        async with database.begin(tenant_id="big") as tx:
            for n in range(3000):
                tx.enqueue(kind, lane=f"lane {n}", item=Parcel(n))
        for tenant in ("a small one", "small"):
            await put(database, kind, "a", 1, tenant_id=tenant)
    async with world.process(kind.runner(concurrency=1)(notes.note)):
        await notes.has(3)
    assert sorted(tenant for tenant, _ in notes.got[:3]) == ["a small one", "big", "small"]


async def test_every_tenant_has_its_turn_again(world: World, notes: Notes) -> None:
    kind = new_lane()
    async with world.process(kind.runner(concurrency=1)(notes.note)) as database:
        for n, tenant in enumerate(("z", "a", "", "z"), 1):
            await put(database, kind, "a", n, tenant_id=tenant)
            await notes.has(n)
    assert [tenant for tenant, _ in notes.got] == ["z", "a", "", "z"]


async def test_a_long_lane_lets_others_have_their_turn(world: World, notes: Notes) -> None:
    kind = new_lane()
    async with world.process() as database:
        await put(database, kind, "long", *range(100))
        await put(database, kind, "short", 1000)
    async with world.process(kind.runner(concurrency=1)(notes.note)) as database:
        await all_over(database, kind)
    assert notes.numbers.index(1000) <= IN_A_ROW


async def test_a_commit_wakes_the_runner_of_its_process(
    world: World, notes: Notes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lane_runner, "SWEEP_SECONDS", 3600.0)
    kind = new_lane()
    async with world.process(kind.runner(concurrency=1)(notes.note)) as database:
        await until(lambda: listening(database))
        for number in range(3):
            await put(database, kind, "a", number)
            await notes.has(number + 1)


async def test_a_process_that_is_full_calls_another_one(
    world: World, notes: Notes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lane_runner, "SWEEP_SECONDS", 3600.0)
    kind = new_lane()
    idle = Notes()
    async with world.process(kind.runner(concurrency=1)(notes.hold), lease_seconds=60) as full:
        await until(lambda: listening(full))
        await put(full, kind, "a", 1)
        await notes.begun.wait()
        # The leases are long: nothing is due, and only the call can tell of it.
        async with world.process(kind.runner(concurrency=1)(idle.note), lease_seconds=60) as other:
            await until(lambda: listening(other, 2))
            await put(full, kind, "b", 2)
            await idle.has(1)
            notes.go_on.set()
            await all_over(full, kind)
    assert (notes.numbers, idle.numbers) == ([1], [2])


async def test_what_no_wake_up_told_of_is_found_by_the_sweep(world: World, notes: Notes, desk: Database) -> None:
    kind = new_lane()
    async with world.process(kind.runner(concurrency=1)(notes.note)):
        await put(desk, kind, "a", 1)
        await notes.has(1)


async def test_a_lease_is_renewed_for_as_long_as_the_handler_runs(world: World, notes: Notes) -> None:
    kind = new_lane()
    other = Notes()
    work = kind.runner(concurrency=1)
    async with world.process(work(notes.hold), lease_seconds=0.6) as database:
        await put(database, kind, "a", 1)
        await notes.begun.wait()
        [(first,)] = await sql(database, "SELECT ready_at FROM lane WHERE kind = $1", kind.name)
        async with world.process(work(other.note), lease_seconds=0.6):
            await until(
                lambda: sql(
                    database,
                    "SELECT 1 FROM lane WHERE kind = $1 AND clock_timestamp() > $2::timestamptz + interval '1 s'",
                    kind.name,
                    first,
                ),
                seconds=30,
            )
            notes.go_on.set()
            await all_over(database, kind)
    assert (notes.numbers, other.numbers) == ([1], [])


async def test_a_lane_that_is_claimed_again_before_the_task_of_its_last_claim_has_ended_is_renewed(
    world: World, notes: Notes
) -> None:
    kind = new_lane()
    given_back, may_end = asyncio.Event(), asyncio.Event()

    @kind.runner(concurrency=2)
    async def work(parcel: Parcel, effects: Effects, tx: Tx) -> None:
        async def linger() -> None:
            given_back.set()
            await may_end.wait()

        if parcel.number == 1:
            tx.after_commit(linger)
        else:
            await notes.hold(parcel, effects, tx)

    def tasks() -> int:
        return sum(task.get_name() == f"lane {kind.name}" for task in asyncio.all_tasks())

    async with world.process(work, lease_seconds=0.6) as database:
        await put(database, kind, "a", 1)
        await given_back.wait()
        await put(database, kind, "a", 2)
        await notes.begun.wait()
        assert tasks() == 2
        await renewals(database, kind, 2)  # the first claim is not taken for one that was lost
        may_end.set()
        await until(lambda: asyncio.sleep(0, tasks() == 1))
        await renewals(database, kind, 3)
        notes.go_on.set()
        await all_over(database, kind)
        assert await items(database, kind, "i.attempts", "i.recoveries", "epoch") == [(1, 0, 2), (1, 0, 2)]
    assert notes.numbers == [2]
    assert 'outcome="lost"' not in metrics_of(world)


async def renewals(database: Database, kind: lanes.Lane[Parcel], count: int) -> None:
    """Waits until the lease of the kind's only lane was set so many times more."""
    async with asyncio.timeout(30):
        for _ in range(count):
            before = await sql(database, "SELECT ready_at FROM lane WHERE kind = $1", kind.name)
            while before == await sql(database, "SELECT ready_at FROM lane WHERE kind = $1", kind.name):
                await asyncio.sleep(0.02)


async def test_a_renewal_leaves_a_lane_alone_that_was_given_back_meanwhile(claims: Claims, desk: Database) -> None:
    """Otherwise the next item would wait for the end of a lease that no process has."""
    kind = new_lane()
    await put(desk, kind, "a", 1)
    [(lease, _)] = (await claims.claim(kind.name, "", 1, 1, {})).lanes
    await sql(desk, "UPDATE lane SET owner = NULL, ready_at = NULL WHERE kind = $1", kind.name)
    assert await claims.renew([lease]) == []
    assert await sql(desk, "SELECT ready_at FROM lane WHERE kind = $1", kind.name) == [(None,)]


async def test_a_lane_whose_lease_ran_out_is_counted_as_taken_over(world: World, notes: Notes) -> None:
    kind = new_lane()
    async with world.process() as database:
        await put(database, kind, "a", 1)
        await sql(database, "UPDATE lane SET owner = gen_random_uuid() WHERE kind = $1", kind.name)
    async with world.process(kind.runner(concurrency=1)(notes.note)):
        await notes.has(1)
    assert f'claw_lane_takeovers_total{{kind="{kind.name}"}} 1.0' in metrics_of(world)


async def test_a_lane_that_a_transaction_has_locked_costs_no_other_its_lease(claims: Claims, desk: Database) -> None:
    kind = new_lane()
    for lane in ("locked", "free"):
        await put(desk, kind, lane, 1)
    leases = {lease.lane: lease for lease, _ in (await claims.claim(kind.name, "", 2, 2, {})).lanes}
    before = leases["free"].until
    async with desk.begin() as tx:
        await tx.sql("SELECT 1 FROM lane WHERE kind = $1 AND lane = 'locked' FOR UPDATE", kind.name)
        async with asyncio.timeout(20):
            assert await claims.renew(list(leases.values())) == []
    assert leases["free"].until > before == leases["locked"].until
    await steal(desk, kind)
    assert await claims.renew(list(leases.values())) == list(leases.values())


async def test_two_processes_that_claim_at_once_get_different_lanes(
    claims: Claims, desk: Database, sample: SampleDatabase
) -> None:
    kind = new_lane()
    async with desk.begin(tenant_id=TENANT) as tx:
        for n in range(40):
            tx.enqueue(kind, lane=f"lane {n}", item=Parcel(n))
    engine = create_engine(sample.url("desk", "worker"), pool_size=1)
    other = Claims(engine, "sample_desk", lambda kind: None, lease_seconds=60)
    taken: list[int] = []

    async def take(own: Claims) -> None:
        while lanes := (await own.claim(kind.name, "", 3, 3, {})).lanes:
            taken.extend(lease.lane_id for lease, _ in lanes)

    await asyncio.gather(take(claims), take(other))
    await take(claims)
    await other.close()
    await engine.dispose()
    assert len(taken) == len(set(taken)) == 40


async def test_a_handler_whose_lane_is_lost_is_cancelled(world: World, notes: Notes) -> None:
    kind = new_lane()
    async with world.process(kind.runner(concurrency=1)(notes.hold), lease_seconds=0.6) as database:
        await put(database, kind, "a", 1)
        await notes.begun.wait()
        await steal(database, kind)

        async def cancelled() -> bool:
            return not any(task.get_name() == f"lane {kind.name}" for task in asyncio.all_tasks())

        await until(cancelled)
        assert f'claw_lane_items_total{{kind="{kind.name}",outcome="lost"}} 1.0' in metrics_of(world)


async def test_a_handler_that_cleans_up_after_its_lane_was_lost_is_left_to_it(world: World, notes: Notes) -> None:
    kind = new_lane()
    cleaning, may_end, cleaned = asyncio.Event(), asyncio.Event(), asyncio.Event()

    @kind.runner(concurrency=2)
    async def work(parcel: Parcel, effects: Effects, tx: Tx) -> None:
        try:
            await notes.hold(parcel, effects, tx)
        except asyncio.CancelledError:
            cleaning.set()
            await may_end.wait()
            cleaned.set()
            raise

    async with world.process(work, lease_seconds=0.6) as database:
        await put(database, kind, "a", 1)
        await put(database, kind, "b", 2)
        await notes.has(2)

        async def renewed_until() -> Any:
            async with database.begin() as tx:
                rows = await tx.sql("SELECT ready_at FROM lane WHERE kind = $1 AND lane = 'b'", kind.name)
            return rows[0][0]

        async with database.begin() as tx:
            await tx.sql("UPDATE lane SET epoch = epoch + 1 WHERE kind = $1 AND lane = 'a'", kind.name)
        await cleaning.wait()
        for _ in range(3):
            before = await renewed_until()

            async def renewed(before: Any = before) -> bool:
                return bool(await renewed_until() > before)

            await until(renewed)
        may_end.set()
        async with asyncio.timeout(30):
            await cleaned.wait()
        notes.go_on.set()


async def test_nothing_is_written_for_a_lane_in_other_hands(world: World, notes: Notes) -> None:
    """The lease is long, so no handler is cancelled: only the epoch prevents the write."""
    kind, after = new_lane(), new_lane()

    @kind.runner(concurrency=1)
    async def work(parcel: Parcel, effects: Effects, tx: Tx) -> None:
        tx.enqueue(after, lane="b", item=parcel)
        await notes.hold(parcel, effects, tx)
        if parcel.number == 2:
            raise InvalidMessage("number", "unlucky")

    async with world.process(work, lease_seconds=60) as database:
        for number in (1, 2):
            notes.go_on.clear()
            notes.begun.clear()
            await put(database, kind, f"lane {number}", number)
            await notes.begun.wait()
            await steal(database, kind)
            notes.go_on.set()
            await until(lambda n=number: said(world, kind.name, "lost", n))  # type: ignore[misc]
        assert await items(database, kind, "state", "attempts") == [("waiting", 0)] * 2
        assert await items(database, after, "seq") == []
        assert await letters(database, kind.name) == []


async def test_an_item_that_takes_its_process_down_again_and_again_is_a_dead_letter(world: World, notes: Notes) -> None:
    kind = new_lane()
    async with world.process() as database:
        await put(database, kind, "a", 1, 2)
        for _ in range(MAX_RECOVERIES - 1):
            await sql(
                database, "UPDATE lane_item SET recoveries = recoveries + 1 WHERE kind = $1 AND seq = 1", kind.name
            )
        await steal(database, kind, seconds=0.0)
    async with world.process(kind.runner(concurrency=1)(notes.note)) as database:
        await all_over(database, kind)
        assert notes.numbers == [2]
        assert await items(database, kind, "state", "recoveries") == [("dead", 10), ("done", 0)]


async def test_one_item_that_ends_its_processes_takes_no_other_along(desk: Database, sample: SampleDatabase) -> None:
    """Each round is a process: it starts all lanes that it gets, and dies with them if one is the poisoned one."""
    kind, poisoned = new_lane(), 3
    for number in range(6):
        await put(desk, kind, f"lane {number}", number)
    for _ in range(100):
        engine = create_engine(sample.url("desk", "worker"), pool_size=1)
        process = Claims(engine, "sample_desk", lambda kind: None, lease_seconds=60)
        lanes = (await process.claim(kind.name, "", 10, 10, {})).lanes
        heads = {lease: head for lease, head in lanes if head}
        if all(head.recoveries >= MAX_RECOVERIES for head in heads.values()):
            break
        if f"lane {poisoned}" not in {lease.lane for lease in heads}:
            for lease, head in heads.items():
                await sql(desk, "SELECT lane_finish($1, $2, $3, 'done', false)", lease.lane_id, lease.epoch, head.seq)
        await process.close()
        await engine.dispose()
        # The leases of the dead process and the pause of the lanes that it passed on run out.
        await sql(desk, "UPDATE lane SET ready_at = now() WHERE kind = $1 AND ready_at IS NOT NULL", kind.name)
    await process.close()
    await engine.dispose()
    assert [lease.lane for lease in heads] == [f"lane {poisoned}"]
    states = dict(await items(desk, kind, "lane", "state"))
    assert states.pop(f"lane {poisoned}") == "waiting"
    assert set(states.values()) == {"done"}
    recoveries = dict(await items(desk, kind, "lane", "recoveries"))
    assert recoveries.pop(f"lane {poisoned}") == MAX_RECOVERIES
    assert set(recoveries.values()) == {SUSPECT_RECOVERIES}


async def test_nothing_is_started_beside_a_suspect_until_it_has_ended_or_has_run_for_a_while(
    desk: Database, sample: SampleDatabase, notes: Notes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lane_runner, "ALONE_SECONDS", 3600.0)
    monkeypatch.setattr(lane_runner, "BETWEEN_SUSPECTS_SECONDS", 3600.0)
    monkeypatch.setattr(claiming, "PASSED_ON_SECONDS", 0.0)
    kind = new_lane()
    for number in (1, 2, 3):
        await put(desk, kind, f"lane {number}", number)
    await sql(desk, "UPDATE lane_item SET recoveries = $2 WHERE kind = $1 AND seq = 1", kind.name, SUSPECT_RECOVERIES)
    await put(desk, kind, "new", 4)
    engine = create_engine(sample.url("desk", "worker"), pool_size=1)
    work = kind.runner(concurrency=8)(notes.hold)
    runner = LaneRunner(desk, [work], engine, Metrics(CollectorRegistry()), lease_seconds=60)
    [held] = runner._kinds.values()

    async def started() -> list[int]:
        await runner._fill(held)
        # The handlers begin in the turns of the event loop that follow the claim.
        for _ in range(10):
            await asyncio.sleep(0)
        return notes.numbers

    [suspect] = await started()
    assert suspect in (1, 2, 3)
    assert await started() == [suspect]
    # Its time alone is over: an item that is not a suspect starts beside it.
    runner._alone_until = 0.0
    assert await started() == [suspect, 4]
    notes.go_on.set()
    await asyncio.wait(held.running.values())
    # A suspect has ended: others have their turn before the next one.
    assert await started() == [suspect, 4]
    runner._next_suspect_at = 0.0
    assert len(await started()) == 3
    await asyncio.wait(held.running.values())
    await runner._claims.close()
    await engine.dispose()


async def test_a_stop_waits_for_the_handlers_and_takes_nothing_more(world: World, notes: Notes) -> None:
    kind = new_lane()
    async with world.process(kind.runner(concurrency=1)(notes.hold)) as database:
        await put(database, kind, "a", 1, 2)
        await notes.begun.wait()
        asyncio.get_running_loop().call_later(0.2, notes.go_on.set)
    async with world.process() as database:
        assert [state for (state,) in await items(database, kind, "state")] == ["done", "waiting"]
        assert await sql(database, "SELECT owner FROM lane WHERE kind = $1", kind.name) == [(None,)]


async def test_a_handler_that_does_not_end_in_time_leaves_its_lane_to_others_at_once(
    world: World, notes: Notes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lane_runner, "DRAIN_SECONDS", 0.0)
    kind = new_lane()
    async with world.process(kind.runner(concurrency=1)(notes.hold), lease_seconds=3600) as database:
        await put(database, kind, "a", 1)
        await notes.begun.wait()
    other = Notes()
    async with world.process(kind.runner(concurrency=1)(other.note)) as database:
        await all_over(database, kind)
        assert await items(database, kind, "state", "recoveries") == [("done", 0)]
    assert other.numbers == [1]


async def test_a_waiting_item_is_postponed_or_cancelled_and_one_that_has_begun_is_not(
    world: World, notes: Notes
) -> None:
    kind = new_lane()
    far = timedelta(hours=1)
    async with world.process(kind.runner(concurrency=4)(notes.hold)) as database:
        [begun] = await put(database, kind, "a", 1)
        [gone, later] = await put(database, kind, "b", 2, 3, after=far)
        await notes.begun.wait()
        async with database.begin(tenant_id=TENANT) as tx:
            assert not await lanes.postpone(tx, kind, "a", begun, far)
            assert not await lanes.cancel(tx, kind, "a", begun)
            assert not await lanes.cancel(tx, kind, "no such lane", begun)
            assert await lanes.cancel(tx, kind, "b", gone)
            assert await lanes.postpone(tx, kind, "b", later, timedelta())
        notes.go_on.set()
        await all_over(database, kind)
        assert notes.numbers == [1, 3]
        assert [state for (state,) in await items(database, kind, "state")] == ["done", "cancelled", "done"]


async def test_what_is_over_is_forgotten_after_a_while_with_the_lanes_it_leaves_empty(
    world: World, notes: Notes
) -> None:
    kind = new_lane()
    async with world.process(kind.runner(concurrency=1)(notes.note)) as database:
        await put(database, kind, "old", 1)
        await put(database, kind, "half", 2)
        await put(database, kind, "half", 3, after=timedelta(hours=1))
        await notes.has(2)
        await until(
            lambda: sql(database, "SELECT 1 FROM lane_item WHERE kind = $1 AND body IS NULL OFFSET 1", kind.name)
        )
        await forget(database)
        assert len(await items(database, kind, "seq")) == 3
        await sql(
            database,
            "UPDATE lane_item SET finished_at = finished_at - $2::interval WHERE kind = $1",
            kind.name,
            lanes.KEEP_ITEMS,
        )
        await forget(database)
        assert await sql(database, "SELECT lane, last_seq FROM lane WHERE kind = $1", kind.name) == [("half", 2)]
        assert await items(database, kind, "lane", "seq") == [("half", 2)]
        async with database.begin() as tx:
            await Maintenance(database, world.metrics)._observe(tx)
    assert f'claw_lane_depth{{kind="{kind.name}"}} 1.0' in metrics_of(world)
    assert f'claw_lane_oldest_seconds{{kind="{kind.name}"}} 0.0' in metrics_of(world)


async def test_a_lane_that_gets_an_item_while_it_would_be_forgotten_stays(
    world: World, notes: Notes, desk: Database
) -> None:
    kind = new_lane()
    async with world.process(kind.runner(concurrency=1)(notes.note)) as database:
        await put(database, kind, "a", 1)
        await all_over(database, kind)
    past = "UPDATE lane_item SET finished_at = finished_at - $2::interval WHERE kind = $1"
    await sql(desk, past, kind.name, lanes.KEEP_ITEMS)
    async with desk.begin(tenant_id=TENANT) as tx:
        tx.enqueue(kind, lane="a", item=Parcel(2))
        await tx.flush()
        forgetting = asyncio.create_task(forget(desk))
        await until(lambda: sql(desk, WAITS))
    await forgetting
    assert await items(desk, kind, "seq", "state") == [(2, "waiting")]


async def forget(database: Database) -> None:
    async with database.begin() as tx:
        await lanes.forget(tx)


@pytest.fixture
def exporter() -> Iterator[InMemorySpanExporter]:
    exporter = InMemorySpanExporter()
    running = telemetry.setup("desk", "1", None, processor=SimpleSpanProcessor(exporter))
    yield exporter
    running.shutdown()


async def test_the_handler_runs_in_the_trace_that_enqueued_its_item_at_every_attempt(
    world: World, notes: Notes, exporter: InMemorySpanExporter
) -> None:
    kind = new_lane()
    notes.errors = [RuntimeError("broken")]
    async with world.process(kind.runner(concurrency=1)(notes.note)) as database:
        with telemetry.span("POST /parcels"):
            await put(database, kind, "a", 1)
        await all_over(database, kind)
        with telemetry.span("POST /old"), telemetry.span("stop"):
            await put(database, kind, "b", 2, after=timedelta(hours=1))
        await sql(
            database,
            "UPDATE lane_item SET created_at = created_at - interval '15 minutes', not_before = created_at "
            "WHERE kind = $1 AND state = 'waiting'",
            kind.name,
        )
        await sql(database, "UPDATE lane SET ready_at = now() WHERE kind = $1 AND ready_at IS NOT NULL", kind.name)
        await all_over(database, kind)
    spans = {span.name: span for span in exporter.get_finished_spans()}
    done = [span for span in exporter.get_finished_spans() if span.name == f"process lane {kind.name}"]
    assert [span.parent and span.parent.span_id for span in done] == [span_id(spans["POST /parcels"])] * 2 + [None]
    assert [span.attributes["claw.lane.attempt"] for span in done if span.attributes] == [1, 2, 1]
    assert [link.context.span_id for link in done[2].links] == [span_id(spans["stop"])]


def span_id(span: ReadableSpan) -> int:
    assert span.context is not None
    id_: int = span.context.span_id
    return id_


async def letters(database: Database, kind: str) -> list[tuple[Any, ...]]:
    return await sql(
        database,
        "SELECT message_id, key, tenant_id, state, attempts, error, payload FROM dead_letter "
        "WHERE consumer = $1 AND source = 'lane' AND destination = $1",
        kind,
    )


async def sql(database: Database, statement: str, *arguments: Any) -> list[tuple[Any, ...]]:
    async with database.begin() as tx:
        return list(await tx.sql(statement, *arguments))


async def listening(database: Database, processes: int = 1) -> bool:
    rows = await sql(
        database,
        "SELECT 1 FROM pg_stat_activity WHERE datname = current_database() AND application_name = 'lanes' "
        "AND query LIKE '%lane%' AND query NOT LIKE 'LISTEN%'",
    )
    return len(rows) >= processes


def metrics_of(world: World) -> str:
    return generate_latest(world.metrics.registry).decode()


async def said(world: World, kind: str, outcome: str, count: int) -> bool:
    return f'claw_lane_items_total{{kind="{kind}",outcome="{outcome}"}} {count}.0' in metrics_of(world)
