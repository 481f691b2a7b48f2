"""Tests of effects: the records before, during and after a call, and the recovery after the process has ended."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from datetime import timedelta
from functools import partial
from typing import Any, Literal

import msgspec
import pytest
from prometheus_client import generate_latest

from infra.errors import Conflict, EffectFailed, InDoubt, InvalidMessage, RetryLater, Transient, Unanswered
from infra.lanes.claims import LaneLost
from infra.lanes.effects import Effects, Outcome
from infra.lanes.lane import Work
from infra.postgres.database import Database
from infra.postgres.tx import Tx
from tests.infra.conftest import SampleDatabase
from tests.infra.lanes.lane_fixture import TENANT, Parcel, World, all_over, items, log_lines, new_lane, put, steal
from tooling.testing.until import until

Kind = Literal["repeatable", "keyed", "once"]
KINDS: list[Kind] = ["repeatable", "keyed", "once"]


class Receipt(msgspec.Struct, frozen=True):
    """The answer of the other side."""

    number: int


@dataclass
class Office:
    """The other side: notes the keys of the calls, fails as it is told to."""

    calls: list[str] = field(default_factory=list)
    errors: list[Exception] = field(default_factory=list)
    outcomes: list[Outcome[Receipt]] = field(default_factory=list)
    meanwhile: Callable[[], Awaitable[None]] | None = None

    async def accept(self, key: str) -> Receipt:
        self.calls.append(key)
        if self.meanwhile:
            await self.meanwhile()
        if self.errors:
            raise self.errors.pop(0)
        return Receipt(len(self.calls))

    def work(self, effect_kind: Kind, *faults: Exception, lane: Any = None, **options: Any) -> Work:
        """Hands a parcel in, notes the outcome, and fails after that with each of `faults`."""
        left = list(faults)

        async def deliver(parcel: Parcel, effects: Effects, tx: Tx) -> None:
            outcome = await effects.run(
                f"parcel {lane.name} {parcel.number}", self.accept, kind=effect_kind, result=Receipt, **options
            )
            self.outcomes.append(outcome)
            await tx.sql("SELECT 1")
            if left:
                raise left.pop(0)

        return Work(lane, deliver, 1, 1)

    @property
    def said(self) -> list[tuple[str, Receipt | None, int, bool]]:
        return [(o.state, o.result, o.attempt, o.saved) for o in self.outcomes]


@pytest.fixture
def world(sample: SampleDatabase) -> Iterator[World]:
    with log_lines():
        yield World(sample)


@pytest.fixture
def office() -> Office:
    return Office()


@pytest.mark.parametrize("effect_kind", KINDS)
async def test_what_was_done_is_not_done_again_when_the_handler_fails_later(
    world: World, office: Office, effect_kind: Kind
) -> None:
    kind = new_lane()
    async with world.process(office.work(effect_kind, RuntimeError("later"), lane=kind)) as database:
        await put(database, kind, "a", 1)
        await all_over(database, kind)
    assert len(office.calls) == 1
    assert office.said == [("succeeded", Receipt(1), 1, False), ("succeeded", Receipt(1), 1, True)]


@pytest.mark.parametrize("effect_kind", KINDS)
async def test_what_is_refused_for_good_has_failed_and_is_not_asked_again(
    world: World, office: Office, effect_kind: Kind
) -> None:
    kind = new_lane()
    office.errors = [EffectFailed("no such address, token=abc")]
    async with world.process(office.work(effect_kind, RuntimeError("later"), lane=kind)) as database:
        await put(database, kind, "a", 1)
        await all_over(database, kind)
    assert len(office.calls) == 1
    assert office.said == [("failed", None, 1, False), ("failed", None, 1, True)]
    assert {outcome.error for outcome in office.outcomes} == {"no such address, token=***"}
    assert (
        f'claw_effects_total{{kind="{effect_kind}",state="failed"}} 1.0'
        in generate_latest(world.metrics.registry).decode()
    )


@pytest.mark.parametrize("error", [Transient("away"), RetryLater(timedelta(milliseconds=1))])
@pytest.mark.parametrize("effect_kind", KINDS)
async def test_what_did_not_happen_is_tried_again_with_the_same_key(
    world: World, office: Office, effect_kind: Kind, error: Exception
) -> None:
    kind = new_lane()
    office.errors = [error]
    async with world.process(office.work(effect_kind, lane=kind)) as database:
        await put(database, kind, "a", 1)
        await all_over(database, kind)
    assert len(office.calls) == 2
    assert len(set(office.calls)) == 1
    assert office.said == [("succeeded", Receipt(2), 2, False)]


async def minutes_pass(database: Database, lane: str, minutes: int) -> None:
    await database.autocommit(
        "UPDATE lane_effect SET started_at = started_at - $2 * interval '1 minute' WHERE key LIKE $1",
        f"parcel {lane} %",
        minutes,
    )


@pytest.mark.parametrize("error", [InDoubt("no answer"), Unanswered("no answer"), Transient("away")])
async def test_what_nobody_knows_is_not_repeated_after_the_other_side_has_forgotten_the_key(
    world: World, office: Office, error: Exception
) -> None:
    kind = new_lane()
    # The time counts from the first call, with each end of the second.
    office.errors = [InDoubt("no answer"), error]
    async with world.process(office.work("keyed", lane=kind, key_known=timedelta(hours=1))) as database:
        office.meanwhile = partial(minutes_pass, database, kind.name, 40)
        await put(database, kind, "a", 1)
        await all_over(database, kind)
    assert len(office.calls) == 2
    assert [(one.state, one.error) for one in office.outcomes] == [
        ("unknown", "no answer for as long as the key is known")
    ]


async def test_a_key_is_known_from_the_first_call_that_may_have_arrived(world: World, office: Office) -> None:
    kind = new_lane()
    office.errors = [Transient("away") for _ in range(3)]
    async with world.process(office.work("keyed", lane=kind, key_known=timedelta(minutes=30))) as database:
        office.meanwhile = partial(minutes_pass, database, kind.name, 60)
        await put(database, kind, "a", 1)
        await all_over(database, kind)
    assert office.said == [("succeeded", Receipt(4), 4, False)]


@pytest.mark.parametrize("error", [Unanswered("sent, no answer"), KeyError("in what came back")])
async def test_what_nobody_knows_is_repeated_where_that_is_harmless_and_otherwise_unknown(
    world: World, office: Office, error: Exception
) -> None:
    for effect_kind in KINDS:
        kind = new_lane()
        office.calls.clear()
        office.outcomes.clear()
        office.errors = [error]
        async with world.process(office.work(effect_kind, RuntimeError("later"), lane=kind)) as database:
            await put(database, kind, "a", 1)
            await all_over(database, kind)
        if effect_kind == "once":
            assert len(office.calls) == 1
            assert office.said == [("unknown", None, 1, False), ("unknown", None, 1, True)]
        else:
            assert len(office.calls) == 2
            assert len(set(office.calls)) == 1
            assert office.said == [("succeeded", Receipt(2), 2, False), ("succeeded", Receipt(2), 2, True)]


@pytest.mark.parametrize("effect_kind", KINDS)
async def test_a_call_that_a_lost_lease_cut_off_is_taken_up_by_the_next_owner(
    world: World, office: Office, effect_kind: Kind
) -> None:
    """And the former owner, who comes back from the call, records nothing."""
    kind, ends = new_lane(), new_lane()
    back = asyncio.Event()

    async def note(tx: Tx, outcome: Outcome[Receipt]) -> None:
        tx.enqueue(ends, lane="ends", item=Parcel(outcome.attempt))

    async def lose_the_lane() -> None:
        office.meanwhile = None
        await steal(database, kind, seconds=0.0)
        async with world.process(office.work(effect_kind, lane=kind, after=note)) as other:
            await all_over(other, kind)
        back.set()

    office.meanwhile = lose_the_lane
    async with world.process(office.work(effect_kind, lane=kind, after=note), lease_seconds=60) as database:
        await put(database, kind, "a", 1)
        await back.wait()
    async with world.process() as database:
        if effect_kind == "once":
            assert len(office.calls) == 1
            assert office.said == [("unknown", None, 1, False)]
            assert await recorded(database, kind, "state", "attempt") == [("unknown", 1)]
        else:
            assert len(office.calls) == 2
            assert len(set(office.calls)) == 1
            assert office.said == [("succeeded", Receipt(2), 2, False)]
            assert await recorded(database, kind, "state", "attempt") == [("succeeded", 2)]
        # The former owner's `after` was called and rolled back: the lane's epoch stands in its way.
        assert len(await items(database, ends, "seq")) == 1


async def recorded(database: Any, kind: Any, *columns: str) -> list[tuple[Any, ...]]:
    async with database.begin() as tx:
        return list(
            await tx.sql(
                f"SELECT {', '.join(columns)} FROM lane_effect WHERE key LIKE 'parcel ' || $1 || '%' ORDER BY key",
                kind.name,
            )
        )


async def test_before_commits_with_the_start_of_each_attempt_and_after_with_the_end(
    world: World, office: Office
) -> None:
    kind, log = new_lane(), new_lane()
    seen: list[list[tuple[Any, ...]]] = []

    async def before(tx: Tx, attempt: int, lost: bool) -> None:
        tx.enqueue(log, lane="log", item=Parcel(attempt))

    async def after(tx: Tx, outcome: Outcome[Receipt]) -> None:
        tx.enqueue(log, lane="log", item=Parcel(100 + outcome.attempt))

    async def look() -> None:
        seen.append(list(await items(database, log, "convert_from(body, 'UTF8')")))
        seen.append(await recorded(database, kind, "state", "attempt"))

    office.meanwhile = look
    office.errors = [RetryLater(timedelta(milliseconds=1))]
    work = office.work("once", RuntimeError("later"), lane=kind, before=before, after=after)
    async with world.process(work) as database:
        await put(database, kind, "a", 1)
        await all_over(database, kind)
        assert seen == [
            [('{"number":1}',)],
            [("started", 1)],
            [('{"number":1}',), ('{"number":2}',)],
            [("started", 2)],
        ]
        assert [body for (body,) in await items(database, log, "convert_from(body, 'UTF8')")] == [
            '{"number":1}',
            '{"number":2}',
            '{"number":102}',
        ]


async def test_before_is_told_of_an_attempt_whose_end_nobody_knows(world: World, office: Office) -> None:
    kind = new_lane()
    told: list[tuple[int, bool]] = []

    async def before(tx: Tx, attempt: int, lost: bool) -> None:
        told.append((attempt, lost))

    office.errors = [Unanswered("cut off"), RetryLater(timedelta(milliseconds=1))]
    async with world.process(office.work("repeatable", lane=kind, before=before)) as database:
        await put(database, kind, "a", 1)
        await all_over(database, kind)
    assert told == [(1, False), (2, True), (3, False)]


async def test_nothing_is_called_where_before_refuses(world: World, office: Office) -> None:
    kind = new_lane()

    async def before(tx: Tx, attempt: int, lost: bool) -> None:
        raise InvalidMessage("number", "no money for it")

    async with world.process(office.work("once", lane=kind, before=before)) as database:
        await put(database, kind, "a", 1)
        await all_over(database, kind)
        assert await recorded(database, kind, "state") == []
        assert await items(database, kind, "state") == [("dead",)]
    assert office.calls == []


async def test_an_end_whose_commit_meets_another_is_committed_again_and_nothing_called_again(
    world: World, office: Office
) -> None:
    kind = new_lane()
    conflicts = [Conflict("somebody else appended first")]

    async def after(tx: Tx, outcome: Outcome[Receipt]) -> None:
        if conflicts:
            raise conflicts.pop()

    async with world.process(office.work("once", lane=kind, after=after)) as database:
        await put(database, kind, "a", 1)
        await all_over(database, kind)
    assert len(office.calls) == 1
    assert office.said == [("succeeded", Receipt(1), 1, False)]


async def test_effects_come_before_the_first_use_of_the_transaction(world: World, office: Office) -> None:
    kind = new_lane(retries=())

    @kind.runner(concurrency=1)
    async def deliver(parcel: Parcel, effects: Effects, tx: Tx) -> None:
        await tx.sql("SELECT 1")
        await effects.run("late", office.accept, kind="once")

    async with world.process(deliver) as database:
        await put(database, kind, "a", 1)
        await all_over(database, kind)
        assert await items(database, kind, "state") == [("dead",)]
    assert office.calls == []


async def test_a_transaction_begun_by_effects_commits_by_itself_and_only_with_the_lane(world: World) -> None:
    kind, log = new_lane(retries=()), new_lane()
    refused: list[BaseException] = []

    @kind.runner(concurrency=1)
    async def deliver(parcel: Parcel, effects: Effects, tx: Tx) -> None:
        async with effects.begin() as step:
            assert step.tenant_id == TENANT
            step.enqueue(log, lane="log", item=Parcel(1))
        await steal(database, kind)
        try:
            async with effects.begin() as step:
                step.enqueue(log, lane="log", item=Parcel(2))
        except LaneLost as error:
            refused.append(error)
            raise

    async with world.process(deliver, lease_seconds=60) as database:
        await put(database, kind, "a", 1)

        async def was_refused() -> bool:
            return bool(refused)

        await until(was_refused)
        assert await items(database, log, "convert_from(body, 'UTF8')") == [('{"number":1}',)]


@pytest.mark.parametrize("moment", ["before the call", "during the call"])
async def test_no_start_and_no_end_is_recorded_once_another_process_has_the_lane(
    world: World, office: Office, moment: str
) -> None:
    kind = new_lane(retries=())
    refused: list[LaneLost] = []

    @kind.runner(concurrency=1)
    async def deliver(parcel: Parcel, effects: Effects, tx: Tx) -> None:
        async def take_the_lane() -> None:
            await steal(database, kind)

        if moment == "before the call":
            await take_the_lane()
        else:
            office.meanwhile = take_the_lane
        try:
            await effects.run(f"parcel {kind.name}", office.accept, kind="repeatable")
        except LaneLost as error:
            refused.append(error)
            raise

    async with world.process(deliver, lease_seconds=60) as database:
        await put(database, kind, "a", 1)

        async def was_refused() -> bool:
            return bool(refused)

        await until(was_refused)
        expected = [] if moment == "before the call" else [("started",)]
        assert await recorded(database, kind, "state") == expected
        assert len(office.calls) == len(expected)


async def test_a_process_that_slept_beyond_its_lease_calls_nothing(
    world: World, office: Office, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was stopped between the commit of *started* and the call."""
    kind = new_lane()
    lost = asyncio.Event()

    async def before(tx: Tx, attempt: int, lost: bool) -> None:
        tx.after_commit(sleep_beyond_the_lease)

    async def sleep_beyond_the_lease() -> None:
        monkeypatch.setattr("infra.lanes.claims.time.monotonic", lambda: float("inf"))
        lost.set()

    async with world.process(office.work("once", lane=kind, before=before), lease_seconds=60) as database:
        await put(database, kind, "a", 1)
        await lost.wait()
        monkeypatch.undo()
    assert office.calls == []
